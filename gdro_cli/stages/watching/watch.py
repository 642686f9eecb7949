"""``gdro watch`` and ``gdro train --watch``: a page of one run that refreshes itself."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

from gdro_cli.config.recipe import Recipe
from gdro_cli.errors import UserError
from gdro_cli.stages.runs.identity import run_named, run_path
from gdro_cli.stages.setup.session import Session
from gdro_cli.stages.setup.store import runs_folder
from gdro_cli.stages.watching.server import serving

_RECIPE = "recipe.json"
"""The first file of a run."""


def run(run: Path, *, port: int, say: Callable[[str], object]) -> None:
    """Serve the page of a run until a signal ends it, which is its ordinary end.

    Args:
        run: the run's folder, which need not exist yet.
        port: 0 for any free one.
        say: prints the address.

    Raises:
        UserError: the port cannot be used.
    """
    with serving(run, port=port, say=say) as address, suppress(KeyboardInterrupt):
        say(f"{run.name} is shown at {address} (Ctrl-C ends the page, not the training)")
        threading.Event().wait()


@contextmanager
def watched(run: Path, say: Callable[[str], object]) -> Iterator[None]:
    """Serve the page of a run while the block trains it. If it cannot be served, ``say`` gets one sentence."""
    with ExitStack() as stack:
        try:
            address = stack.enter_context(serving(run, port=0, say=say))
        except UserError as error:
            say(f"--watch shows nothing: {error}")
        else:
            say(f"watch the training at {address}")
        yield


def run_to_watch(name: str | None, recipe: Recipe | None, workspace: Path) -> Path:
    """The folder of the run that is named, or of a recipe's run (made or not), or of the newest run in the workspace.

    Raises:
        UserError: there is no such run.
        PrerequisiteError: the recipe's model or reward is missing, so that its run has no name.
    """
    if recipe is not None:
        return run_path(Session(recipe, workspace, planning=True))
    if name is not None:
        return run_named(name, workspace)
    runs = [path.parent for path in runs_folder(workspace).glob(f"*/{_RECIPE}")]
    if not runs:
        raise UserError(
            f"there is no run in {workspace} yet: start gdro train, or name its recipe with --recipe to wait for it"
        )
    return max(runs, key=lambda path: (_last_written(path), path.name))


def _last_written(run: Path) -> float:
    """When the training last wrote to the run, in seconds since 1970."""
    times = [path.stat().st_mtime for name in (_RECIPE, "metrics.jsonl") if (path := run / name).is_file()]
    return max(times, default=0.0)
