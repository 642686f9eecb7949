"""The training loop, the same for every method. A ``StepSource`` gives the gradients; everything else is here.

The sources are stored groups (``offline.GroupSteps``), rounds of stored groups (``rounds.RoundSteps``) and rounds of
fresh images (``online.OnlineSteps``).
"""

from __future__ import annotations

import math
import time
from contextlib import suppress
from typing import Never

from gdro_cli.config.sections import TrainSection
from gdro_cli.core.verdict import Verdict
from gdro_cli.errors import StoreError
from gdro_cli.models.adapters import lora_state, reference
from gdro_cli.runtime.metrics import TrainRow, ValidationRow
from gdro_cli.stages.evaluation.measures import deciding_measure
from gdro_cli.stages.evaluation.validation import PointGivenUp, Validation
from gdro_cli.stages.reporting.image_sheet import point_sheet
from gdro_cli.stages.runs.weights import keep_if_best
from gdro_cli.stages.setup.reward import missing_limits
from gdro_cli.stages.setup.session import Session
from gdro_cli.stages.training.estimate import image_flops
from gdro_cli.stages.training.micro_batch import NotEnoughMemory
from gdro_cli.stages.training.state import TrainingState
from gdro_cli.stages.training.step_source import ResumePoint, StepAbandoned, StepGradient, StepSource


