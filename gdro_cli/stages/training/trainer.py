"""One run's adapter, optimizer and averages, stepped, measured, saved and restored; wherever its gradients come from.

A training is a ``Trainer`` and a ``StepSource``: stored groups (``offline.GroupSteps``) or rounds of fresh images
(``online.OnlineSteps``) give the gradients, everything else is the same for all methods.
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from contextlib import ExitStack, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch

from gdro_cli.config.recipe import Recipe
from gdro_cli.config.sections import TrainSection
from gdro_cli.core.verdict import Verdict
from gdro_cli.errors import StoreError
from gdro_cli.files import storage_errors
from gdro_cli.models.adapters import Ema, attach_lora, load_lora_state, lora_state, reference, save_lora
from gdro_cli.models.base import FlowModel
from gdro_cli.rewards.pool import ScoringPool
from gdro_cli.runtime.checkpoint import (
    flatten_optimizer,
    latest_checkpoint,
    load_checkpoint,
    restore_optimizer,
    save_checkpoint,
)
from gdro_cli.runtime.distributed import Engine
from gdro_cli.runtime.interrupt import StopFlag
from gdro_cli.runtime.optimizer import make_optimizer
from gdro_cli.runtime.progress import Reporter
from gdro_cli.runtime.run import RunFolder
from gdro_cli.stages.evaluation.validation import PointGivenUp, Validation
from gdro_cli.stages.runs.finished_run import note_adapter
from gdro_cli.stages.runs.weights import (
    STOPPED,
    UNMEASURED,
    early_end,
    evaluated_weights,
    forget_best_after,
    keep_if_best,
)
from gdro_cli.stages.setup.rewards import measures, missing_limits

_COLLAPSE = "collapse"
"""In the state of a checkpoint where the training ended early: its step and the reasons."""


@dataclass(frozen=True, slots=True)
class StepGradient:
    """What is told about a gradient that now lies in the parameters."""

    metrics: Mapping[str, float]
    """Over all processes; ``loss`` is among them."""
    learns: bool = True
    """Whether there is a gradient at all; without one the weights, their average and the optimizer stay."""
    seconds: Mapping[str, float] = field(default_factory=dict)
    """Wall time spent before the step began, by what for: its share of work that several steps have in common."""


class StepSource(Protocol):
    """Where the gradients of a training come from."""

    @property
    def shown(self) -> Mapping[str, str]:
        """The few metrics that the progress line has room for, and their names there."""

    @property
    def remedy(self) -> str:
        """What to do when the loss is no number any more."""

    def open(self, stack: ExitStack, folder: RunFolder, ema: Ema) -> ScoringPool | None:
        """Begin, or go on: everything that ends with ``stack`` is started.

        Args:
            stack: of the training.
            folder: the run.
            ema: the adapter's average.

        Returns:
            Processes that score, if the source has some, for others to use, too.
        """

    def prepare(self, step: int, stop: StopFlag) -> bool:
        """Make what optimizer step ``step`` (from 0) needs; False if a stop was asked for before it was there."""

    def gradient(self, step: int) -> StepGradient:
        """Add this process's part of the gradient of the step to the parameters; the parts are summed later."""

    def can_go_on_after(self, steps: int) -> bool:
        """Whether a run that stopped after so many steps goes on as if it had not."""

    def needs_weights_of(self, steps: int) -> bool:
        """Whether what comes after so many steps is made with the weights of that moment: a checkpoint keeps them."""


def attach_adapter(recipe: Recipe, model: FlowModel) -> list[torch.nn.Parameter]:
    """Give the model the recipe's adapter, freshly initialised, and return its parameters."""
    lora = recipe.train.lora
    return attach_lora(
        model, rank=lora.rank, alpha=lora.alpha, targets=lora.targets, rslora=lora.rslora, seed=recipe.train_seed
    )


