"""``gdro export``: what a run trained, as a folder that others can load, and on the Hub where that is asked for.

An adapter folder is the run's adapter with its card and recipe. A merged folder is the base pipeline with the adapter
in its transformer. Both appear whole or not at all.
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from gdro_cli.data.imagefolder import refuse_used
from gdro_cli.embedded import tiny_model_path
from gdro_cli.errors import Interrupted, PrerequisiteError, UserError
from gdro_cli.files import new_folder, storage_errors
from gdro_cli.models.adapters import LORA_FILE
from gdro_cli.models.folder import PipelineFolder
from gdro_cli.models.merge import Merged, merge_into, read_adapter
from gdro_cli.runtime.interrupt import STOPPING, StopFlag
from gdro_cli.runtime.progress import Reporter
from gdro_cli.stages.exporting import hub
from gdro_cli.stages.reporting.evaluation_report import weights_text
from gdro_cli.stages.reporting.model_card import CARD, EXPORTED_GRID, EXPORTED_RECIPE, Place, card
from gdro_cli.stages.reporting.redaction import recipe_yaml
from gdro_cli.stages.runs.finished_run import FinishedRun, open_finished
from gdro_cli.stages.runs.identity import run_named
from gdro_cli.stages.setup.model import EMBEDDED


@dataclass(frozen=True, slots=True)
class Export:
    """What was asked for."""

    run: str
    """A run's folder, or its name in the workspace."""
    adapter: Path | None = None
    merge: Path | None = None
    push: str | None = None
    """Repository of the Hub."""
    public: bool = False

    def check(self) -> None:
        """Raise UserError for what makes no sense, before any work."""
        if self.adapter is None and self.merge is None and self.push is None:
            raise UserError("say what to export: --adapter DIR, --merge DIR or --push OWNER/NAME")
        if self.adapter is not None and self.merge is not None and self.push is not None:
            raise UserError("--push uploads one folder: give --adapter or --merge with it, not both")
        if self.public and self.push is None:
            raise UserError("--public says who may see what is pushed: it goes with --push OWNER/NAME")
        for folder in (self.adapter, self.merge):
            if folder is not None:
                refuse_used(folder, what="export")
                if folder.resolve() == Path.cwd():
                    raise UserError(f"{folder} is the folder that you are in, which cannot be replaced: name a new one")
        if self.adapter is not None and self.merge is not None:
            one, other = self.adapter.resolve(), self.merge.resolve()
            if one == other:
                raise UserError("--adapter and --merge name the same folder: name two")
            if one.is_relative_to(other) or other.is_relative_to(one):
                raise UserError("--adapter and --merge name one folder inside the other: name two beside each other")
        if self.push is not None:
            hub.check_name(self.push)


def describe(asked: Export, workspace: Path) -> list[tuple[str, str]]:
    """What would be written and uploaded, as (what, how much). Makes, fetches and sends nothing.

    Raises:
        UserError, PrerequisiteError, StoreError: as ``run``, except for what only the upload finds.
    """
    asked.check()
    run = open_finished(run_named(asked.run, workspace))
    rows = [("run", run.name), ("adapter", weights_text(run.weights)), ("base model", str(run.model["path"]))]
    beside = [CARD, EXPORTED_RECIPE, *([EXPORTED_GRID] if _grid(run) else [])]
    if asked.merge is not None:
        base = _base(run)
        what = "all files of the base model, its transformer changed" if base.on_hub else _told(base.files())
        rows.append((f"into {asked.merge}", f"{what}; {', '.join(beside)}"))
    if asked.adapter is not None:
        rows.append((f"into {asked.adapter}", f"{_told({LORA_FILE: run.adapter_file})}; {', '.join(beside)}"))
    if asked.push is not None:
        what = "the merged model" if asked.merge is not None else f"{LORA_FILE}, {', '.join(beside)}"
        rows.append((f"to {asked.push}", f"{what}; {'public' if asked.public else 'private'}"))
        rows.append(("token", "found" if hub.has_token() else "none: `hf auth login`, or HF_TOKEN"))
    return rows


def _told(files: dict[str, Path]) -> str:
    size = sum(path.stat().st_size for path in files.values())
    return f"{len(files)} file{'s' if len(files) > 1 else ''}, {size / 1e6:.1f} MB"


def run(asked: Export, workspace: Path, reporter: Reporter) -> dict[str, str]:
    """Export a finished run; returns what the command line shows.

    Raises:
        UserError: the request makes no sense, or a folder is not empty.
        PrerequisiteError: the run is not finished, the base model is missing or another, or the Hub cannot be used.
        StoreError: a file is damaged, or the disk refuses.
        Interrupted: stopped by the user; a folder that was not finished is gone.
    """
    asked.check()
    with StopFlag(on_request=lambda: reporter.say(STOPPING)) as stop:
        return _run(asked, workspace, reporter, stop)