class Trainer:
    """Takes the steps of one run.

    Args:
        session: the job.
        state: adapter, optimizer and average, restored from the newest checkpoint.
        source: gives the gradients.
        validation: measures the evaluation points; None if the recipe has none.
    """

    def __init__(
        self, session: Session, state: TrainingState, source: StepSource, validation: Validation | None
    ) -> None:
        self.session, self.state, self.source, self.validation = session, state, source, validation
        self._checkpoint_due, self._saved_at = False, time.monotonic()
        engine = session.engine
        counts = engine.is_main and engine.device.type == "cuda" and not state.finished
        self._image_flops = image_flops(session.recipe, engine.world) if counts else None
        self._best = -1
        """Step of the best evaluation point, in the main process only."""

    def train(self) -> None:
        """Take all remaining steps.

        Raises:
            StoreError: the loss is no longer finite, or the run cannot be written to.
            Interrupted: stopped by the user after a checkpoint.
            EndedElsewhere: another process raised one of these.
        """
        state, source, steps = self.state, self.source, self.session.recipe.train.steps
        if state.finished or self._first_point():
            return
        with self.session.reporter.track("training", total=steps, unit="steps", done=state.step) as progress:
            while state.step < steps:
                if not source.prepare(state.step):
                    self._stop_before_step()
                try:
                    gradient = self._update()
                except StepAbandoned:
                    self._stop_before_step()
                progress.advance(1, **{label: gradient.metrics[key] for key, label in source.progress_metrics.items()})
                measure = self._is_point()
                collapsed = measure and self._measure_point()
                self._save_and_stop(measured=measure, collapsed=collapsed)
                if collapsed:
                    return

    # -- one step -----------------------------------------------------------------------------------------------

    def _update(self) -> StepGradient:
        """Take one optimizer step, check it and log it."""
        start, state = time.perf_counter(), self.state
        gradient = self._gradient()
        norm = state.update(learning_rate(self.session.recipe.train, state.step)) if gradient.learns else 0.0
        state.step += 1
        self._refuse_not_finite(gradient.metrics["loss"], norm)
        if self.session.engine.is_main and (self._is_last() or state.step % self.session.recipe.train.log_every == 0):
            self._log(gradient, norm, seconds=time.perf_counter() - start)
        return gradient

    def _gradient(self) -> StepGradient:
        """The step's gradient. Attempts for which memory was not enough leave nothing behind."""
        while True:
            with suppress(NotEnoughMemory):
                return self.source.gradient(self.state.step)
            self.state.optimizer.zero_grad(set_to_none=True)
            self.source.shrink()

    def _refuse_not_finite(self, loss: float, norm: float) -> None:
        if math.isfinite(loss) and math.isfinite(norm):
            return
        with self.session.engine.together():  # so that only one process reports it
            raise StoreError(
                f"the loss became {loss} at step {self.state.step} of {self.state.folder.path}: {self.source.remedy};"
                " the last checkpoint is kept"
            )

    def _log(self, gradient: StepGradient, norm: float, *, seconds: float) -> None:
        """Write the metrics of the last step."""
        numbers = {**gradient.metrics, "grad_norm": norm, "lr": self.state.optimizer.param_groups[0]["lr"]}
        peak = self.session.engine.peak_gigabytes()
        numbers |= {} if peak is None else {"gpu_peak_gb": peak}
        numbers |= self._speed(gradient, seconds)
        finite = {name: value for name, value in numbers.items() if math.isfinite(value)}
        times = {f"seconds_{name}": value for name, value in gradient.seconds.items()}
        times |= {"seconds_updates": seconds} if times else {}
        times["seconds"] = seconds + sum(gradient.seconds.values())
        self.state.folder.append_metrics(TrainRow.model_validate({"step": self.state.step, **finite, **times}))
        self.session.engine.log(finite, self.state.step)

    def _speed(self, gradient: StepGradient, seconds: float) -> dict[str, float]:
        """Images per second of all processes and, where operations are counted, TFLOP/s of each."""
        recipe = self.session.recipe
        images = gradient.metrics.get("images")
        if images is None:
            images = recipe.train.groups_per_step * recipe.group_method.k
        speed = {"images_per_second": images / seconds}
        if self._image_flops is not None:
            speed["tflops"] = self._image_flops * images / self.session.engine.world / seconds / 1e12
        return speed

    def _is_last(self) -> bool:
        return self.state.step == self.session.recipe.train.steps

    # -- checkpoints and stops ----------------------------------------------------------------------------------

    def _save_and_stop(self, *, measured: bool, collapsed: bool) -> None:
        """Write a checkpoint if one is due, and end if the images have collapsed or the user requests a stop.

        A checkpoint that is due waits for the next step from which a run can continue.
        """
        engine, state, last = self.session.engine, self.state, self._is_last()
        point = self.source.resume_point(state.step)
        stop = engine.hear(self.session.stop)
        due = self._checkpoint_due or point is ResumePoint.NEEDED
        due = due or state.step % self.session.recipe.train.checkpoint_every == 0
        minutes = self.session.recipe.train.checkpoint_minutes
        due = due or (minutes is not None and engine.any(time.monotonic() - self._saved_at > 60 * minutes))
        due = due or (measured and engine.any(self._best == state.step))  # a later start continues from the best point
        can_resume = point is not ResumePoint.NONE
        if last or collapsed or (can_resume and (due or stop)):
            state.save()
            due, self._saved_at = False, time.monotonic()
        self._checkpoint_due = due
        if collapsed:
            state.end_early()  # only now that the step has its checkpoint
        elif stop and (can_resume or last):
            self._stop()

    def _stop_before_step(self) -> Never:
        """Stop before a step whose images are not complete, or which was abandoned."""
        if self.state.step:
            self.state.save()
        self._stop()

    def _stop(self) -> Never:
        """Raise Interrupted in the main process and EndedElsewhere in the others."""
        self.session.engine.stop_together(
            f"stopped after step {self.state.step} of {self.session.recipe.train.steps}; run the same command again to"
            " continue"
        )

    # -- evaluation points --------------------------------------------------------------------------------------

    def _first_point(self) -> bool:
        """Measure the untrained model, or the point that a stop interrupted; returns whether the training ends."""
        state = self.state
        if state.step == 0 and self.validation is not None:
            self._measure_point()
        if not state.unmeasured:
            return False
        collapsed = self.validation is not None and self._measure_point()
        state.unmeasured, state.saved = False, -1
        state.save()
        if collapsed:
            state.end_early()
        return collapsed

    def _is_point(self) -> bool:
        every = self.session.recipe.train.eval_every
        return self.validation is not None and (self._is_last() or self.state.step % every == 0)

    def _measure_point(self) -> bool:
        """Measure an evaluation point, all processes together; the main one logs it and keeps the best weights.

        Returns whether the training ends here: the images have collapsed, and the recipe then ends it. If a stop
        interrupts the point and a run can continue from this step, the next start measures it.

        Raises:
            Interrupted: a stop interrupted the point.
            EndedElsewhere: the same, in the other processes.
        """
        validation, state = self.validation, self.state
        if validation is None:
            return False
        try:
            validation.know_base(lambda: reference(self.session.model))
            with state.evaluated():
                measured = validation.measure(state.step)
        except PointGivenUp as error:
            if state.step and (self._is_last() or self.source.resume_point(state.step) is not ResumePoint.NONE):
                state.unmeasured = True
                state.save()
                self._stop()
            self.session.engine.stop_together(str(error))
        collapsed = False
        with self.session.engine.together():
            if measured is not None:
                collapsed = self._conclude_point(*measured, validation)
        return self.session.engine.any(collapsed)

    def _conclude_point(self, row: ValidationRow, verdict: Verdict | None, validation: Validation) -> bool:
        """Log a measured point, in the main process; returns whether the training ends here."""
        state, step = self.state, self.state.step
        state.folder.append_metrics(row)
        self.session.engine.log({f"validation/{name}": value for name, value in row.numbers.items()}, step)
        if (sheet := point_sheet(state.folder.path, step)) is not None:
            self.session.engine.log_image("validation/images", state.folder.path / sheet, step)
        self.session.reporter.say(f"step {step}: {_point_text(self.session, row)}")
        if step:
            self._keep_if_best(row, validation)
        if not self.session.recipe.train.stop_on_collapse or verdict is None or verdict.level != "collapsed":
            return False
        state.collapse = {"step": step, "reasons": list(verdict.reasons)}
        self.session.reporter.say(
            f"step {step}: the training ends here, the images have collapsed: {verdict.reasons[0]}"
        )
        return True

    def _keep_if_best(self, row: ValidationRow, validation: Validation) -> None:
        state, recipe = self.state, self.session.recipe
        if not missing_limits(recipe).allow(row):
            self.session.reporter.say(
                f"step {state.step}: {row.failed} images have no reward and {row.unjudged or 0} no judgement,"
                " more than reward.max_failed_share or judge.max_failed_share: this point cannot be the best"
            )
            return
        measure = deciding_measure(self.session.reward, judged=validation.judges is not None)
        tensors = {"adapter": lora_state(self.session.model), "ema": state.ema.state()}
        if keep_if_best(state.folder, row, measure=measure, tensors=tensors):
            self._best = state.step


def _point_text(session: Session, row: ValidationRow) -> str:
    names = (session.reward.measures[0].name, "u", "corrected")
    shown = [(name, row.get(name)) for name in names if name != "reward"]
    more = "".join(f" {name} {value:.3f}," for name, value in shown if value is not None)
    verdict = f", {row.verdict}" if row.verdict else ""
    return f"validation reward {row.reward:.3f} [{row.low:.3f}, {row.high:.3f}],{more} {row.images} images{verdict}"


def learning_rate(section: TrainSection, step: int) -> float:
    """Learning rate of step ``step`` (from 0)."""
    if step < section.warmup_steps:
        return section.lr * (step + 1) / section.warmup_steps
    progress = (step - section.warmup_steps) / max(1, section.steps - section.warmup_steps)
    if section.lr_schedule == "linear":
        return section.lr * (1 - progress)
    if section.lr_schedule == "cosine":
        return section.lr * 0.5 * (1 + math.cos(math.pi * progress))
    return section.lr
