"""Evaluated runs, how they differ, and their evaluation points at the same reward."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gdro_cli.core.corrected import corrected_score
from gdro_cli.core.costs import Batch
from gdro_cli.core.scores import Interval
from gdro_cli.rewards.registry import reward_class
from gdro_cli.runtime.metrics import TrainRow, ValidationRow
from gdro_cli.stages.evaluation.measures import CORRECTED_OF_MEANS
from gdro_cli.stages.reporting.image_sheet import point_sheet
from gdro_cli.stages.runs.results import Results

POINT_VALUES = ("reward", "u", "corrected", CORRECTED_OF_MEANS)
"""The values shown of an evaluation point."""


@dataclass(frozen=True, slots=True)
class EvaluatedRun:
    """A run with its results."""

    name: str
    path: Path
    results: Results
    points: tuple[ValidationRow, ...]
    """Its evaluation points, without those that miss too much."""
    steps: tuple[TrainRow, ...]
    """Its training steps."""
    batches: tuple[Batch, ...] | None
    """The stores that it learnt from; None where their times are unknown."""
    settings: Mapping[str, Any]
    """The recipe that it was made from; empty where it is unknown."""
    left_out: tuple[int, ...] = ()
    """Steps of the evaluation points that miss too much."""


@dataclass(frozen=True, slots=True)
class Gain:
    """One measure of one run's trained model, and its difference to the first run's."""

    measure: str
    run: str
    trained: Interval | None
    difference: Interval | None
    """Paired, this run - first run; None for the first run itself and where nothing can be paired."""


@dataclass(frozen=True, slots=True)
class MatchedPoint:
    """The evaluation point of a run whose reward is nearest to a given one; all None when the run has no point."""

    run: str
    step: int | None
    values: Mapping[str, float | None]
    """By ``POINT_VALUES``."""
    verdict: str | None
    sheet: str | None
    """The sheet of images, relative to the run's folder."""


@dataclass(frozen=True, slots=True)
class Matching:
    """Runs at the same reward."""

    reward: float | None
    """None where nothing can be matched."""
    protocol: str | None
    points: tuple[MatchedPoint, ...]
    note: str = ""
    """Why nothing is matched, or what to keep in mind."""


def match(runs: Sequence[EvaluatedRun], *, at_reward: float | None) -> Matching:
    """Find each run's evaluation point nearest to a reward, among points of one protocol, after its first step.

    Of several protocols the one counts that most runs share, and of these the first run's latest. Of two points that
    are equally near the earlier is taken. By default the reward is the lowest of the runs' highest: all runs got that
    far.
    """
    shared = Counter(protocol for run in runs for protocol in {point.protocol for point in run.points})
    latest_first = [point.protocol for run in runs for point in reversed(run.points)]
    protocol = max(latest_first, key=lambda name: shared[name], default=None)
    if protocol is None or shared[protocol] < 2:
        reason = "no two runs have evaluation points of one protocol, so none are matched"
        return Matching(None, None, tuple(_matched(run, None) for run in runs), reason)
    candidates = [[point for point in run.points if point.protocol == protocol] for run in runs]
    # The untrained model is the same for all runs, so it counts only where a run has nothing else.
    candidates = [[point for point in points if point.step] or points for points in candidates]
    highest = [max(point.reward for point in points) for points in candidates if points]
    reward = min(highest) if at_reward is None else at_reward
    nearest = [min(points, key=lambda point: abs(point.reward - reward), default=None) for points in candidates]
    return Matching(reward, protocol, tuple(map(_matched, runs, nearest)), "; ".join(_notes(runs, candidates, reward)))


def _notes(runs: Sequence[EvaluatedRun], candidates: Sequence[Sequence[ValidationRow]], reward: float) -> list[str]:
    of_runs = list(zip(runs, candidates, strict=True))
    without = [run.name for run, points in of_runs if not points]
    below = [run.name for run, points in of_runs if points and max(point.reward for point in points) < reward]
    notes = [f"no evaluation points of this protocol: {', '.join(without)}"] if without else []
    notes += [f"below this reward at all their points: {', '.join(below)}"] if below else []
    return notes + [
        f"left out of {run.name}, since too many images have no reward or judgement:"
        f" {'step' if len(run.left_out) == 1 else 'steps'} {', '.join(map(str, run.left_out))}"
        for run in runs
        if run.left_out
    ]


def _matched(run: EvaluatedRun, point: ValidationRow | None) -> MatchedPoint:
    if point is None:
        return MatchedPoint(run.name, None, dict.fromkeys(POINT_VALUES), None, None)
    headline = reward_class(run.results.task).measures[0].name
    values = {name: point.get(name) for name in POINT_VALUES}
    values[CORRECTED_OF_MEANS] = None if point.corrected is None else corrected_score(point.get(headline), point.u)
    return MatchedPoint(run.name, point.step, values, point.verdict, point_sheet(run.path, point.step))