class Trainer:
    """Adapter, optimizer and averages of one run, stepped, saved and restored together."""

    def __init__(self, recipe: Recipe, model: FlowModel, source: StepSource, folder: RunFolder, engine: Engine) -> None:
        section = recipe.train
        self.recipe, self.model, self.source = recipe, model, source
        self.folder, self.engine = folder, engine
        self.parameters = attach_adapter(recipe, model)
        if section.gradient_checkpointing:
            model.transformer.enable_gradient_checkpointing()  # type: ignore[operator]
        self.optimizer = make_optimizer(
            section.optimizer,
            self.parameters,
            lr=section.lr,
            betas=section.adam_betas,
            weight_decay=section.weight_decay,
        )
        self.ema = Ema(self.parameters, section.ema.rate, section.ema.max_decay)
        self.step = 0
        self.collapse: dict[str, Any] | None = None
        """Where and why the training is to end early; known to the main process."""
        self.saved = -1
        """Step of the newest checkpoint."""
        self.unmeasured = False
        """Whether the evaluation point of the present step, which has a checkpoint, is still to be measured."""
        self.ended = False
        """Whether ``resume`` found that nothing is left to do."""
        self.best = -1
        """Step of the evaluation point whose weights were kept last, by the main process."""

    def update(self) -> tuple[StepGradient, float]:
        """One optimizer step; returns what its source tells, and the gradient's norm before clipping."""
        found, norm = self.source.gradient(self.step), 0.0
        if found.learns:
            self.engine.sum_gradients(self.parameters)
            norm = self.engine.clip(self.parameters, self.recipe.train.max_grad_norm)
            for group in self.optimizer.param_groups:
                group["lr"] = learning_rate(self.recipe.train, self.step)
            self.optimizer.step()
            self.optimizer.zero_grad(set_to_none=True)
            self.ema.update()
        self.step += 1
        return found, norm

    def validate(self, validation: Validation, reporter: Reporter) -> bool:
        """Measure an evaluation point, all processes together; the main one logs it and keeps the best weights.

        Returns whether the training is to end here: the recipe asks for it, and the pictures have collapsed.
        """
        validation.know_base(lambda: reference(self.model))
        with self.ema.applied() if self.recipe.eval.weights == "ema" else nullcontext():
            measured = validation.measure(self.step)
        ended = False
        with self.engine.together():
            if measured is not None:
                ended = self._conclude(*measured, validation, reporter)
        return self.engine.any(ended)

    def _conclude(
        self, row: dict[str, float | int | str], found: Verdict | None, validation: Validation, reporter: Reporter
    ) -> bool:
        """What the main process makes of an evaluation point; returns whether the training is to end here."""
        self.folder.append_metrics({"kind": "validation", "step": self.step, **row})
        numbers = {f"validation/{name}": value for name, value in row.items() if not isinstance(value, str)}
        self.engine.log(numbers, self.step)
        headline = measures(self.recipe)[0].name
        more = "".join(
            f" {name} {row[name]:.3f}," for name in (headline, "u", "corrected") if name in row and name != "reward"
        )
        reporter.say(
            f"step {self.step}: validation reward {row['reward']:.3f} [{row['low']:.3f}, {row['high']:.3f}],"
            f"{more} {row['images']} images" + ("" if found is None else f", {found.level}")
        )
        if self.step and not missing_limits(self.recipe).allow(row):
            reporter.say(
                f"step {self.step}: {row['failed']} pictures have no reward, {row.get('unjudged', 0)} no judgement,"
                " more than reward.max_failed_share or judge.max_failed_share: this point is no candidate for the best"
            )
        elif self.step:
            tensors = {"adapter": lora_state(self.model), "ema": self.ema.state()}
            measure = headline if validation.judges is None else "corrected"
            if keep_if_best(self.folder, {"step": self.step, **row}, measure=measure, tensors=tensors):
                self.best = self.step
        if not self.recipe.train.stop_on_collapse or found is None or found.level != "collapsed":
            return False
        self.collapse = {"step": self.step, "reasons": list(found.reasons)}
        reporter.say(f"step {self.step}: the training ends here, the pictures have collapsed: {found.reasons[0]}")
        return True

    def save(self) -> None:
        """Write a checkpoint of the present step, if it has none; all processes wait for it."""
        if self.saved == self.step:
            return
        with self.engine.together():
            if self.engine.is_main:
                self._write_checkpoint()
        self.saved = self.step

    def _write_checkpoint(self) -> None:
        """The checkpoint, with the adapter in diffusers' format beside it."""
        tensors, state = flatten_optimizer(self.optimizer)

        def add_adapters(folder: Path) -> None:
            save_lora(self.model, folder / "raw")
            with self.ema.applied():
                save_lora(self.model, folder / "ema")

        save_checkpoint(
            self.folder.path,
            self.step,
            tensors={"adapter": lora_state(self.model), "ema": self.ema.state(), "optimizer": tensors},
            state={"optimizer": state, **self._standing()},
            extra=add_adapters,
            keep=self.recipe.train.keep_checkpoints,
        )

    def _standing(self) -> dict[str, Any]:
        """What a later start must know of the present step beside its tensors."""
        known = {} if self.collapse is None else {_COLLAPSE: self.collapse}
        return {**known, UNMEASURED: True} if self.unmeasured else known

    def resume(self) -> int:
        """Restore the newest checkpoint, if there is one, in all processes, and return its step."""
        # One process looks: on a shared disk another might not see yet what the main one sees.
        path = self.engine.from_main(lambda: latest_checkpoint(self.folder.path))
        with self.engine.together():
            if path is not None:
                checkpoint = load_checkpoint(path, needed=("adapter", "ema", "optimizer"))
                self.step = self.saved = checkpoint.step
                self.collapse = checkpoint.state.get(_COLLAPSE)
                self.unmeasured = UNMEASURED in checkpoint.state
                load_lora_state(self.model, checkpoint.tensors["adapter"])
                self.ema.load(checkpoint.tensors["ema"])
                state = checkpoint.state.get("optimizer", {})
                restore_optimizer(self.optimizer, checkpoint.tensors["optimizer"], state)
            if self.engine.is_main:
                self.folder.truncate_metrics(-1 if path is None else self.step, unmeasured=self.unmeasured)
                forget_best_after(self.folder, self.step)
                self._note_end()
        over = self.step >= self.recipe.train.steps and not self.unmeasured
        self.ended = self.engine.from_main(lambda: over or early_end(self.folder.path) is not None)
        return self.step

    def end_early(self) -> None:
        """Note that and why the training has ended at the present step; all processes wait for it."""
        with self.engine.together():
            if self.engine.is_main:
                self._note_end()

    def _note_end(self) -> None:
        """Make the note of an early end agree with the newest checkpoint."""
        if self.collapse is not None:
            self.folder.write_json(STOPPED, self.collapse)
        elif early_end(self.folder.path) is None:
            with storage_errors(self.folder.path):
                (self.folder.path / STOPPED).unlink(missing_ok=True)

    def export(self) -> None:
        """Put the adapter that is evaluated where ``pipe.load_lora_weights(run)`` finds it, and say what it is."""
        weights = evaluated_weights(self.folder, self.recipe)
        if weights is None:
            return
        load_lora_state(self.model, weights.adapter)
        self.ema.load(weights.ema)
        with self.ema.applied() if self.recipe.eval.weights == "ema" else nullcontext():
            save_lora(self.model, self.folder.path)
        note_adapter(self.folder, self.recipe, self.model, weights)


