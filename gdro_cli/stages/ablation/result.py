"""What an ablation found: its cells, means over seeds, and which value is best."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gdro_cli.config.sweep import Cell, Sweep
from gdro_cli.core.sweeps import CurvePoint, RunFigures, Spread, best, curve, figures, spread, training_seconds
from gdro_cli.runtime.checkpoint import checkpoint_step, latest_checkpoint
from gdro_cli.runtime.progress import clock_time
from gdro_cli.runtime.run import RunFolder
from gdro_cli.stages.ablation.trials import TrialOutcome, TrialRun, read_outcome
from gdro_cli.stages.reporting.html import MISSING, number
from gdro_cli.stages.setup.reward import missing_limits, open_reward

Point = Mapping[str, Any]
FIGURES: Mapping[str, str] = {
    "final_reward": "reward of the last point",
    "peak_reward": "highest reward",
    "final_corrected": "corrected score of the last point",
    "peak_corrected": "highest corrected score",
    "final_u": "u of the last point",
    "peak_u": "u where the deciding measure is highest",
}
"""Numbers that are told of a run, and as means over the seeds of a value."""


@dataclass(frozen=True, slots=True)
class CellResult:
    """One cell after the ablation."""

    cell: Cell
    run: Path
    outcome: TrialOutcome
    points: tuple[Point, ...]
    chosen: RunFigures
    values: Mapping[str, float | None]
    """By ``FIGURES``."""
    seconds: float | None
    """Wall time of the training."""

    @property
    def verdicts(self) -> tuple[str | None, str | None]:
        """Of the last point, and of the point where the deciding measure is highest."""
        last, peak = self.chosen.final, self.chosen.peak
        return None if last is None else last.get("verdict"), None if peak is None else peak.get("verdict")

    @property
    def collapsed(self) -> bool:
        """Whether the verdict on one of the two points is `collapsed`."""
        return "collapsed" in self.verdicts


@dataclass(frozen=True, slots=True)
class Ablation:
    """All cells, and what they say together."""

    sweep: Sweep
    cells: tuple[CellResult, ...]
    reward: str
    """The measure that stands for the reward: `reward`, or the task's headline measure where the cells are trained on
    different rewards."""
    measure: str
    """What decides: `corrected`, or the task's headline measure where there is no judge."""
    protocol: str
    """Digest of what all points share."""

    @property
    def judged(self) -> bool:
        """Whether there are corrected scores."""
        return self.measure == "corrected"

    @property
    def failed(self) -> tuple[CellResult, ...]:
        """The cells that could not be carried out."""
        return tuple(each for each in self.cells if each.outcome.state == "failed")

    def of(self, label: str) -> tuple[CellResult, ...]:
        """The cells of one combination of values, one per seed."""
        return tuple(each for each in self.cells if each.cell.label == label)

    def over_seeds(self, figure: str) -> dict[str, Spread | None]:
        """A number of ``FIGURES`` over the seeds of each combination of values; failed cells are left out."""
        return {
            label: spread(each.values[figure] for each in self.of(label) if each.outcome.state != "failed")
            for label in self.sweep.labels
        }

    def deciding(self) -> dict[str, Spread | None]:
        """The peak of the deciding measure over the seeds of each combination of values."""
        if self.judged:
            return self.over_seeds("peak_corrected")
        return {
            label: spread(
                None if each.chosen.peak is None else each.chosen.peak[self.measure]
                for each in self.of(label)
                if each.outcome.state != "failed"
            )
            for label in self.sweep.labels
        }

    def best(self) -> tuple[str, ...]:
        """The combinations of values whose deciding measure is highest; more than one only if they are equal."""
        return best(self.deciding(), seeds=len(self.sweep.seeds))

    def curves(self, measure: str) -> dict[str, tuple[CurvePoint, ...]]:
        """A measure over steps, for each combination of values."""
        return {label: curve([each.points for each in self.of(label)], measure) for label in self.sweep.labels}

    def summary(self) -> str:
        """What the ablation says, in one paragraph."""
        parts = [self._best_text(), self._others_text()]
        collapsed = [each for each in self.cells if each.collapsed]
        parts.append(f"Collapsed: {_named(collapsed)}." if collapsed else "No cell collapsed.")
        if self.failed:
            parts.append(f"Failed: {_named(self.failed)}.")
        parts.append(
            "A peak is the best of several points and was chosen on these validation prompts: measure the setting you"
            " choose on the held-out prompts with gdro eval."
        )
        return " ".join(part for part in parts if part)

    def _best_text(self) -> str:
        what = "corrected score" if self.judged else f"{self.measure} (there is no judge, so no corrected score)"
        names, over = self.best(), self.deciding()
        found = over[names[0]] if names else None
        if found is None:
            return f"No value has a {what} with every seed, so none is named best."
        peak = next(each.chosen.peak for each in self.of(names[0]) if each.chosen.peak is not None)
        count = len(self.sweep.seeds)
        how = f"the peak, mean of {count} seeds, {number(found.low)} to {number(found.high)}" if count > 1 else "peak"
        seeds = "" if count > 1 else "1 seed, "
        equal = ", equal" if len(names) > 1 else ""
        return (
            f"Best by {what} on the validation prompts: {' and '.join(names)}{equal}, with {number(found.mean)} ({how};"
            f" {seeds}{peak['prompts']} prompts, {peak['images']} images per point)."
        )

    def _others_text(self) -> str:
        names = self.best()
        rest = {k: v.mean for k, v in self.deciding().items() if v is not None and k not in names}
        ranked = sorted(rest, key=lambda name: -rest[name])
        return f"Then {'; '.join(f'{name} ({number(rest[name])})' for name in ranked)}." if names and ranked else ""

    @property
    def cell_table(self) -> tuple[list[str], list[list[str]]]:
        """Columns and rows, one row per cell."""
        columns = [self.sweep.title, "seed", "state", f"last {self.reward}", f"peak {self.reward}"]
        columns += ["peak corrected", "u, last", "u, at peak"] if self.judged else []
        columns += [f"peak {self.measure}"] if self._decided_by_another else []
        columns += ["verdict, last", "verdict, at peak", "time"]
        return columns, [self._row(each) for label in self.sweep.labels for each in self.of(label)]

    @property
    def _decided_by_another(self) -> bool:
        """Whether what decides is neither the corrected score nor what is shown as the reward."""
        return not self.judged and self.measure != self.reward

    def _row(self, each: CellResult) -> list[str]:
        chosen = each.chosen
        last, peak = each.verdicts
        numbers = [number(each.values["final_reward"]), _at(chosen.peak_reward, self.reward)]
        if self.judged:
            numbers += [_at(chosen.peak, "corrected")]
            numbers += [number(each.values["final_u"]), number(each.values["peak_u"])]
        if self._decided_by_another:
            numbers.append(_at(chosen.peak, self.measure))
        time = MISSING if each.seconds is None else clock_time(each.seconds)
        values = each.cell.label if len(self.sweep.axes) > 1 else each.cell.label.partition(" ")[2]
        return [values, str(each.cell.seed), each.outcome.state, *numbers, last or MISSING, peak or MISSING, time]

    @property
    def seed_table(self) -> tuple[list[str], list[list[str]]]:
        """Columns and rows, one row per combination of values: means over seeds."""
        names = [name for name in FIGURES if self.judged or name.endswith("_reward")]
        found = {name: self.over_seeds(name) for name in names}
        heads = [name.replace("_", " ").replace("final", "last").replace("reward", self.reward) for name in names]
        if self._decided_by_another:
            found["deciding"] = self.deciding()
            heads.append(f"peak {self.measure}")
        rows = [
            [label, *(_spread(values[label], of=len(self.sweep.seeds)) for values in found.values())]
            for label in self.sweep.labels
        ]
        return [self.sweep.title, *heads], rows


