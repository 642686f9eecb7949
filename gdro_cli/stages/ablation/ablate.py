"""Stage ``ablate``: one key or a few, swept; every cell an ordinary training on one store of images.

What is compared are evaluation points, measured on the validation prompts. The held-out prompts of ``gdro eval`` are
never looked at here, so that a setting may be chosen by an ablation.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from gdro_cli.config.recipe import Recipe
from gdro_cli.config.sweep import Sweep
from gdro_cli.files import make_folder
from gdro_cli.models.base import FlowModel
from gdro_cli.runtime.interrupt import STOPPING, StopFlag
from gdro_cli.runtime.lock import folder_lock
from gdro_cli.runtime.progress import Reporter
from gdro_cli.stages.ablation.pictures import draw_pictures
from gdro_cli.stages.ablation.report import write_files
from gdro_cli.stages.ablation.result import Ablation, collect
from gdro_cli.stages.ablation.trials import Place, carry_out, places, reset
from gdro_cli.stages.planning.dry_run import describe_store
from gdro_cli.stages.setup.workspace import open_engine, open_model, open_prompts
from gdro_cli.stages.training.training_data import expected_inputs, make_inputs


@dataclass(frozen=True, slots=True)
class AblationResult:
    """What ``gdro ablate`` found and where it lies."""

    found: Ablation
    page: Path
    files: tuple[Path, ...]

    @property
    def summary(self) -> dict[str, str]:
        """What the command line shows beside the tables."""
        finished = len(self.found.cells) - len(self.found.failed)
        rows = {"cells": f"{finished} of {len(self.found.cells)} finished", "report": str(self.page)}
        return rows | {path.suffix[1:]: str(path) for path in self.files}


def run(
    sweep: Sweep, workspace: Path, reporter: Reporter, *, spread: Callable[[], None] | None = None
) -> AblationResult:
    """Carry out every cell that is not finished, and report on all.

    Args:
        sweep: the cells.
        workspace: the folder of stores and runs; the report goes into ``ablations/`` there.
        reporter: where progress is told.
        spread: carries out the cells elsewhere (each process by ``work``) and returns when it is done; by default
            they are carried out here, one after the other.

    Raises:
        UserError: the cells could not be compared.
        PrerequisiteError: the model or the reward engine is missing.
        StoreError: the store or its scores cannot be made, or another process is at work on the same ablation. A
            cell that fails is no error here: it is reported.
        Interrupted: stopped by the user; the same command goes on.
    """
    folder = ablation_folder(sweep, workspace)
    found = _places(sweep, workspace)
    make_folder(folder)
    with folder_lock(folder / "lock"), StopFlag(on_request=lambda: reporter.say(STOPPING)) as stop:
        for note in sweep.notes:
            reporter.say(f"note: {note}")
        done = sum(place.finished for place in found)
        reporter.say(f"{len(found)} cells, {done} of them finished already; {folder}")
        reset(folder)
        if done < len(found):
            _make_stores(sweep, found, workspace, reporter, stop)
            _free_devices()
        if spread is None or len(found) - done < 2:
            carry_out(found, folder, workspace, reporter)
        else:
            spread()
        stop.check("stopped after the last cell; run the same command again for the report")
        ablation = collect(sweep, found, folder)
        pictures = draw_pictures(ablation, folder, reporter, stop)
        page, *files = write_files(ablation, pictures, folder)
    return AblationResult(ablation, page, tuple(files))


def work(sweep: Sweep, workspace: Path, reporter: Reporter) -> None:
    """Carry out cells of an ablation that another process leads, until none is left to take."""
    found = _places(sweep, workspace)
    _free_devices()
    carry_out(found, ablation_folder(sweep, workspace), workspace, reporter, named=True)


def ablation_folder(sweep: Sweep, workspace: Path) -> Path:
    """Where the report of a sweep goes; the same sweep has the same folder."""
    return workspace / "ablations" / sweep.name


def describe(sweep: Sweep, workspace: Path) -> tuple[list[tuple[str, str]], list[list[str]]]:
    """What ``run`` would do: lines about the whole, and a row per cell (values, seed, state, run). Makes nothing.

    Raises:
        UserError: the cells could not be compared, or prompts cannot be used.
        PrerequisiteError: the model is missing.
    """
    model = open_model(sweep.recipe)
    found = places(sweep, workspace, model)
    recipe = sweep.recipe
    prompts = open_prompts(recipe, recipe.prompts.validation)
    images = len(prompts) * recipe.eval.validation_images_per_prompt
    rows = [("recipe", f"{recipe.name}, digest {recipe.digest()}"), ("report", str(ablation_folder(sweep, workspace)))]
    for owner, labels in _stores(sweep, model):
        lines = dict(describe_store(owner, model, workspace))
        of = "all cells" if len(labels) == len(sweep.labels) else "; ".join(labels)
        rows += [("store", lines["store"]), ("", of), ("", lines["samples"])]
    trained = sum(max(0, place.cell.recipe.train.steps - place.step) for place in found if not place.trained)
    rows += [
        ("cells", f"{len(found)}, {sum(place.finished for place in found)} of them finished"),
        ("training", f"{trained} steps are left"),
        ("evaluation points", f"{len(prompts)} validation prompts, {images} images each"),
        *(("note", note) for note in sweep.notes),
    ]
    return rows, [[p.cell.label, str(p.cell.seed), _standing(p), p.run.name] for p in found]


def _standing(place: Place) -> str:
    if place.finished:
        return "finished"
    if place.trained:
        return "trained, its last point is to be measured"
    return f"step {place.step} of {place.cell.recipe.train.steps}" if place.step else "not begun"


def _places(sweep: Sweep, workspace: Path) -> tuple[Place, ...]:
    return places(sweep, workspace, open_model(sweep.recipe))


def _stores(sweep: Sweep, model: FlowModel) -> list[tuple[Recipe, list[str]]]:
    """One recipe for each different store, with the combinations of values that share it; online methods have none."""
    owners: dict[str, tuple[Recipe, list[str]]] = {}
    for cell in sweep.cells:
        if cell.recipe.online_method is not None:
            continue
        store = expected_inputs(cell.recipe, model)["store"]
        _, labels = owners.setdefault(store, (cell.recipe, []))
        if cell.label not in labels:
            labels.append(cell.label)
    return list(owners.values())


def _make_stores(sweep: Sweep, found: Sequence[Place], workspace: Path, reporter: Reporter, stop: StopFlag) -> None:
    """Sample and score what is missing, before the first training, for the cells that are left."""
    model = open_model(sweep.recipe)
    left = {place.cell.label for place in found if not place.trained}
    stores = _stores(sweep, model)
    for number, (recipe, labels) in enumerate(stores, start=1):
        if not left.isdisjoint(labels):
            if len(stores) > 1:
                reporter.say(f"store {number} of {len(stores)}: {'; '.join(labels)}")
            make_inputs(recipe, workspace, model, open_engine(recipe), reporter, stop)


def _free_devices() -> None:
    """Give back the memory of models that are no longer used: the cells may train elsewhere on the same device."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