def learning_rate(section: TrainSection, step: int) -> float:
    """Learning rate of step ``step`` (from 0)."""
    if step < section.warmup_steps:
        return section.lr * (step + 1) / section.warmup_steps
    course = (step - section.warmup_steps) / max(1, section.steps - section.warmup_steps)
    if section.lr_schedule == "linear":
        return section.lr * (1 - course)
    if section.lr_schedule == "cosine":
        return section.lr * 0.5 * (1 + math.cos(math.pi * course))
    return section.lr


def train_loop(trainer: Trainer, validation: Validation | None, reporter: Reporter, stop: StopFlag) -> None:
    """All remaining steps: get a gradient, one update, log; now and then validate and save."""
    section, engine, folder, source = trainer.recipe.train, trainer.engine, trainer.folder, trainer.source
    if trainer.ended:
        return
    if validation is not None and trainer.step == 0:
        _point(trainer, validation, reporter, safe=False)
    if trainer.unmeasured:
        ended = validation is not None and _point(trainer, validation, reporter, safe=True)
        trainer.unmeasured, trainer.saved = False, -1
        trainer.save()
        if ended:
            trainer.end_early()
            return
    due = False
    with reporter.track("training", total=section.steps, unit="steps", done=trainer.step) as progress:
        while trainer.step < section.steps:
            if not source.prepare(trainer.step, stop):
                if trainer.step:
                    trainer.save()
                engine.stop_together(_stopped(trainer))
            began = time.perf_counter()
            found, norm = trainer.update()
            step, last = trainer.step, trainer.step == section.steps
            loss = found.metrics["loss"]
            if not math.isfinite(loss) or not math.isfinite(norm):
                with engine.together():  # so that one of them says it
                    raise StoreError(
                        f"the loss became {loss} at step {step} of {folder.path}: {source.remedy};"
                        " the last checkpoint is kept"
                    )
            if engine.is_main and (step % section.log_every == 0 or last):
                _log(trainer, found, norm, seconds=time.perf_counter() - began)
            progress.advance(1, **{label: found.metrics[name] for name, label in source.shown.items()})
            point = validation is not None and (step % section.eval_every == 0 or last)
            safe = source.can_go_on_after(step)
            ended = point and validation is not None and _point(trainer, validation, reporter, safe=safe or last)
            asked = engine.hear(stop)
            due = due or step % section.checkpoint_every == 0 or source.needs_weights_of(step)
            due = due or (point and engine.any(trainer.best == step))  # so that a later start goes on from there
            if last or ended or (safe and (due or asked)):
                trainer.save()
                due = False
            if ended:
                trainer.end_early()  # only now that the step's checkpoint is there
                return
            if asked and (safe or last):
                engine.stop_together(_stopped(trainer))


