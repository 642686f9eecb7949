"""Which weights of a run are evaluated and exported: those of its best evaluation point, or its last ones."""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from gdro_cli.config.recipe import Recipe
from gdro_cli.errors import PrerequisiteError
from gdro_cli.files import sha256_file, storage_errors
from gdro_cli.models.adapters import Ema, load_lora_state
from gdro_cli.runtime.checkpoint import checkpoint_step, latest_checkpoint, load_checkpoint, save_checkpoint
from gdro_cli.runtime.metrics import ValidationRow
from gdro_cli.runtime.run import RunFolder
from gdro_cli.stages.runs.identity import find_run
from gdro_cli.stages.setup.model import attach_adapter
from gdro_cli.stages.setup.session import Session

STOPPED = "stopped.json"
"""Says at which step and why a run ended before its last one; see ``early_end``."""

UNMEASURED = "unmeasured"
"""In the state of a checkpoint whose step's evaluation point must still be measured."""
_SAME = "with the same recipe, --set and --out"


@dataclass(frozen=True, slots=True)
class RunWeights:
    """The adapter of one step of a run."""

    step: int
    checkpoint: str
    """``best`` or ``last``."""
    adapter: Mapping[str, Tensor]
    ema: Mapping[str, Tensor]
    chosen_by: Mapping[str, Any] | None
    """Measure, score and validation protocol by which the best point was chosen; None for the last step."""
    identity: str
    """Names the weights that the recipe evaluates: ``ema`` or ``raw``, and their digest."""


def early_end(run: Path) -> int | None:
    """The step at which a run ended before its last one; None if it did not.

    A note of a step whose checkpoint is no longer the newest does not count: the run continues from the newest.
    """
    newest = latest_checkpoint(run)
    if newest is None or not (run / STOPPED).is_file():
        return None
    step = checkpoint_step(newest)
    return step if RunFolder(run).read_object(STOPPED).get("step") == step else None


def keep_if_best(
    folder: RunFolder, row: ValidationRow, *, measure: str, tensors: Mapping[str, Mapping[str, Tensor]]
) -> bool:
    """Keep the weights of an evaluation point if no earlier point of the same protocol was better.

    A point that lacks the measure is no candidate.

    Args:
        folder: the run.
        row: the point.
        measure: points are compared by it: ``corrected``, or without a judge the task's headline measure.
        tensors: ``adapter`` and ``ema``.
    """
    score = row.get(measure)
    if score is None:
        return False
    state = {"measure": measure, "score": score, "protocol": row.protocol}
    path = latest_checkpoint(best_folder(folder))
    if path is not None:
        best = load_checkpoint(path)
        comparable = all(best.state.get(key) == state[key] for key in ("measure", "protocol"))
        comparable = comparable and isinstance(best.state.get("score"), int | float)
        if comparable and (best.state["score"] > score or (best.state["score"] == score and best.step <= row.step)):
            return False
    save_checkpoint(best_folder(folder), row.step, tensors=tensors, state=state, keep=1)
    folder.write_json("best/best.json", {"step": row.step, measure: score})
    return True


def forget_best_after(folder: RunFolder, step: int) -> None:
    """Delete the weights of the best point if it comes after ``step``, from which the run continues.

    Raises:
        StoreError: the disk refuses.
    """
    path = latest_checkpoint(best_folder(folder))
    if path is not None and checkpoint_step(path) > step:
        with storage_errors(best_folder(folder)):
            shutil.rmtree(best_folder(folder))


def evaluated_weights(folder: RunFolder, recipe: Recipe) -> RunWeights:
    """The weights of a finished run that the recipe evaluates.

    Raises:
        PrerequisiteError: the run is not finished.
        StoreError: a checkpoint is damaged.
    """
    path = latest_checkpoint(folder.path)
    if path is None:
        raise PrerequisiteError(f"the run {folder.path} has no checkpoint: run `gdro train` {_SAME} first")
    best = latest_checkpoint(best_folder(folder)) if recipe.eval.checkpoint == "best" else None
    needed = ("adapter", "ema")
    last = load_checkpoint(path, needed=needed)
    unfinished = last.step != recipe.train.steps or UNMEASURED in last.state
    if unfinished and early_end(folder.path) is None:
        raise PrerequisiteError(
            f"the run {folder.path} is at step {last.step} of {recipe.train.steps}: run `gdro train` {_SAME} to"
            " finish it"
        )
    chosen = last if best is None else load_checkpoint(best, needed=needed)
    file = (best or path) / ("ema.safetensors" if recipe.eval.weights == "ema" else "adapter.safetensors")
    return RunWeights(
        step=chosen.step,
        checkpoint="last" if best is None else "best",
        adapter=chosen.tensors["adapter"],
        ema=chosen.tensors["ema"],
        chosen_by=None if best is None else chosen.state,
        identity=f"{recipe.eval.weights} {sha256_file(file)}",
    )


def trained_run(session: Session) -> tuple[RunFolder, RunWeights]:
    """The run that ``gdro train`` made of the recipe, and its weights that the recipe evaluates.

    Raises:
        PrerequisiteError: there is no run, or it is not finished.
    """
    folder = find_run(session)
    if folder is None:
        raise PrerequisiteError(
            f"there is no trained model of the recipe {session.recipe.name} in {session.workspace}: run `gdro train`"
            f" {_SAME} first"
        )
    return folder, evaluated_weights(folder, session.recipe)


@contextmanager
def applied(session: Session, weights: RunWeights) -> Iterator[None]:
    """Attach the trained adapter to the session's model; inside the block the model is the one to evaluate."""
    recipe = session.recipe
    parameters = attach_adapter(recipe, session.model)
    load_lora_state(session.model, weights.adapter)
    if recipe.eval.weights == "raw":
        yield
        return
    ema = Ema(parameters, recipe.train.ema.rate, recipe.train.ema.max_decay)
    ema.load(weights.ema)
    with ema.applied():
        yield


def best_folder(folder: RunFolder) -> Path:
    """Folder of the best evaluation point's weights."""
    return folder.path / "best"
