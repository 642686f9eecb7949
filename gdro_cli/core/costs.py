"""What a training run has cost by one of its steps: wall time of sampling, of scoring and of updates.

Evaluation points do not count: the observer chooses how many there are, not the method. Rows are those of kind
``train`` in a run's metrics.
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


@dataclass(frozen=True, slots=True)
class Batch:
    """A store: images that were sampled and scored outside the optimizer steps, all at once."""

    step: int
    """After how many optimizer steps; 0 is before the first."""
    sampling: float
    """Seconds."""
    scoring: float
    """Seconds."""


def costs_until(step: int, rows: Iterable[Row], batches: Sequence[Batch]) -> Costs | None:
    """Return the costs of the first ``step`` optimizer steps and of every store that the last of them needed.

    A step that was not logged is assumed to cost the mean of the logged ones.

    Args:
        step: optimizer steps, 0 or more.
        rows: training rows with ``step``, ``seconds`` and, for methods that sample while they train,
            ``seconds_sampling``, ``seconds_scoring`` and ``seconds_updates``, whose sum is ``seconds``.
        batches: the stores that the run learnt from.

    Returns:
        None if ``step`` is above 0 and no row up to it has its time.
    """
    logged = [
        row for row in rows if row.get("kind") == "train" and row["step"] <= step and row.get("seconds") is not None
    ]
    if step > 0 and not logged:
        return None
    needed = [batch for batch in batches if batch.step < max(1, step)]

    def spent(seconds: Iterable[float]) -> float:
        return step * fmean(seconds) if step else 0.0

    return Costs(
        sampling=sum(batch.sampling for batch in needed) + spent(row.get("seconds_sampling", 0.0) for row in logged),
        scoring=sum(batch.scoring for batch in needed) + spent(row.get("seconds_scoring", 0.0) for row in logged),
        updates=spent(row.get("seconds_updates", row["seconds"]) for row in logged),
    )


def first_step_at(reward: float, points: Iterable[Row]) -> int | None:
    """Return the step of the earliest evaluation point with at least that reward; None if there is none."""
    steps = [int(row["step"]) for row in points if row.get("reward") is not None and float(row["reward"]) >= reward]
    return min(steps, default=None)
