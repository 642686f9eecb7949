"""What a training has cost by one of its steps: wall time of sampling, of scoring and of updates.

Evaluation points are not counted: how many there are is the observer's choice, not the method's. Rows are those of
kind ``train`` in a run's metrics.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from statistics import fmean

from gdro_cli.core.evaluation_points import Point as Row


@dataclass(frozen=True, slots=True)
class Costs:
    """Seconds of wall time."""

    sampling: float
    scoring: float
    updates: float

    @property
    def total(self) -> float:
        """All three."""
        return self.sampling + self.scoring + self.updates

    def __add__(self, other: Costs) -> Costs:
        return Costs(self.sampling + other.sampling, self.scoring + other.scoring, self.updates + other.updates)


@dataclass(frozen=True, slots=True)
class Batch:
    """Images that were made and scored at once, outside of the optimizer steps: a store."""

    step: int
    """After how many optimizer steps; 0 is before the first."""
    sampling: float
    """Seconds."""
    scoring: float
    """Seconds."""


def costs_until(step: int, rows: Iterable[Row], batches: Sequence[Batch]) -> Costs | None:
    """Return the costs of the first ``step`` optimizer steps and of what had to be there before the last of them.

    Steps that were not logged are taken to cost the mean of those that were.

    Args:
        step: optimizer steps, 0 or more.
        rows: training rows with ``step``, ``seconds`` and, for methods that sample while they train,
            ``seconds_sampling``, ``seconds_scoring`` and ``seconds_updates``, whose sum is ``seconds``.
        batches: the stores that the training learnt from.

    Returns:
        None where steps were taken and none of them was logged with its time.
    """
    kept = [
        row for row in rows if row.get("kind") == "train" and row["step"] <= step and row.get("seconds") is not None
    ]
    made = Costs(
        sampling=sum(batch.sampling for batch in batches if batch.step < max(1, step)),
        scoring=sum(batch.scoring for batch in batches if batch.step < max(1, step)),
        updates=0.0,
    )
    if step == 0:
        return made
    if not kept:
        return None
    return made + Costs(
        sampling=step * fmean(float(row.get("seconds_sampling", 0.0)) for row in kept),
        scoring=step * fmean(float(row.get("seconds_scoring", 0.0)) for row in kept),
        updates=step * fmean(float(row.get("seconds_updates", row["seconds"])) for row in kept),
    )


def first_step_at(reward: float, points: Iterable[Row]) -> int | None:
    """Return the step of the earliest evaluation point with at least that reward; None where there is none."""
    steps = [int(row["step"]) for row in points if row.get("reward") is not None and float(row["reward"]) >= reward]
    return min(steps, default=None)
