"""What a comparison of runs found, and its tables."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path

from gdro_cli.stages.comparison.matched_reward import POINT_VALUES, Gain, Matching
from gdro_cli.stages.comparison.seed_groups import Arm, arms_table, times_table
from gdro_cli.stages.reporting.html import MISSING, change, interval, number


@dataclass(frozen=True, slots=True)
class Comparison:
    """What ``compare`` found, and the files it wrote."""

    runs: tuple[str, ...]
    gains: tuple[Gain, ...]
    matching: Matching
    arms: tuple[Arm, ...]
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

    @property
    def arms_table(self) -> tuple[list[str], list[list[str]]]:
        """Columns and rows: one row per arm, over its training seeds."""
        return arms_table(self.arms, headline=self.gains[0].measure)

    @property
    def times_table(self) -> tuple[list[str], list[list[str]]]:
        """Columns and rows: one row per arm, minutes."""
        return times_table(self.arms)


def _gain_row(gain: Gain, *, first: str) -> list[str]:
    trained = None if gain.trained is None else asdict(gain.trained)
    difference = None if gain.difference is None else asdict(gain.difference)
    counted = gain.trained if gain.run == first else gain.difference
    shown = "(first run)" if gain.run == first else change(difference)
    counts = ["0", "0"] if counted is None else [str(counted.prompts), str(counted.images)]
    return [gain.measure, gain.run, interval(trained), shown, *counts]