def collect(sweep: Sweep, trials: tuple[TrialRun, ...], folder: Path) -> Ablation:
    """Read the runs of all cells."""
    first = open_reward(sweep.recipe).measures[0].name
    points = [trial.points for trial in trials]
    judged = any("corrected" in point for own in points for point in own)
    measure = "corrected" if judged else first
    reward = first if sweep.trains_on_another else "reward"
    cells = []
    for index, (trial, own) in enumerate(zip(trials, points, strict=True)):
        chosen = figures(own, reward=reward, measure=measure, limits=missing_limits(sweep.recipe))
        values = {
            "final_reward": _value(chosen.final, reward),
            "peak_reward": _value(chosen.peak_reward, reward),
            "final_corrected": _value(chosen.final, "corrected"),
            "peak_corrected": _value(chosen.peak, "corrected"),
            "final_u": _value(chosen.final, "u"),
            "peak_u": _value(chosen.peak, "u"),
        }
        rows = RunFolder(trial.run).metrics() if (trial.run / "manifest.json").is_file() else []
        own_rows = [row for row in rows if row["kind"] == "train" or row.get("protocol") == trial.protocol.points]
        seconds = training_seconds(own_rows, steps=trial.step)
        outcome = read_outcome(folder, index, trial)
        cells.append(CellResult(trial.cell, trial.run, outcome, own, chosen, values, seconds))
    return Ablation(sweep, tuple(cells), reward, measure, trials[0].protocol.measures)


def kept_step(each: CellResult) -> int | None:
    """Step of the weights that a cell's run stands for: its best point or its end, as the recipe says."""
    best_point = latest_checkpoint(each.run / "best") if each.cell.recipe.eval.checkpoint == "best" else None
    newest = best_point or latest_checkpoint(each.run)
    return None if newest is None else checkpoint_step(newest)


def _value(point: Point | None, name: str) -> float | None:
    return None if point is None or point.get(name) is None else float(point[name])


def _at(point: Point | None, name: str) -> str:
    return MISSING if point is None else f"{number(_value(point, name))} (step {point['step']})"


def _spread(found: Spread | None, *, of: int) -> str:
    if found is None:
        return MISSING
    fewer = "" if found.seeds == of else f", {found.seeds} of {of} seeds"
    return f"{number(found.mean)} [{number(found.low)}, {number(found.high)}]{fewer}"


def _named(cells: tuple[CellResult, ...] | list[CellResult]) -> str:
    return "; ".join(f"{each.cell.label}, seed {each.cell.seed}" for each in cells)
