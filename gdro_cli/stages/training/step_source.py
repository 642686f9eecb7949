"""What a trainer needs of stored groups or fresh images: the gradients of its steps."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from enum import Enum
from typing import Protocol

from gdro_cli.models.adapters import Ema
from gdro_cli.rewards.pool import Pool
from gdro_cli.runtime.run import RunFolder


class ResumePoint(Enum):
    """Whether a run that stops after a step can continue as if it had not."""

    NONE = "none"
    """It cannot: what the next step needs would be lost."""
    POSSIBLE = "possible"
    """It can, from a checkpoint of that step."""
    NEEDED = "needed"
    """It can, and later steps depend on the weights of this one, so a checkpoint must keep them."""


class StepAbandoned(Exception):
    """The user asked to stop in the middle of a step. All processes raise it; the run continues before the step."""


@dataclass(frozen=True, slots=True)
class StepGradient:
    """What a step's gradient was like; the gradient itself is in the parameters."""

    metrics: Mapping[str, float]
    """Over all processes, with ``loss``."""
    learns: bool = True
    """Whether there is a gradient; without one the weights, their average and the optimizer stay the same."""
    seconds: Mapping[str, float] = field(default_factory=dict)
    """Wall time before the step, by purpose: its share of the work that several steps have in common."""


class StepSource(Protocol):
    """Where the gradients of a training come from."""

    @property
    def progress_metrics(self) -> Mapping[str, str]:
        """The few metrics that the progress line has room for, and their labels there."""

    @property
    def remedy(self) -> str:
        """What the user can do when the loss is no longer finite."""

    def open(self, stack: ExitStack, folder: RunFolder, ema: Ema) -> Pool | None:
        """Begin or continue; what this starts ends with ``stack``.

        Args:
            stack: of the training.
            folder: the run.
            ema: the adapter's average.

        Returns:
            Scoring processes that others may also use, if the source has any.
        """

    def prepare(self, step: int) -> bool:
        """Make what optimizer step ``step`` (from 0) needs; False if a stop was requested before it was complete."""

    def gradient(self, step: int) -> StepGradient:
        """Add this process's part of the gradient of the step to the parameters; the parts are summed later.

        Raises:
            StepAbandoned: the user asked to stop, and a run can continue before this step.
            NotEnoughMemory: in all processes; the step can be tried again after ``shrink``.
        """

    def shrink(self) -> None:
        """Take fewer images at once from here on."""

    def resume_point(self, steps: int) -> ResumePoint:
        """Whether a run that stops after ``steps`` steps can continue as if it had not."""
