"""The cells of an ablation: ordinary runs, where each stands, and carrying them out.

Several processes may work on the cells of one ablation: each takes the next cell that nobody has taken. What a cell
came to is left in a small file, so that nothing passes between the processes but files.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Sequence
from contextlib import ExitStack, nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from gdro_cli.config.recipe import Recipe
from gdro_cli.config.sweep import Cell, Sweep
from gdro_cli.errors import StoreError, UserError
from gdro_cli.files import make_folder, storage_errors, write_json
from gdro_cli.models.adapters import reference
from gdro_cli.models.base import FlowModel
from gdro_cli.runtime.checkpoint import checkpoint_step, latest_checkpoint
from gdro_cli.runtime.interrupt import STOPPING, StopFlag
from gdro_cli.runtime.progress import Reporter
from gdro_cli.runtime.run import RunFolder
from gdro_cli.runtime.terminal import printable
from gdro_cli.stages.evaluation.evaluate import applied
from gdro_cli.stages.evaluation.validation import Protocol, Validation, validation_protocol
from gdro_cli.stages.reporting.evaluation_report import validation_rows
from gdro_cli.stages.runs.identity import run_path
from gdro_cli.stages.runs.weights import early_end, evaluated_weights
from gdro_cli.stages.setup.workspace import open_engine, open_model, open_prompts
from gdro_cli.stages.training import train
from gdro_cli.stages.training.training_data import expected_inputs

STATES = "cells"
"""Folder of what the cells of an ablation came to, below the ablation's."""

State = Literal["finished", "ended early", "failed", "unfinished"]


@dataclass(frozen=True, slots=True)
class Place:
    """A cell with the run that it is, or will be."""

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
    def points(self) -> tuple[dict[str, Any], ...]:
        """The run's evaluation points of the cell's own protocol."""
        if not (self.run / "manifest.json").is_file():
            return ()
        rows = validation_rows(RunFolder(self.run).metrics())
        own = (dict(row) for row in rows if row["protocol"] == self.protocol.points)
        return tuple({row["step"]: row for row in own}.values())

    @property
    def finished(self) -> bool:
        """Whether nothing is left to do."""
        return self.trained and any(point["step"] > 0 for point in self.points)


@dataclass(frozen=True, slots=True)
class Outcome:
    """What a cell came to."""

    state: State
    reason: str | None = None
    """Why it failed."""


def places(sweep: Sweep, workspace: Path, model: FlowModel) -> tuple[Place, ...]:
    """Where the cells of a sweep lie.

    Raises:
        UserError: their evaluation points could not be compared, or their prompts cannot be used.
        PrerequisiteError: the model or the reward's weights are missing.
    """
    found = []
    for cell in sweep.cells:
        prompts = open_prompts(cell.recipe, cell.recipe.prompts.validation)
        run = run_path(cell.recipe, workspace, expected_inputs(cell.recipe, model))
        found.append(Place(cell, run, validation_protocol(cell.recipe, model, prompts)))
    seen: dict[Path, str] = {}
    for place in found:
        same = seen.setdefault(place.run, place.cell.label)
        if same != place.cell.label:
            raise UserError(
                f"{same} and {place.cell.label} are one and the same training: what differs is nothing that the recipe"
                f" {sweep.recipe.name} learns from"
            )
    odd = [place.cell.label for place in found if place.protocol.measures != found[0].protocol.measures]
    if odd:
        raise UserError(
            f"the validation pictures of {odd[0]} are drawn or scored otherwise than those of {sweep.cells[0].label},"
            " so the cells could not be compared: sweep another key"
        )
    return tuple(found)


def reset(folder: Path) -> None:
    """Forget who took which cell in an earlier sitting; the runs stay."""
    with storage_errors(folder / STATES):
        if (folder / STATES).exists():
            shutil.rmtree(folder / STATES)
    make_folder(folder / STATES)


def outcome(folder: Path, number: int, place: Place) -> Outcome:
    """What cell ``number`` came to, by its file and its run."""
    path = folder / STATES / f"{number:03d}.json"
    if path.is_file():
        held = Outcome(**RunFolder(folder).read_json(f"{STATES}/{path.name}"))
        if held.state == "failed":
            return held
    if not place.finished:
        return Outcome("unfinished")
    return Outcome("ended early" if early_end(place.run) is not None else "finished")


def carry_out(
    taken: Sequence[Place], folder: Path, workspace: Path, reporter: Reporter, *, named: bool = False
) -> None:
    """Train every cell that is not finished and that no other process has taken.

    A cell that fails does not end the others. With ``named`` every line that is told names its cell. Raises
    Interrupted when the user stops it.
    """
    with StopFlag(on_request=lambda: reporter.say(STOPPING)) as stop:
        for number, place in enumerate(taken):
            stop.check("stopped between two cells; run the same command again to go on")
            if not _take(folder / STATES / f"{number:03d}.taken"):
                continue
            cell = place.cell
            told = f"cell {number + 1} of {len(taken)}"
            if named:
                reporter.prefix = f"[{cell.label}, seed {cell.seed}] "
            else:
                told += f": {cell.label}, seed {cell.seed}"
            if place.finished:
                reporter.say(f"{told}: was finished already ({place.run.name})")
                came_to = Outcome("finished")
            else:
                reporter.say(f"{told} ({place.run.name})")
                came_to = _train(place, workspace, reporter, stop)
                if came_to.state == "failed":
                    reporter.say(f"{told}: failed: {came_to.reason}")
            write_json(folder / STATES / f"{number:03d}.json", asdict(came_to))


def _take(path: Path) -> bool:
    """Be the one who makes the file."""
    try:
        with storage_errors(path):
            os.close(os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o644))
    except StoreError:
        if path.exists():
            return False
        raise
    return True


def _train(place: Place, workspace: Path, reporter: Reporter, stop: StopFlag) -> Outcome:
    try:
        if not place.trained:
            train.run(place.cell.recipe, workspace, reporter)
        if not place.finished:
            measure_end(place, reporter, stop)
    except StoreError as error:
        return Outcome("failed", printable(str(error)))  # it may name a folder whose name is no text
    except torch.OutOfMemoryError:
        return Outcome("failed", "the device's memory was not enough: set train.micro_batch, or lower k")
    return Outcome("finished")


def measure_end(place: Place, reporter: Reporter, stop: StopFlag) -> None:
    """Measure the last step of a run that was trained without evaluation points of the cell's protocol."""
    recipe = _at_the_end(place.cell.recipe)
    reporter.say("the run has no evaluation points of this protocol: its last step is measured now")
    folder, model = RunFolder(place.run), open_model(recipe)
    weights = evaluated_weights(folder, recipe)
    if weights is None:
        raise StoreError(f"the run {place.run} has no checkpoint: delete it and run the same command again")
    with folder.lock(), ExitStack() as stack:
        validation = Validation.open(recipe, model, open_engine(recipe), place.run, stack, stop=stop)
        stack.enter_context(applied(recipe, model, weights))
        validation.know_base(lambda: reference(model))
        for step, attached in ((0, reference(model)), (weights.step, nullcontext())):
            with attached:
                measured = validation.measure(step)
            if measured is not None:
                folder.append_metrics({"kind": "validation", "step": step, **measured[0]})


def _at_the_end(recipe: Recipe) -> Recipe:
    return recipe.model_copy(update={"eval": recipe.eval.model_copy(update={"checkpoint": "last"})})
