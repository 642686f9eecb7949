"""The result of a comparison of runs, and its tables for the terminal and the page."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from gdro_cli.core.sweeps import Spread
from gdro_cli.stages.comparison.matched_reward import POINT_VALUES, Gain, Matching
from gdro_cli.stages.comparison.seed_groups import SeedGroup
from gdro_cli.stages.evaluation.measures import CORRECTED_OF_MEANS
from gdro_cli.stages.reporting.number_format import MISSING, difference, interval, number

Table = tuple[list[str], list[list[str]]]
"""Columns and rows."""


@dataclass(frozen=True, slots=True)
class Comparison:
    """Several evaluated runs side by side, and the files that say so."""

    runs: tuple[str, ...]
    gains: tuple[Gain, ...]
    matching: Matching
    seed_groups: tuple[SeedGroup, ...]
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
    def measure_table(self) -> Table:
        """A row per measure and run: mean, and paired difference to the first run."""
        columns = ["measure", "run", "trained", f"difference to {self.runs[0]}", "prompts", "images"]
        return columns, [_gain_row(gain, is_first=gain.run == self.runs[0]) for gain in self.gains]

    @property
    def matched_table(self) -> Table:
        """A row per run: its evaluation point nearest to the matched reward."""
        rows = [
            [point.run, MISSING if point.step is None else str(point.step)]
            + [number(point.values[name]) for name in POINT_VALUES]
            + [point.verdict or MISSING]
            for point in self.matching.points
        ]
        return ["run", "step", *POINT_VALUES, "verdict"], rows

    @property
    def seed_group_table(self) -> Table:
        """A row per method: its held-out means over seeds, and its points at the matched reward."""
        held_out = (self.gains[0].measure, "u", "corrected", CORRECTED_OF_MEANS)
        matched = ("u", "corrected", CORRECTED_OF_MEANS)
        columns = ["method", "seeds", *held_out, "verdicts", *(f"{name}, matched" for name in matched)]
        rows = []
        for group in self.seed_groups:
            own = [over_seeds(group.trained.get(name)) for name in held_out]
            at_reward = [over_seeds(group.matched[name]) for name in matched]
            rows.append([group.name, str(len(group.runs)), *own, ", ".join(group.verdicts), *at_reward])
        return columns, rows

    @property
    def times_table(self) -> Table:
        """A row per method: minutes of sampling, scoring and updates, and to the matched reward."""
        columns = ["method", "sampling", "scoring", "updates", "whole training", "to matched reward", "runs there"]
        rows = []
        for group in self.seed_groups:
            costs = group.costs
            split = [None] * 4 if costs is None else [costs.sampling, costs.scoring, costs.updates, costs.total]
            reached = f"{group.reached} of {len(group.runs)}"
            rows.append([group.name, *map(_minutes, split), minutes_over_seeds(group.to_reward), reached])
        return columns, rows


def _gain_row(gain: Gain, *, is_first: bool) -> list[str]:
    counted = gain.trained if is_first else gain.difference
    shown = "(first run)" if is_first else difference(gain.difference)
    counts = ["0", "0"] if counted is None else [str(counted.prompts), str(counted.images)]
    return [gain.measure, gain.run, interval(gain.trained), shown, *counts]


def over_seeds(value: Spread | None) -> str:
    """Mean, and lowest and highest of several seeds."""
    if value is None:
        return MISSING
    return number(value.mean) + ("" if value.seeds == 1 else f" ({number(value.low)} to {number(value.high)})")


def _minutes(seconds: float | None) -> str:
    """Minutes with one decimal, two below ten."""
    if seconds is None:
        return MISSING
    return f"{seconds / 60:.2f}" if seconds < 600 else f"{seconds / 60:.1f}"


def minutes_over_seeds(value: Spread | None) -> str:
    """The same of seconds, as minutes."""
    if value is None:
        return MISSING
    ends = "" if value.seeds == 1 else f" ({_minutes(value.low)} to {_minutes(value.high)})"
    return _minutes(value.mean) + ends