def _run(asked: Export, workspace: Path, reporter: Reporter, stop: StopFlag) -> dict[str, str]:
    found = open_finished(run_named(asked.run, workspace))
    nothing = "stopped before anything was exported: run the command again"
    if asked.push is not None:
        with _ending_at_once(stop, nothing):
            hub.check_login()
            is_public = hub.make_repository(asked.push, public=asked.public)
    rows = {"run": found.name, "adapter": weights_text(found.weights)}
    with _folder_to_push(asked) as pushed:
        if asked.adapter is not None or asked.merge is None:
            stop.check(nothing)
            _write_adapter(found, asked.adapter or pushed, name=asked.push)
        if asked.merge is not None:
            again = f"run the command again{'' if asked.adapter is None else ' without --adapter, which is done'}"
            stopped = f"stopped while merging, and nothing of {asked.merge} is left: {again}"
            reporter.say("merging the adapter into a copy of the base model")
            merged = _write_merged(found, asked.merge, name=asked.push, stop=stop, stopped=stopped)
            rows["merged"] = f"{merged.layers} layers; {100 * merged.rounding:.2g} % of the update is rounded away"
        written = [str(folder) for folder in (asked.adapter, asked.merge) if folder is not None]
        rows |= {"folder": ", ".join(written)} if written else {}
        if asked.push is not None:
            reporter.say(f"uploading to {asked.push}")
            again = _upload_again(asked)
            with _ending_at_once(stop, f"stopped before all was uploaded to {asked.push}: {again}"):
                rows["repository"] = hub.upload(pushed, asked.push, message=f"{found.name}, by gdro_cli", again=again)
            rows["visible to"] = "all" if is_public else "you (private)"
    return rows


def _upload_again(asked: Export) -> str:
    """What to do when an upload did not end: the folder is there by then, and the same command would refuse it."""
    kept = asked.merge or asked.adapter
    return "run the command again" if kept is None else f"go on with `hf upload {asked.push} {kept}`: {kept} is whole"


@contextmanager
def _ending_at_once(stop: StopFlag, message: str) -> Iterator[None]:
    """For what takes long and leaves nothing half made, like a transfer: the first signal ends it, with this message.

    Raises:
        Interrupted: a stop was requested, here or before.
    """

    def interrupt() -> None:
        raise KeyboardInterrupt

    stop.check(message)
    try:
        with StopFlag(on_request=interrupt) as at_once:
            at_once.check(message)
            yield
    except KeyboardInterrupt as error:
        raise Interrupted(message) from error


@contextmanager
def _folder_to_push(asked: Export) -> Iterator[Path]:
    """The exported folder that is uploaded; a temporary one where none was asked for."""
    kept = asked.merge or asked.adapter
    if kept is not None:
        yield kept
        return
    with tempfile.TemporaryDirectory(prefix="gdro-") as folder:
        yield Path(folder) / "adapter"


def _write_adapter(found: FinishedRun, folder: Path, *, name: str | None) -> None:
    with new_folder(folder.resolve()) as unfinished:
        shutil.copyfile(found.adapter_file, unfinished / LORA_FILE)
        _write_papers(found, unfinished, Place("adapter", name))


def _write_merged(found: FinishedRun, folder: Path, *, name: str | None, stop: StopFlag, stopped: str) -> Merged:
    with _ending_at_once(stop, stopped):  # may fetch the model, and reads all of it
        base = _base(found)
        base.own_files()
        base.identity  # noqa: B018 (kept from now on)
    told = {key: found.model.get(key) for key in base.identity if key != "path"}
    if told != {key: value for key, value in base.identity.items() if key != "path"}:
        raise PrerequisiteError(
            f"the model {base.path} is not the one that the run {found.name} was trained on: its files have changed;"
            " put the old ones back, or export with --adapter"
        )
    with new_folder(folder.resolve()) as unfinished:
        adapter = read_adapter(found.adapter_file)
        merged = merge_into(base, adapter, unfinished, check=lambda: stop.check(stopped))
        _write_papers(found, unfinished, Place("merged", name, merged.rounding))
    return merged


def _base(found: FinishedRun) -> PipelineFolder:
    path = found.recipe.model.path
    return PipelineFolder(tiny_model_path() if path == EMBEDDED else path)


def _grid(found: FinishedRun) -> Path | None:
    """The evaluation's picture grid, if it is there."""
    return None if found.grid is None else found.folder.path / found.grid


def _write_papers(found: FinishedRun, folder: Path, place: Place) -> None:
    """The card, the recipe and the picture grid."""
    grid = _grid(found)
    with storage_errors(folder):
        (folder / CARD).write_bytes(card(found, place))
        (folder / EXPORTED_RECIPE).write_text(recipe_yaml(found.recipe), encoding="utf-8")
        if grid is not None:
            shutil.copyfile(grid, folder / EXPORTED_GRID)
