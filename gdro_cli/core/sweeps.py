"""The numbers of a sweep: curves over steps, peaks of runs, and means over seeds.

Points are the evaluation points of a run: they map ``step`` and names of measures to numbers, as in a run's metrics. A
point without a measure does not count for that measure; missing is not zero.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean

from gdro_cli.core.evaluation_points import MissingLimits, Point


@dataclass(frozen=True, slots=True)
class Spread:
    """Mean, lowest and highest of a number over the seeds of one setting."""

    mean: float
    low: float
    high: float
    seeds: int
    """Number of runs that have it."""


@dataclass(frozen=True, slots=True)
class CurvePoint:
    """A measure at one step."""

    step: int
    over_seeds: Spread


@dataclass(frozen=True, slots=True)
class RunFigures:
    """The points of one run that a table shows; None if the run has no such point."""

    final: Point | None
    """The last one after step 0."""
    peak_reward: Point | None
    """The one with the highest reward after step 0."""
    peak: Point | None
    """The one with the highest value of the deciding measure after step 0; of equal ones the earliest."""


def spread(values: Iterable[float | None]) -> Spread | None:
    """Return mean, lowest and highest of the values that are not None; None if all are.

    >>> spread([0.25, None, 0.75])
    Spread(mean=0.5, low=0.25, high=0.75, seeds=2)
    """
    present = [value for value in values if value is not None]
    return Spread(fmean(present), min(present), max(present), len(present)) if present else None


def curve(runs: Sequence[Sequence[Point]], measure: str) -> tuple[CurvePoint, ...]:
    """Return a measure over steps; at each step over the runs (one per seed) that have it."""
    points = [point for run in runs for point in run]
    steps = sorted({point["step"] for point in points})
    spreads = {step: spread(point.get(measure) for point in points if point["step"] == step) for step in steps}
    return tuple(CurvePoint(step, over_seeds) for step, over_seeds in spreads.items() if over_seeds is not None)


def figures(points: Sequence[Point], *, reward: str, measure: str, limits: MissingLimits) -> RunFigures:
    """Return the last point and the peaks of one run.

    Neither the untrained model, step 0, nor a point that lacks too many values can be a peak.

    Args:
        points: the run's evaluation points.
        reward: the measure that is the reward.
        measure: the deciding measure.
        limits: how many values a peak may lack.
    """
    trained = sorted((point for point in points if point["step"] > 0), key=lambda point: int(point["step"]))
    fair = [point for point in trained if limits.allow(point)]
    return RunFigures(
        final=trained[-1] if trained else None,
        peak_reward=_highest(fair, reward),
        peak=_highest(fair, measure),
    )


def best(settings: Mapping[str, Spread | None], *, seeds: int) -> tuple[str, ...]:
    """Return the settings with the highest mean, several if equal; a setting that lacks a seed does not compete."""
    means = {name: value.mean for name, value in settings.items() if value is not None and value.seeds == seeds}
    return tuple(name for name, mean in means.items() if mean == max(means.values()))


def training_seconds(rows: Iterable[Point], *, steps: int) -> float | None:
    """Return the wall time of a training run: the mean logged step times ``steps``, and the evaluation points.

    None without a logged step.
    """
    timed = [(row.get("kind"), float(row["seconds"])) for row in rows if row.get("seconds") is not None]
    logged = [seconds for kind, seconds in timed if kind == "train"]
    return fmean(logged) * steps + sum(s for kind, s in timed if kind == "validation") if logged else None


def _highest(points: Sequence[Point], measure: str) -> Point | None:
    measured = [point for point in points if point.get(measure) is not None]
    return max(measured, key=lambda point: float(point[measure]), default=None)
