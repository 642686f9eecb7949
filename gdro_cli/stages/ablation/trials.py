"""The trials of an ablation: ordinary runs, how far each is, and carrying them out.

Several processes may work on the trials of one ablation: each takes the next trial that no other process has taken. A
process leaves the outcome of a trial in a small file; the processes share nothing but files.
"""

from __future__ import annotations

import gc
import os
import shutil
from collections.abc import Sequence
from contextlib import ExitStack, nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

import torch

from gdro_cli.config.sweep import Cell, Sweep
from gdro_cli.errors import StoreError, UserError, is_out_of_memory
from gdro_cli.files import make_folder, storage_errors, write_json
from gdro_cli.models.adapters import reference
from gdro_cli.runtime.checkpoint import checkpoint_step, latest_checkpoint
from gdro_cli.runtime.metrics import ValidationRow, validation_rows
from gdro_cli.runtime.run import RunFolder
from gdro_cli.runtime.terminal import printable
from gdro_cli.stages.evaluation.validation import Protocol, Validation, validation_protocol
from gdro_cli.stages.planning.estimate import image_flops
from gdro_cli.stages.runs.identity import run_path
from gdro_cli.stages.runs.weights import applied, early_end, evaluated_weights
from gdro_cli.stages.setup.session import Session
from gdro_cli.stages.training import train

STATES = "cells"
"""Folder of the trials' outcomes, below the ablation's."""

State = Literal["finished", "ended early", "failed", "unfinished"]


@dataclass(frozen=True, slots=True)
class TrialRun:
    """A cell with its run, whether or not that exists yet."""

    cell: Cell
    run: Path
    protocol: Protocol

    @property
    def step(self) -> int:
        """Step of the newest checkpoint; 0 where there is none."""
        newest = latest_checkpoint(self.run)
        return 0 if newest is None else checkpoint_step(newest)

    @property
    def trained(self) -> bool:
        """Whether the training is over and its adapter written."""
        over = self.step >= self.cell.recipe.train.steps or early_end(self.run) is not None
        return over and (self.run / "pytorch_lora_weights.safetensors").is_file()

    @property
    def points(self) -> tuple[ValidationRow, ...]:
        """The run's evaluation points of the cell's own protocol."""
        if not (self.run / "manifest.json").is_file():
            return ()
        points = validation_rows(RunFolder(self.run).metrics())
        return tuple({point.step: point for point in points if point.protocol == self.protocol.points}.values())

    @property
    def finished(self) -> bool:
        """Whether nothing is left to do."""
        return self.trained and any(point.step > 0 for point in self.points)


@dataclass(frozen=True, slots=True)
class TrialOutcome:
    """How a trial ended."""

    state: State
    reason: str | None = None
    """Why it failed, if it did."""


def trial_runs(session: Session, sweep: Sweep) -> tuple[TrialRun, ...]:
    """The runs of a sweep's cells, whether or not they exist.

    Raises:
        UserError: their evaluation points could not be compared, or their prompts cannot be used.
        PrerequisiteError: the model or the reward's weights are missing.
    """
    parts = [(cell, session.part(cell.recipe, model=session.model)) for cell in sweep.cells]
    trials = tuple(TrialRun(cell, run_path(part), validation_protocol(part)) for cell, part in parts)
    labels: dict[Path, str] = {}
    for trial in trials:
        label = labels.setdefault(trial.run, trial.cell.label)
        if label != trial.cell.label:
            raise UserError(
                f"{label} and {trial.cell.label} are the same training of the recipe {sweep.recipe.name}: they differ"
                " only in keys that it does not learn from"
            )
    odd = [trial.cell.label for trial in trials if trial.protocol.measures != trials[0].protocol.measures]
    if odd:
        raise UserError(
            f"the validation images of {odd[0]} are not sampled and scored like those of {trials[0].cell.label}, so the"
            " cells could not be compared: sweep another key"
        )
    return trials


def reset(folder: Path) -> None:
    """Forget which process took which trial on an earlier start; the runs stay."""
    with storage_errors(folder / STATES):
        if (folder / STATES).exists():
            shutil.rmtree(folder / STATES)
    make_folder(folder / STATES)


def read_outcome(folder: Path, number: int, trial: TrialRun) -> TrialOutcome:
    """How trial ``number`` ended, by its file and its run."""
    path = folder / STATES / f"{number:03d}.json"
    if path.is_file():
        outcome = TrialOutcome(**RunFolder(folder).read_json(f"{STATES}/{path.name}"))
        if outcome.state == "failed":
            return outcome
    if not trial.finished:
        return TrialOutcome("unfinished")
    return TrialOutcome("ended early" if early_end(trial.run) is not None else "finished")


def carry_out(session: Session, trials: Sequence[TrialRun], folder: Path, *, named: bool = False) -> None:
    """Run every trial that is not finished and that no other process has taken.

    A trial that fails does not end the others. With ``named`` every line of progress names its trial. Raises
    Interrupted when the user stops it.
    """
    reporter = session.reporter
    for number, trial in enumerate(trials):
        session.stop.check("stopped between two cells; run the same command again to continue")
        if not _take(folder / STATES / f"{number:03d}.taken"):
            continue
        title = f"cell {number + 1} of {len(trials)}"
        name = f"{trial.cell.label}, seed {trial.cell.seed}"
        if named:
            reporter.prefix = f"[{name}] "
        else:
            title += f": {name}"
        if trial.finished:
            reporter.say(f"{title}: was already finished ({trial.run.name})")
            outcome = TrialOutcome("finished")
        else:
            reporter.say(f"{title} ({trial.run.name})")
            outcome = _run(session, trial)
            free_devices()
            if outcome.state == "failed":
                reporter.say(f"{title}: failed: {outcome.reason}")
        write_json(folder / STATES / f"{number:03d}.json", asdict(outcome))


def _take(path: Path) -> bool:
    """Whether this process is the one that made the file."""
    try:
        with storage_errors(path):
            os.close(os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o644))
    except StoreError:
        if path.exists():
            return False
        raise
    return True


def free_devices() -> None:
    """Free the memory of models that are no longer used, for the next trial or for other processes."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def _run(session: Session, trial: TrialRun) -> TrialOutcome:
    try:
        if not trial.trained:
            train.run(session.part(trial.cell.recipe), image_flops=image_flops)
        if not trial.finished:
            measure_end(session, trial)
    except StoreError as error:
        return TrialOutcome("failed", printable(str(error)))  # a folder's name in it may not be text
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        return TrialOutcome("failed", "the device's memory was not enough: set train.micro_batch, or lower k")
    return TrialOutcome("finished")


def measure_end(session: Session, trial: TrialRun) -> None:
    """Measure the last step of a run that has no evaluation points of the cell's protocol."""
    recipe = trial.cell.recipe
    recipe = recipe.model_copy(update={"eval": recipe.eval.model_copy(update={"checkpoint": "last"})})
    session.reporter.say("the run has no evaluation points of this protocol: its last step is measured now")
    folder = RunFolder(trial.run)
    weights = evaluated_weights(folder, recipe)
    with session.part(recipe) as part, folder.lock(), ExitStack() as stack:
        validation = Validation.open(part, trial.run, stack)
        stack.enter_context(applied(part, weights))
        validation.know_base(lambda: reference(part.model))
        for step, adapter in ((0, reference(part.model)), (weights.step, nullcontext())):
            with adapter:
                measured = validation.measure(step)
            if measured is not None:
                folder.append_metrics(measured[0])
