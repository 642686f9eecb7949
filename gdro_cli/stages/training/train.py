"""Stage ``train``: make or find what a recipe's method learns from, train its adapter, and export it.

Where the gradients come from: ``offline`` (stored groups), ``online`` (fresh images); how they are used: ``trainer``.
"""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

from gdro_cli.config.recipe import Recipe
from gdro_cli.models.base import FlowModel
from gdro_cli.runtime.checkpoint import latest_checkpoint, load_checkpoint
from gdro_cli.runtime.distributed import Engine
from gdro_cli.runtime.interrupt import STOPPING, StopFlag
from gdro_cli.runtime.progress import Reporter
from gdro_cli.runtime.run import RunFolder
from gdro_cli.stages.evaluation.validation import Validation
from gdro_cli.stages.reporting.model_card import write_card
from gdro_cli.stages.runs.identity import find_run, learnt_from, open_run, run_path
from gdro_cli.stages.runs.weights import STOPPED, best_folder, early_end
from gdro_cli.stages.setup.workspace import open_engine, open_model
from gdro_cli.stages.training.batch_sizes import check_shares
from gdro_cli.stages.training.offline import GroupSteps
from gdro_cli.stages.training.online import OnlineSteps
from gdro_cli.stages.training.rounds import RefreshedSteps
from gdro_cli.stages.training.trainer import StepSource, Trainer, attach_adapter, learning_rate, train_loop
from gdro_cli.stages.training.training_data import expected_inputs, make_inputs, run_inputs

__all__ = [
    "TrainResult",
    "attach_adapter",
    "find_run",
    "learning_rate",
    "learnt_from",
    "run",
    "run_inputs",
    "run_path",
]


@dataclass(frozen=True, slots=True)
class TrainResult:
    """A finished run."""

    run: RunFolder
    steps: int
    resumed_from: int
    was_finished: bool
    """Whether nothing was left to do."""

    @property
    def summary(self) -> dict[str, str]:
        """What the command line shows."""
        last = latest_checkpoint(self.run.path)
        step = self.steps if last is None else load_checkpoint(last).step
        rows = {"run": str(self.run.path), "steps": str(step)}
        if self.was_finished:
            rows["training"] = "was finished already"
        elif self.resumed_from:
            rows["training"] = f"continued from step {self.resumed_from}"
        points = [row for row in self.run.metrics() if row.get("kind") == "validation"]
        points = [row for row in points if row["protocol"] == points[-1]["protocol"]]
        for name in ("reward", "corrected"):
            if len(points) > 1 and name in points[-1]:
                rows[f"validation {name}"] = f"{points[0][name]:.3f} -> {points[-1][name]:.3f}"
        best = latest_checkpoint(best_folder(self.run))
        if best is not None:
            rows["weights kept"] = f"those of step {load_checkpoint(best).step}, the best evaluation point"
        if early_end(self.run.path) is not None:
            rows["training"] = f"ended early, the pictures had collapsed ({STOPPED})"
        rows["adapter"] = str(self.run.path / "pytorch_lora_weights.safetensors")
        return rows


def run(recipe: Recipe, workspace: Path, reporter: Reporter) -> TrainResult:
    """Train the adapter of ``recipe``; makes missing samples and scores first and resumes an interrupted run.

    Raises:
        UserError: the recipe cannot be trained as it is.
        PrerequisiteError: the model or the reward engine is missing.
        StoreError: a store, score table, checkpoint or run is damaged or belongs to something else.
        Interrupted: stopped by the user after a checkpoint.
    """
    engine = open_engine(recipe, trackers=recipe.train.trackers, out=workspace)
    with StopFlag(on_request=lambda: reporter.say(STOPPING)) as stop:
        model = open_model(recipe, engine=engine)
        source, inputs = _open_source(recipe, workspace, model, engine, reporter, stop)
        folder = engine.from_main(lambda: open_run(recipe, workspace, inputs))
        engine.start_trackers({"recipe": recipe.name, "run": folder.path.name, "seed": recipe.train_seed})
        with engine.held_by_main(folder.lock()):
            trainer = Trainer(recipe, model, source, folder, engine)
            start = trainer.resume()
            with ExitStack() as stack:
                left = not trainer.ended
                with engine.together():
                    pool = source.open(stack, folder, trainer.ema) if left else None
                    watch = left and recipe.train.eval_every > 0
                    validation = (
                        Validation.open(recipe, model, engine, folder.path, stack, stop=stop, rewards=pool)
                        if watch
                        else None
                    )
                train_loop(trainer, validation, reporter, stop)
            with engine.together():
                if engine.is_main:
                    folder.write_json("resolved.json", recipe.resolved())
                    trainer.export()
                    write_card(folder.path)
        engine.end()
    return TrainResult(folder, recipe.train.steps, start, trainer.ended)


def _open_source(
    recipe: Recipe, workspace: Path, model: FlowModel, engine: Engine, reporter: Reporter, stop: StopFlag
) -> tuple[StepSource, dict[str, str]]:
    """Where the gradients of the recipe's method come from, and the digests of what it learns from."""
    if recipe.online_method is not None:
        with engine.together():
            source = OnlineSteps(recipe, model, engine)
        return source, engine.from_main(lambda: expected_inputs(recipe, model))
    with engine.together():
        check_shares(recipe, engine.world)
    store, table = make_inputs(recipe, workspace, model, engine, reporter, stop)
    if recipe.train.rounds > 1:
        return RefreshedSteps(recipe, model, table, engine, reporter), run_inputs(store, table)
    return GroupSteps(recipe, model, table, engine, reporter), run_inputs(store, table)