def _point(trainer: Trainer, validation: Validation, reporter: Reporter, *, safe: bool) -> bool:
    """Measure an evaluation point; returns whether the training is to end here.

    One that is given up after a stop is left to the next start, which goes on from this step if that is ``safe``.

    Raises:
        Interrupted: it was given up.
        EndedElsewhere: the same; another process says it.
    """
    try:
        return trainer.validate(validation, reporter)
    except PointGivenUp as error:
        if safe:
            trainer.unmeasured = True
            trainer.save()
        trainer.engine.stop_together(_stopped(trainer) if safe else str(error))
        raise


def _stopped(trainer: Trainer) -> str:
    steps = trainer.recipe.train.steps
    return f"stopped after step {trainer.step} of {steps}; run the same command again to go on"


def _log(trainer: Trainer, found: StepGradient, norm: float, *, seconds: float) -> None:
    """Write the row of the step that was just taken."""
    numbers = {**found.metrics, "grad_norm": norm, "lr": trainer.optimizer.param_groups[0]["lr"]}
    known = {name: value for name, value in numbers.items() if math.isfinite(value)}
    times = {f"seconds_{name}": value for name, value in found.seconds.items()}
    times |= {"seconds_updates": seconds} if times else {}
    whole = seconds + sum(found.seconds.values())
    trainer.folder.append_metrics({"kind": "train", "step": trainer.step, **known, **times, "seconds": whole})
    trainer.engine.log(known, trainer.step)
