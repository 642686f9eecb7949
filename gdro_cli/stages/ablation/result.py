"""The result of an ablation: its cells, means over seeds, and which value is best."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from gdro_cli.config.sweep import Cell, Sweep
from gdro_cli.core.evaluation_points import Point
from gdro_cli.core.sweeps import CurvePoint, RunFigures, Spread, best, curve, figures, spread, training_seconds
from gdro_cli.runtime.checkpoint import checkpoint_step, latest_checkpoint
from gdro_cli.runtime.metrics import TrainRow, ValidationRow
from gdro_cli.runtime.progress import clock_time
from gdro_cli.runtime.run import RunFolder
from gdro_cli.stages.ablation.trials import TrialOutcome, TrialRun, read_outcome
from gdro_cli.stages.reporting.number_format import MISSING, number
from gdro_cli.stages.setup.reward import missing_limits, open_reward

FIGURES = ("final_reward", "peak_reward", "final_corrected", "peak_corrected", "final_u", "peak_u")
"""Numbers of a run, and as means over the seeds of a value. ``peak_u`` is u at the peak of the deciding measure."""


@dataclass(frozen=True, slots=True)
class CellResult:
    """One cell after the ablation."""

    cell: Cell
    run: Path
    outcome: TrialOutcome
    points: tuple[ValidationRow, ...]
    chosen: RunFigures
    values: Mapping[str, float | None]
    """By ``FIGURES``."""
    seconds: float | None
    """Wall time of the training."""

    @property
    def name(self) -> str:
        """Values and seed."""
        return f"{self.cell.label}, seed {self.cell.seed}"

    @property
    def verdicts(self) -> tuple[str | None, str | None]:
        """Of the last point, and of the point where the deciding measure is highest."""
        last, peak = (None if p is None else p.get("verdict") for p in (self.chosen.final, self.chosen.peak))
        return last, peak


@dataclass(frozen=True, slots=True)
class Ablation:
    """All cells, and what they show together."""

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
        return tuple(result for result in self.cells if result.outcome.state == "failed")

    def of(self, label: str) -> tuple[CellResult, ...]:
        """The cells of one combination of values, one per seed."""
        return tuple(result for result in self.cells if result.cell.label == label)

    def over_seeds(self, figure: str) -> dict[str, Spread | None]:
        """A number of ``FIGURES`` over the seeds of each combination of values; failed cells are left out."""
        return self._spreads(lambda result: result.values[figure])

    def deciding(self) -> dict[str, Spread | None]:
        """The peak of the deciding measure over the seeds of each combination of values."""
        return self._spreads(lambda result: _value(result.chosen.peak, self.measure))

    def _spreads(self, value: Callable[[CellResult], float | None]) -> dict[str, Spread | None]:
        return {
            label: spread(value(result) for result in self.of(label) if result.outcome.state != "failed")
            for label in self.sweep.labels
        }

    def best(self) -> tuple[str, ...]:
        """The combinations of values whose deciding measure is highest; more than one only if they are equal."""
        return best(self.deciding(), seeds=len(self.sweep.seeds))

    def curves(self, measure: str) -> dict[str, tuple[CurvePoint, ...]]:
        """A measure over steps, for each combination of values."""
        return {label: curve([result.points for result in self.of(label)], measure) for label in self.sweep.labels}

    def summary(self) -> str:
        """The result in one paragraph."""
        collapsed = [result.name for result in self.cells if "collapsed" in result.verdicts]
        failed = [result.name for result in self.failed]
        parts = (
            self._best_text(),
            self._others_text(),
            f"Collapsed: {'; '.join(collapsed)}." if collapsed else "No cell collapsed.",
            f"Failed: {'; '.join(failed)}." if failed else "",
            "A peak is the best of several points and was chosen on these validation prompts: measure the setting you"
            " choose on the held-out prompts with gdro eval.",
        )
        return " ".join(part for part in parts if part)

    def _best_text(self) -> str:
        what = "corrected score" if self.judged else f"{self.measure} (there is no judge, so no corrected score)"
        names, deciding, count = self.best(), self.deciding(), len(self.sweep.seeds)
        top = deciding[names[0]] if names else None
        if top is None:
            return f"No value has a {what} with every seed, so none is named best."
        peak = next(result.chosen.peak for result in self.of(names[0]) if result.chosen.peak is not None)
        how = f"the peak, mean of {count} seeds, {number(top.low)} to {number(top.high)}" if count > 1 else "peak"
        seeds = "" if count > 1 else "1 seed, "
        equal = ", equal" if len(names) > 1 else ""
        return (
            f"Best by {what} on the validation prompts: {' and '.join(names)}{equal}, with {number(top.mean)} ({how};"
            f" {seeds}{peak['prompts']} prompts, {peak['images']} images per point)."
            f"{self._doubts(names)}"
        )

    def _doubts(self, names: Sequence[str]) -> str:
        """A sentence about the best values whose peak is not healthy with every seed."""
        found = Counter(result.verdicts[1] for name in names for result in self.of(name) if result.verdicts[1])
        doubts = ", ".join(f"{found[verdict]} {verdict}" for verdict in ("suspicious", "collapsed") if found[verdict])
        return f" Look at its images first: of the verdicts there, {doubts}." if doubts else ""

    def _others_text(self) -> str:
        names = self.best()
        means = {name: over.mean for name, over in self.deciding().items() if over is not None and name not in names}
        ranked = sorted(means, key=lambda name: -means[name])
        return f"Then {'; '.join(f'{name} ({number(means[name])})' for name in ranked)}." if names and ranked else ""

    @property
    def cell_table(self) -> tuple[list[str], list[list[str]]]:
        """Columns and rows, one row per cell."""
        columns = [self.sweep.title, "seed", "state", f"last {self.reward}", f"peak {self.reward}"]
        columns += ["peak corrected", "u, last", "u, at peak"] if self.judged else []
        columns += [f"peak {self.measure}"] if self._decided_by_another else []
        columns += ["verdict, last", "verdict, at peak", "time"]
        return columns, [self._row(result) for label in self.sweep.labels for result in self.of(label)]

    @property
    def _decided_by_another(self) -> bool:
        """Whether the deciding measure is neither the corrected score nor the one shown as the reward."""
        return not self.judged and self.measure != self.reward

    def _row(self, result: CellResult) -> list[str]:
        chosen, values = result.chosen, result.values
        numbers = [number(values["final_reward"]), _at(chosen.peak_reward, self.reward)]
        if self.judged:
            numbers += [_at(chosen.peak, "corrected"), number(values["final_u"]), number(values["peak_u"])]
        if self._decided_by_another:
            numbers.append(_at(chosen.peak, self.measure))
        time = MISSING if result.seconds is None else clock_time(result.seconds)
        label = result.cell.label
        label = label if len(self.sweep.axes) > 1 else label.partition(" ")[2]
        verdicts = [verdict or MISSING for verdict in result.verdicts]
        return [label, str(result.cell.seed), result.outcome.state, *numbers, *verdicts, time]

    @property
    def seed_table(self) -> tuple[list[str], list[list[str]]]:
        """Columns and rows, one row per combination of values: means over seeds."""
        columns = {
            name.replace("_", " ").replace("final", "last").replace("reward", self.reward): self.over_seeds(name)
            for name in FIGURES
            if self.judged or name.endswith("_reward")
        }
        if self._decided_by_another:
            columns[f"peak {self.measure}"] = self.deciding()
        seeds = len(self.sweep.seeds)
        rows = [
            [label, *(_spread(column[label], of=seeds) for column in columns.values())] for label in self.sweep.labels
        ]
        return [self.sweep.title, *columns], rows


def collect(sweep: Sweep, trials: Sequence[TrialRun], folder: Path) -> Ablation:
    """Read the runs of all cells."""
    first = open_reward(sweep.recipe).measures[0].name
    points = [trial.points for trial in trials]
    judged = any(point.corrected is not None for own in points for point in own)
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
        outcome = read_outcome(folder, index, trial)
        cells.append(CellResult(trial.cell, trial.run, outcome, own, chosen, values, _seconds(trial)))
    return Ablation(sweep, tuple(cells), reward, measure, trials[0].protocol.measures)


def _seconds(trial: TrialRun) -> float | None:
    """Wall time of the training, with the evaluation points of the cell's own protocol."""
    if not (trial.run / "manifest.json").is_file():
        return None
    rows = RunFolder(trial.run).metrics()
    own = [row for row in rows if isinstance(row, TrainRow) or row.protocol == trial.protocol.points]
    return training_seconds(own, steps=trial.step)


def kept_step(result: CellResult) -> int | None:
    """Step of the weights that a cell's run stands for: its best point or its end, as the recipe says."""
    best_point = latest_checkpoint(result.run / "best") if result.cell.recipe.eval.checkpoint == "best" else None
    newest = best_point or latest_checkpoint(result.run)
    return None if newest is None else checkpoint_step(newest)


def _value(point: Point | None, name: str) -> float | None:
    return None if point is None else point.get(name)


def _at(point: Point | None, name: str) -> str:
    return MISSING if point is None else f"{number(point.get(name))} (step {point['step']})"


def _spread(over: Spread | None, *, of: int) -> str:
    if over is None:
        return MISSING
    fewer = "" if over.seeds == of else f", {over.seeds} of {of} seeds"
    return f"{number(over.mean)} [{number(over.low)}, {number(over.high)}]{fewer}"
