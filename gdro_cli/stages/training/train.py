"""Stage ``train``: make or open what a recipe's method learns from, train its adapter, and export it.

The gradients come from ``offline`` (stored groups), ``rounds`` (a new store now and then) or ``online`` (fresh images);
``trainer`` is the loop that uses them.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass

from gdro_cli.models.adapters import LORA_FILE
from gdro_cli.models.memory import checkpoint_blocks
from gdro_cli.runtime.checkpoint import checkpoint_step, latest_checkpoint
from gdro_cli.runtime.metrics import validation_rows
from gdro_cli.runtime.run import RunFolder
from gdro_cli.stages.evaluation.validation import Validation
from gdro_cli.stages.reporting.model_card import write_card
from gdro_cli.stages.runs.identity import find_run, open_run, run_path, runs_of_other_length
from gdro_cli.stages.runs.weights import ADAPTER_NOTE, STOPPED, best_folder, early_end, is_finished, refuse_repetition
from gdro_cli.stages.scoring.score import make_scored_store
from gdro_cli.stages.setup.session import Session
from gdro_cli.stages.training.ahead import check_ahead
from gdro_cli.stages.training.batch_sizes import check_shares
from gdro_cli.stages.training.offline import GroupSteps
from gdro_cli.stages.training.online import OnlineSteps
from gdro_cli.stages.training.rounds import RoundSteps
from gdro_cli.stages.training.state import TrainingState
from gdro_cli.stages.training.step_source import StepSource
from gdro_cli.stages.training.trainer import Trainer
from gdro_cli.stages.watching.watch import watched


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
        """What the command line prints."""
        last = latest_checkpoint(self.run.path)
        rows = {"run": str(self.run.path), "steps": str(self.steps if last is None else checkpoint_step(last))}
        if self.was_finished:
            rows["training"] = "was already finished"
        elif self.resumed_from:
            rows["training"] = f"continued from step {self.resumed_from}"
        points = validation_rows(self.run.metrics())
        points = [row for row in points if row.protocol == points[-1].protocol]
        for name in ("reward", "corrected"):
            if len(points) > 1 and points[-1].get(name) is not None:
                rows[f"validation {name}"] = f"{points[0][name]:.3f} -> {points[-1][name]:.3f}"
        best = latest_checkpoint(best_folder(self.run))
        if best is not None:
            step = checkpoint_step(best)
            verdict = next((row.verdict for row in points if row.step == step), None)
            bad = f", whose verdict is {verdict}" if verdict in ("suspicious", "collapsed") else ""
            rows["weights kept"] = f"those of step {step}, the best evaluation point{bad}"
        if early_end(self.run.path) is not None:
            rows["training"] = f"ended early, the images had collapsed ({STOPPED})"
        return rows | {"adapter": str(self.run.path / LORA_FILE)}


def run(session: Session, *, watch: bool = False) -> TrainResult:
    """Train the recipe's adapter; makes missing samples and scores first and resumes an interrupted run.

    Args:
        session: the job.
        watch: serve a page of the run meanwhile.

    Raises:
        UserError: the recipe cannot be trained on these prompts or in these processes.
        PrerequisiteError: the model or the reward engine is missing.
        StoreError: a store, score table, checkpoint or run is damaged or belongs to something else.
        Interrupted: stopped by the user after a checkpoint.
    """
    session.track()
    with session, _page(session) if watch else nullcontext():
        engine, recipe = session.engine, session.recipe
        finished = engine.from_main(lambda: _finished_run(session))
        if finished is not None and latest_checkpoint(finished.path) is None:
            return TrainResult(finished, recipe.train.steps, recipe.train.steps, was_finished=True)
        if finished is None:
            engine.from_main(lambda: check_ahead(session))
        source = open_source(session) if finished is None else None
        folder = engine.from_main(lambda: open_run(session))
        engine.start_trackers({"recipe": recipe.name, "run": folder.path.name, "seed": recipe.train_seed})
        with engine.held_by_main(folder.lock()), ExitStack() as stack:
            state = TrainingState(session, folder)
            checkpoint_blocks(session.model.transformer, float(recipe.train.gradient_checkpointing))
            start = state.resume()
            validation = None
            with engine.together():
                if source is not None and not state.finished:
                    pool = source.open(stack, folder, state.ema)
                    if recipe.train.eval_every:
                        validation = Validation.open(session, folder.path, stack, rewards=pool)
            if source is not None:
                Trainer(session, state, source, validation).train()
            with engine.together():
                if engine.is_main:
                    folder.write_json("resolved.json", recipe.resolved())
                    state.export()
                    write_card(folder.path)
        return TrainResult(folder, recipe.train.steps, start, state.finished)


@contextmanager
def _page(session: Session) -> Iterator[None]:
    """Serve the page of the recipe's run while the block runs, in the main process."""
    path = session.engine.from_main(lambda: run_path(session))
    with watched(path, session.reporter.say) if session.engine.is_main else nullcontext():
        yield


def _finished_run(session: Session) -> RunFolder | None:
    """The recipe's run, if it is finished: whatever of its store and scores is gone, nothing is made again."""
    folder = find_run(session)
    if folder is None:
        refuse_repetition(session)
        for other, steps in runs_of_other_length(session):
            if (other.path / ADAPTER_NOTE).is_file():
                session.reporter.say(
                    f"{other.path.name} is a finished run of this recipe with train.steps {steps}; another number"
                    " of steps makes another run, which begins at step 0"
                )
        return None
    return folder if is_finished(folder, session.recipe) else None


def open_source(session: Session) -> StepSource:
    """The source of the gradients, by the recipe's method; makes missing samples and scores."""
    with session.engine.together():
        if session.recipe.online_method is not None:
            return OnlineSteps(session)
        check_shares(session.recipe, session.engine.world)
    table, _ = make_scored_store(session)
    return GroupSteps(session, table) if session.recipe.train.rounds == 1 else RoundSteps(session, table)
