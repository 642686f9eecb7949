"""Which weights of a run are evaluated and exported: those of its best evaluation point, or its last ones."""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors.torch import load
from torch import Tensor

from gdro_cli.config.recipe import Recipe
from gdro_cli.errors import PrerequisiteError, StoreError
from gdro_cli.files import read_file, sha256_file, storage_errors
from gdro_cli.models.adapters import LORA_FILE, Ema, load_lora_state, trained_part
from gdro_cli.runtime.checkpoint import checkpoint_step, latest_checkpoint, load_checkpoint, save_checkpoint
from gdro_cli.runtime.metrics import ValidationRow
from gdro_cli.runtime.run import RunFolder
from gdro_cli.stages.runs.identity import find_run, similar_runs
from gdro_cli.stages.setup.model import attach_adapter
from gdro_cli.stages.setup.session import Session

STOPPED = "stopped.json"
"""Says at which step and why a run ended before its last one; see ``early_end``."""

ADAPTER_NOTE = "adapter.json"
"""Describes the adapter that a run has exported; written last, so a run that has it is finished."""

_SHOWN = 3
"""Differences between two runs that a message names."""

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
    """Empty where ``adapter`` already holds the evaluated weights, as the exported file has them."""
    chosen_by: Mapping[str, Any] | None
    """Measure, score, verdict and validation protocol by which the best point was chosen; None for the last step."""
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

    A better verdict comes before a higher measure: a reward that is paid with images is not a better model. A point
    without a verdict counts as healthy; one that lacks the measure is not a candidate.

    Args:
        folder: the run.
        row: the point.
        measure: points of equal verdicts are compared by it: ``corrected``, or without a judge the task's headline
            measure.
        tensors: ``adapter`` and ``ema``.
    """
    score = row.get(measure)
    if score is None:
        return False
    state = {"measure": measure, "score": score, "protocol": row.protocol, "verdict": row.verdict}
    path = latest_checkpoint(best_folder(folder))
    if path is not None:
        best = load_checkpoint(path)
        comparable = all(best.state.get(key) == state[key] for key in ("measure", "protocol"))
        comparable = comparable and isinstance(best.state.get("score"), int | float)
        if comparable and (*_standing(best.state), -best.step) >= (*_standing(state), -row.step):
            return False
    save_checkpoint(best_folder(folder), row.step, tensors=tensors, state=state, keep=1)
    folder.write_json("best/best.json", {"step": row.step, measure: score})
    return True


def _standing(state: Mapping[str, Any]) -> tuple[int, float]:
    """Of two points of a protocol the one with the higher standing is the better one."""
    return {"collapsed": 0, "suspicious": 1}.get(state.get("verdict", ""), 2), state["score"]


def forget_best_after(folder: RunFolder, step: int) -> None:
    """Delete the weights of the best point if it comes after ``step``, from which the run continues.

    Raises:
        StoreError: the disk refuses.
    """
    path = latest_checkpoint(best_folder(folder))
    if path is not None and checkpoint_step(path) > step:
        with storage_errors(best_folder(folder)):
            shutil.rmtree(best_folder(folder))


def is_finished(folder: RunFolder, recipe: Recipe) -> bool:
    """Whether the run's training is over. A run that has lost its checkpoints is, if it has exported its adapter."""
    path = latest_checkpoint(folder.path)
    if path is None:
        return (folder.path / ADAPTER_NOTE).is_file() and (folder.path / LORA_FILE).is_file()
    if early_end(folder.path) is not None:
        return True
    return checkpoint_step(path) == recipe.train.steps and UNMEASURED not in load_checkpoint(path).state


