"""What a comparison of runs consists of, and where the runs stand at the same reward."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from gdro_cli.core.scores import Interval
from gdro_cli.stages.pages import MISSING, change, interval, number

POINT_VALUES = ("reward", "u", "corrected")
"""What is told of an evaluation point."""


@dataclass(frozen=True, slots=True)
class EvaluatedRun:
    """A run with its results."""

    name: str
    path: Path
    results: Mapping[str, Any]
    points: tuple[Mapping[str, Any], ...]
    """Its evaluation points, as metrics hold them."""
    settings: Mapping[str, Any]
    """The recipe it was made from; empty when it cannot be known."""


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


@dataclass(frozen=True, slots=True)
class Comparison:
    """What ``compare`` found, and the files it wrote."""

    runs: tuple[str, ...]
    gains: tuple[Gain, ...]
    matching: Matching
    page: Path
    files: tuple[Path, ...]
    """The same as JSON and as CSV."""

    @property
    def summary(self) -> dict[str, str]:
        """What the command line shows beside the tables."""
        rows = {"runs": str(len(self.runs)), "differences": f"to {self.runs[0]}"}
        if self.matching.reward is not None:
            rows["matched reward"] = number(self.matching.reward)
        if self.matching.note:
            rows["note"] = self.matching.note
        return rows | {"page": str(self.page)} | {path.suffix[1:]: str(path) for path in self.files}

    @property
    def measure_table(self) -> tuple[list[str], list[list[str]]]:
        """Columns and rows: one row per measure and run, mean and paired difference to the first run."""
        columns = ["measure", "run", "trained", f"difference to {self.runs[0]}", "prompts", "images"]
        return columns, [_gain_row(gain, first=self.runs[0]) for gain in self.gains]

    @property
    def matched_table(self) -> tuple[list[str], list[list[str]]]:
        """Columns and rows: one row per run, its evaluation point nearest to the matched reward."""
        rows = [
            [point.run, MISSING if point.step is None else str(point.step)]
            + [number(point.values[name]) for name in POINT_VALUES]
            + [point.verdict or MISSING]
            for point in self.matching.points
        ]
        return ["run", "step", *POINT_VALUES, "verdict"], rows


def _gain_row(gain: Gain, *, first: str) -> list[str]:
    trained = None if gain.trained is None else asdict(gain.trained)
    difference = None if gain.difference is None else asdict(gain.difference)
    counted = gain.trained if gain.run == first else gain.difference
    shown = "(first run)" if gain.run == first else change(difference)
    counts = ["0", "0"] if counted is None else [str(counted.prompts), str(counted.images)]
    return [gain.measure, gain.run, interval(trained), shown, *counts]


def match(runs: Sequence[EvaluatedRun], *, at_reward: float | None) -> Matching:
    """Find each run's evaluation point nearest to a reward, among points of one protocol.

    Of several protocols that one counts which most runs share, and of these the first run's latest. Of two points as
    near the earlier is taken. By default the reward is the lowest of the runs' highest: all of them came that far.
    """
    held = [{str(p["protocol"]) for p in run.points if p.get("reward") is not None} for run in runs]
    shared = Counter(name for names in held for name in names)
    order = [str(p["protocol"]) for run in runs for p in reversed(run.points) if p.get("reward") is not None]
    protocol = max(order, key=lambda name: shared[name], default=None)
    if protocol is None or shared[protocol] < 2:
        why = "no two runs have evaluation points of one protocol, so none are matched"
        return Matching(None, None, tuple(_matched(run, None) for run in runs), why)
    points = [[p for p in run.points if p["protocol"] == protocol and p.get("reward") is not None] for run in runs]
    reward = min(max(float(p["reward"]) for p in own) for own in points if own) if at_reward is None else at_reward
    nearest = [min(own, key=lambda p: abs(float(p["reward"]) - reward)) if own else None for own in points]
    left = [run.name for run, own in zip(runs, points, strict=True) if not own]
    note = f"no evaluation points of this protocol: {', '.join(left)}" if left else ""
    return Matching(reward, protocol, tuple(map(_matched, runs, nearest)), note)


def _matched(run: EvaluatedRun, point: Mapping[str, Any] | None) -> MatchedPoint:
    if point is None:
        return MatchedPoint(run.name, None, dict.fromkeys(POINT_VALUES), None, None)
    sheet = f"validation/step-{point['step']:06d}.png"
    values = {name: point.get(name) for name in POINT_VALUES}
    there = (run.path / sheet).is_file()
    return MatchedPoint(run.name, point["step"], values, point.get("verdict"), sheet if there else None)
