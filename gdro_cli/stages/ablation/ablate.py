"""Stage ``ablate``: one key or a few, swept; every cell an ordinary training on one store of images.

Evaluation points are compared, measured on the validation prompts. An ablation never looks at the held-out prompts of
``gdro eval``, so a setting may be chosen by it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from gdro_cli.config.recipe import Recipe
from gdro_cli.config.sweep import Sweep
from gdro_cli.files import make_folder
from gdro_cli.runtime.lock import folder_lock
from gdro_cli.stages.ablation.images import draw_images
from gdro_cli.stages.ablation.report import write_files
from gdro_cli.stages.ablation.result import Ablation, collect
from gdro_cli.stages.ablation.trials import TrialRun, carry_out, free_devices, reset, trial_runs
from gdro_cli.stages.planning.dry_run import describe_store
from gdro_cli.stages.runs.identity import run_inputs
from gdro_cli.stages.scoring.score import make_scored_store
from gdro_cli.stages.setup.session import Session
from gdro_cli.stages.training.ahead import check_ahead


@dataclass(frozen=True, slots=True)
class AblationResult:
    """What ``gdro ablate`` found, and the files that say so."""

    ablation: Ablation
    page: Path
    files: tuple[Path, ...]

    @property
    def summary(self) -> dict[str, str]:
        """What the command line shows beside the tables."""
        finished = len(self.ablation.cells) - len(self.ablation.failed)
        rows = {"cells": f"{finished} of {len(self.ablation.cells)} finished", "report": str(self.page)}
        return rows | {path.suffix[1:]: str(path) for path in self.files}


def run(session: Session, sweep: Sweep, *, spread: Callable[[], None] | None = None) -> AblationResult:
    """Carry out every cell that is not finished, and report on all.

    Args:
        session: on the recipe that the cells share; the report goes into ``ablations/`` of its workspace.
        sweep: the cells.
        spread: carries out the cells in other processes (each by ``work``) and returns when they are done; by default
            this process carries them out, one after the other.

    Raises:
        UserError: the cells could not be compared.
        PrerequisiteError: the model or the reward engine is missing.
        StoreError: the store or its scores cannot be made, or another process is at work on the same ablation. A
            cell that fails does not raise: it is reported.
        Interrupted: stopped by the user; the same command continues.
    """
    folder, reporter = ablation_folder(sweep, session.workspace), session.reporter
    trials = trial_runs(session, sweep)
    make_folder(folder)
    with folder_lock(folder / "lock"), session:
        for note in sweep.notes:
            reporter.say(f"note: {note}")
        finished = sum(trial.finished for trial in trials)
        reporter.say(f"{len(trials)} cells, {finished} of them already finished; {folder}")
        reset(folder)
        if finished < len(trials):
            _make_stores(session, sweep, trials)
            free_devices()
        if spread is None or len(trials) - finished < 2:
            carry_out(session, trials, folder)
        else:
            spread()
        session.stop.check("stopped after the last cell; run the same command again for the report")
        ablation = collect(sweep, trials, folder)
        images = draw_images(session, ablation, folder)
        page, *files = write_files(ablation, images, folder)
    return AblationResult(ablation, page, tuple(files))


def work(session: Session, sweep: Sweep) -> None:
    """Carry out cells of an ablation that another process leads, until all are taken."""
    trials = trial_runs(session, sweep)
    with session:
        carry_out(session, trials, ablation_folder(sweep, session.workspace), named=True)


def ablation_folder(sweep: Sweep, workspace: Path) -> Path:
    """Folder of the report of a sweep; the same sweep has the same folder."""
    return workspace / "ablations" / sweep.name


def describe(session: Session, sweep: Sweep) -> tuple[list[tuple[str, str]], list[list[str]]]:
    """What ``run`` would do: lines about the whole, and a row per cell (values, seed, state, run). Makes nothing.

    Raises:
        UserError: the cells could not be compared, or prompts cannot be used.
        PrerequisiteError: the model is missing.
    """
    trials, recipe = trial_runs(session, sweep), session.recipe
    prompts = session.prompts("validation")
    images = len(prompts) * recipe.eval.validation_images_per_prompt
    folder = ablation_folder(sweep, session.workspace)
    rows = [("recipe", f"{recipe.name}, digest {recipe.digest()}"), ("report", str(folder))]
    for owner, labels in _stores(session, sweep):
        lines = dict(describe_store(session.part(owner, model=session.model)))
        of = "all cells" if len(labels) == len(sweep.labels) else "; ".join(labels)
        rows += [("store", lines["store"]), ("", of), ("", lines["samples"])]
    left = sum(max(0, trial.cell.recipe.train.steps - trial.step) for trial in trials if not trial.trained)
    rows += [
        ("cells", f"{len(trials)}, {sum(trial.finished for trial in trials)} of them finished"),
        ("training", f"{left} steps are left"),
        ("evaluation points", f"{len(prompts)} validation prompts, {images} images each"),
        *(("note", note) for note in sweep.notes),
    ]
    return rows, [[trial.cell.label, str(trial.cell.seed), _state(trial), trial.run.name] for trial in trials]


def _state(trial: TrialRun) -> str:
    if trial.finished:
        return "finished"
    if trial.trained:
        return "trained, its last point must still be measured"
    return f"step {trial.step} of {trial.cell.recipe.train.steps}" if trial.step else "not begun"


def _stores(session: Session, sweep: Sweep) -> list[tuple[Recipe, list[str]]]:
    """One recipe for each different store, with the combinations of values that share it; online methods have none."""
    owners: dict[str, tuple[Recipe, list[str]]] = {}
    for cell in sweep.cells:
        if cell.recipe.online_method is None:
            store = run_inputs(session.part(cell.recipe, model=session.model))["store"]
            _, labels = owners.setdefault(store, (cell.recipe, []))
            if cell.label not in labels:
                labels.append(cell.label)
    return list(owners.values())


def _make_stores(session: Session, sweep: Sweep, trials: Sequence[TrialRun]) -> None:
    """Sample and score what is missing, before the first training, for the cells that are left."""
    left = {trial.cell.label for trial in trials if not trial.trained}
    for trial in trials:
        if not trial.trained:
            check_ahead(session.part(trial.cell.recipe, model=session.model))
    stores = _stores(session, sweep)
    for number, (recipe, labels) in enumerate(stores, start=1):
        if not left.isdisjoint(labels):
            if len(stores) > 1:
                session.reporter.say(f"store {number} of {len(stores)}: {'; '.join(labels)}")
            with session.part(recipe) as part:
                make_scored_store(part)
