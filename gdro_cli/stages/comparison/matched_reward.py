"""Evaluated runs, what sets them apart, and where they stand at the same reward."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gdro_cli.core.costs import Batch
from gdro_cli.core.scores import Interval

POINT_VALUES = ("reward", "u", "corrected")
"""What is told of an evaluation point."""


@dataclass(frozen=True, slots=True)
class EvaluatedRun:
    """A run with its results."""

    name: str
    path: Path
    results: Mapping[str, Any]
    points: tuple[Mapping[str, Any], ...]
    """Its evaluation points, as metrics hold them, but for those of which too much is missing."""
    rows: tuple[Mapping[str, Any], ...]
    """Its training steps, as metrics hold them."""
    batches: tuple[Batch, ...] | None
    """The stores it learnt from; None where their times are not known."""
    settings: Mapping[str, Any]
    """The recipe it was made from; empty when it cannot be known."""
    left_out: tuple[int, ...] = ()
    """Steps of the evaluation points of which too much is missing."""


@dataclass(frozen=True, slots=True)
class Gain:
    """One measure of one run's trained model, and what sets it apart from the first run's."""

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
    """The sheet of pictures, relative to the run's folder."""


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

    Of several protocols that one counts which most runs share, and of these the first run's latest. Of two points as
    near the earlier is taken. By default the reward is the lowest of the runs' highest: all of them came that far.
    """
    measured = [[p for p in run.points if p.get("reward") is not None] for run in runs]
    shared = Counter(name for own in measured for name in {str(p["protocol"]) for p in own})
    order = [str(p["protocol"]) for own in measured for p in reversed(own)]
    protocol = max(order, key=lambda name: shared[name], default=None)
    if protocol is None or shared[protocol] < 2:
        why = "no two runs have evaluation points of one protocol, so none are matched"
        return Matching(None, None, tuple(_matched(run, None) for run in runs), why)
    points = [[p for p in own if p["protocol"] == protocol] for own in measured]
    # Not the untrained model, which is the same for all, unless a run has nothing else.
    points = [[p for p in own if p["step"]] or own for own in points]
    reward = min(max(float(p["reward"]) for p in own) for own in points if own) if at_reward is None else at_reward
    nearest = [min(own, key=lambda p: abs(float(p["reward"]) - reward)) if own else None for own in points]
    left = [run.name for run, own in zip(runs, points, strict=True) if not own]
    notes = [f"no evaluation points of this protocol: {', '.join(left)}"] if left else []
    notes += [
        f"left out of {run.name}, since too many pictures have no reward or judgement:"
        f" {'step' if len(run.left_out) == 1 else 'steps'} {', '.join(map(str, run.left_out))}"
        for run in runs
        if run.left_out
    ]
    return Matching(reward, protocol, tuple(map(_matched, runs, nearest)), "; ".join(notes))


def _matched(run: EvaluatedRun, point: Mapping[str, Any] | None) -> MatchedPoint:
    if point is None:
        return MatchedPoint(run.name, None, dict.fromkeys(POINT_VALUES), None, None)
    sheet = f"validation/step-{point['step']:06d}.png"
    values = {name: point.get(name) for name in POINT_VALUES}
    there = (run.path / sheet).is_file() and (run.path / sheet).resolve().is_relative_to(run.path.resolve())
    return MatchedPoint(run.name, point["step"], values, point.get("verdict"), sheet if there else None)
