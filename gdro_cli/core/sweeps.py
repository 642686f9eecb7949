"""What a sweep says in numbers: curves over steps, peaks of runs, and means over seeds.

Points are the evaluation points of a run: mappings with ``step`` and measures by name, as metrics hold them. A point
that lacks a measure is left out of what is said about it; missing is not zero.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean

from gdro_cli.core.evaluation_points import MissingLimits, Point


@dataclass(frozen=True, slots=True)
class Spread:
    """A number over the seeds of one setting: its mean, lowest and highest."""

    mean: float
    low: float
    high: float
    seeds: int
    """How many runs have the number."""


@dataclass(frozen=True, slots=True)
class CurvePoint:
    """A measure at one step."""

    step: int
    over_seeds: Spread


@dataclass(frozen=True, slots=True)
class RunFigures:
    """The points of one run that a table tells; None where the run has no such point."""

    final: Point | None
    """The last one after step 0."""
    peak_reward: Point | None
    """The one with the highest reward after step 0."""
    peak: Point | None
    """The one with the highest value of the deciding measure after step 0; of equal ones the earliest."""


def spread(values: Iterable[float | None]) -> Spread | None:
    """Mean, lowest and highest of the values that are there; None when none is.

    >>> spread([0.25, None, 0.75])
    Spread(mean=0.5, low=0.25, high=0.75, seeds=2)
    """
    there = [value for value in values if value is not None]
    return Spread(fmean(there), min(there), max(there), len(there)) if there else None


def curve(runs: Sequence[Sequence[Point]], measure: str) -> tuple[CurvePoint, ...]:
    """A measure over steps, at every step over those of the runs (one per seed) that have it there."""
    steps = sorted({point["step"] for points in runs for point in points})
    found = []
    for step in steps:
        here = [point.get(measure) for points in runs for point in points if point["step"] == step]
        over_seeds = spread(here)
        if over_seeds is not None:
            found.append(CurvePoint(step, over_seeds))
    return tuple(found)


def figures(points: Sequence[Point], *, reward: str, measure: str, limits: MissingLimits) -> RunFigures:
    """The last point and the peaks of one run; the untrained model, step 0, is no candidate for a peak, nor is a point
    of which too much is missing.

    Args:
        points: the run's evaluation points.
        reward: the measure that stands for the reward.
        measure: the deciding measure.
        limits: how much may be missing of a peak.
    """
    trained = sorted((point for point in points if point["step"] > 0), key=lambda point: int(point["step"]))
    fair = [point for point in trained if limits.allow(point)]
    return RunFigures(
        final=trained[-1] if trained else None,
        peak_reward=_highest(fair, reward),
        peak=_highest(fair, measure),
    )


def best(settings: Mapping[str, Spread | None], *, seeds: int) -> tuple[str, ...]:
    """The settings with the highest mean, several where they are equal; those that lack a seed are no candidates."""
    whole = {name: found.mean for name, found in settings.items() if found is not None and found.seeds == seeds}
    return tuple(name for name, mean in whole.items() if mean == max(whole.values()))


def training_seconds(rows: Iterable[Point], *, steps: int) -> float | None:
    """Wall time of a training: the mean of its logged steps times ``steps``, and the evaluation points; None without
    a logged step.
    """
    kept = [(row.get("kind"), float(row["seconds"])) for row in rows if row.get("seconds") is not None]
    logged = [seconds for kind, seconds in kept if kind == "train"]
    return fmean(logged) * steps + sum(s for kind, s in kept if kind == "validation") if logged else None


def _highest(points: Sequence[Point], measure: str) -> Point | None:
    there = [point for point in points if point.get(measure) is not None]
    return max(there, key=lambda point: float(point[measure])) if there else None