def _exported_weights(folder: RunFolder, recipe: Recipe) -> RunWeights:
    """The adapter that a finished run has exported, for a run without checkpoints.

    Raises:
        PrerequisiteError: the run has exported none, or the recipe evaluates other weights than those.
        StoreError: a file is damaged.
    """
    if not is_finished(folder, recipe):
        raise PrerequisiteError(f"the run {folder.path} has no checkpoint: run `gdro train` {_SAME} first")
    weights = folder.read_object(ADAPTER_NOTE).get("weights", {})
    if weights.get("kind") != recipe.eval.weights or weights.get("checkpoint") not in (recipe.eval.checkpoint, "last"):
        raise PrerequisiteError(
            f"the run {folder.path} has no checkpoints any more, and its adapter has the {weights.get('kind')} weights"
            f" of the {weights.get('checkpoint')} checkpoint: set eval.weights and eval.checkpoint to these"
        )
    path = folder.path / LORA_FILE
    remedy = "delete the run and train it again"
    tensors = load(read_file(path, digest=str(weights.get("sha256")), remedy=remedy))
    return RunWeights(
        step=int(weights["step"]),
        checkpoint=str(weights["checkpoint"]),
        adapter={name.removeprefix("transformer."): value for name, value in tensors.items()},
        ema={},
        chosen_by=weights.get("chosen_by"),
        identity=f"{recipe.eval.weights} {weights['sha256']}",
    )


def evaluated_weights(folder: RunFolder, recipe: Recipe) -> RunWeights:
    """The weights of a finished run that the recipe evaluates.

    Raises:
        PrerequisiteError: the run is not finished.
        StoreError: a checkpoint is damaged.
    """
    path = latest_checkpoint(folder.path)
    if path is None:
        return _exported_weights(folder, recipe)
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
            f"there is no trained model of the recipe {session.recipe.name} in {session.workspace}"
            f"{_finished_otherwise(session) or f': run `gdro train` {_SAME} first'}"
        )
    return folder, evaluated_weights(folder, session.recipe)


def _finished_otherwise(session: Session) -> str:
    """The rest of a sentence that names a finished run of the recipe which started from something else."""
    for run, changes in similar_runs(session):
        if is_finished(run, session.recipe):
            return (
                f" that started from what is here now; {run.path.name} is finished and differs in"
                f" {'; '.join(changes[:_SHOWN])}: run `gdro eval {run.path.name}` to evaluate that one"
            )
    return ""


def refuse_repetition(session: Session) -> None:
    """Raise StoreError if a finished run of the recipe differs in nothing but the versions behind its scores.

    Such a difference comes with an upgrade; the user may not want to sample, score and train again for it.
    """
    for run, changes in similar_runs(session):
        if all(change.startswith("scores.") for change in changes) and is_finished(run, session.recipe):
            raise StoreError(
                f"{run.path.name} is a finished run of this recipe; its scores were made with other versions"
                f" ({'; '.join(changes[:_SHOWN])}): run `gdro eval {run.path.name}` to evaluate it, or choose another"
                " folder with --out to train again"
            )


def named_run(session: Session, path: Path) -> tuple[RunFolder, RunWeights]:
    """The run in a folder, and the weights of it that the recipe evaluates.

    Raises:
        PrerequisiteError: it is not finished, or its initial adapter has changed.
    """
    folder = RunFolder(path)
    weights = evaluated_weights(folder, session.recipe)
    if (path / ADAPTER_NOTE).is_file():
        trained_on = folder.read_object(ADAPTER_NOTE).get("model", {})
        if trained_on.get("adapter") != session.model.identity.get("adapter"):
            raise PrerequisiteError(
                f"the run {path} did not start from the adapter that train.lora.init names now: put the old file back"
            )
    return folder, weights


@contextmanager
def applied(session: Session, weights: RunWeights) -> Iterator[None]:
    """Attach the trained adapter to the session's model; inside the block the model is the one to evaluate."""
    recipe = session.recipe
    parameters = attach_adapter(recipe, session.model)
    load_lora_state(session.model, weights.adapter if weights.ema else trained_part(session.model, weights.adapter))
    if recipe.eval.weights == "raw" or not weights.ema:
        yield
        return
    ema = Ema(parameters, recipe.train.ema.rate, recipe.train.ema.max_decay)
    ema.load(weights.ema)
    with ema.applied():
        yield


def best_folder(folder: RunFolder) -> Path:
    """Folder of the best evaluation point's weights."""
    return folder.path / "best"
