"""The arms of a comparison: runs that differ in their training seed alone count as one, and what each arm cost.

Times are wall times of sampling, scoring and updates, without evaluation points; see ``gdro_cli.core.costs``.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

from gdro_cli.core.costs import Costs, costs_until, first_step_at
from gdro_cli.core.sweeps import Spread, spread
from gdro_cli.identity import digest
from gdro_cli.stages.comparison.matched_reward import POINT_VALUES, EvaluatedRun, Gain, Matching
from gdro_cli.stages.reporting.charts import Banded
from gdro_cli.stages.reporting.html import MISSING, number


@dataclass(frozen=True, slots=True)
class Arm:
    """Runs of one recipe, one per training seed."""

    name: str
    runs: tuple[str, ...]
    trained: Mapping[str, Spread | None]
    """Held-out means of the trained models, by measure."""
    verdicts: tuple[str, ...]
    """One per run."""
    matched: Mapping[str, Spread | None]
    """What the runs' points at the matched reward hold, by ``POINT_VALUES``."""
    costs: Costs | None
    """Of the whole training, mean over the runs; None where a run does not know its own."""
    reached: int
    """Runs with an evaluation point at the matched reward or above."""
    to_reward: Spread | None
    """Seconds until the first such point, over the runs that have one."""
    costs_to_reward: Costs | None
    """The same, split; mean over these runs."""
    curves: Mapping[str, tuple[Banded, ...]]
    """Reward and corrected score against minutes, at each step the runs' mean; empty where times are not known."""


def arms(runs: Sequence[EvaluatedRun], gains: Sequence[Gain], matching: Matching) -> tuple[Arm, ...]:
    """Group the runs of a comparison, in the order of their first runs."""
    groups: dict[str, list[EvaluatedRun]] = {}
    for run in runs:
        groups.setdefault(_setting(run), []).append(run)
    names = Counter(str(own[0].results["recipe"]) for own in groups.values())
    found = []
    for own in groups.values():
        recipe = str(own[0].results["recipe"])
        found.append(_arm(recipe if names[recipe] == 1 else own[0].name, own, gains, matching))
    return tuple(found)


def _setting(run: EvaluatedRun) -> str:
    """What runs of one arm share; a run whose recipe cannot be known is an arm of its own."""
    if not run.settings:
        return run.name
    train = run.settings.get("train", {})
    if isinstance(train, Mapping):
        train = {key: value for key, value in train.items() if key != "seed"}
    return digest([run.results["recipe"], {**run.settings, "train": train}])


def _arm(name: str, runs: Sequence[EvaluatedRun], gains: Sequence[Gain], matching: Matching) -> Arm:
    members = [run.name for run in runs]
    measures = list(dict.fromkeys(gain.measure for gain in gains))
    means = {(g.measure, g.run): None if g.trained is None else g.trained.mean for g in gains}
    values = [point.values for point in matching.points if point.run in members and point.step is not None]
    whole = [_costs(run, max((int(row["step"]) for row in run.rows), default=0)) for run in runs]
    reached = [] if matching.reward is None else [_to_reward(run, matching) for run in runs]
    there = [each for each in reached if each is not None]
    return Arm(
        name=name,
        runs=tuple(members),
        trained={measure: spread(means.get((measure, run)) for run in members) for measure in measures},
        verdicts=tuple((run.results["verdict"] or {}).get("level", MISSING) for run in runs),
        matched={value: spread(each.get(value) for each in values) for value in POINT_VALUES},
        costs=mean_costs(whole),
        reached=len(there),
        to_reward=spread(None if costs is None else costs.total for _, costs in there),
        costs_to_reward=mean_costs([costs for _, costs in there]),
        curves={measure: _curve(runs, measure, matching.protocol) for measure in ("reward", "corrected")},
    )


def mean_costs(costs: Sequence[Costs | None]) -> Costs | None:
    """The mean of each kind; None if one is missing, or all are."""
    known = [each for each in costs if each is not None]
    if not known or len(known) < len(costs):
        return None
    return Costs(*(fmean(getattr(each, kind) for each in known) for kind in ("sampling", "scoring", "updates")))


def _costs(run: EvaluatedRun, step: int) -> Costs | None:
    return None if run.batches is None else costs_until(step, run.rows, run.batches)


def _points(run: EvaluatedRun, protocol: str | None) -> list[Mapping[str, Any]]:
    return [point for point in run.points if point["protocol"] == protocol]


def _to_reward(run: EvaluatedRun, matching: Matching) -> tuple[int, Costs | None] | None:
    """The step of the run's first point at the matched reward, and the costs until then."""
    if matching.reward is None:
        return None
    step = first_step_at(matching.reward, _points(run, matching.protocol))
    return None if step is None else (step, _costs(run, step))


def _curve(runs: Sequence[EvaluatedRun], measure: str, protocol: str | None) -> tuple[Banded, ...]:
    found: dict[int, list[tuple[float, float]]] = {}
    for run in runs:
        for point in _points(run, protocol):
            costs = _costs(run, int(point["step"]))
            if costs is not None and point.get(measure) is not None:
                found.setdefault(int(point["step"]), []).append((costs.total / 60.0, float(point[measure])))
    curve = []
    for _, pairs in sorted(found.items()):
        over_seeds = spread(value for _, value in pairs)
        if over_seeds is not None:
            curve.append(Banded(fmean(minutes for minutes, _ in pairs), over_seeds))
    return tuple(curve)


# -- as text ----------------------------------------------------------------------------------------------------------


def arms_table(found: Sequence[Arm], *, headline: str) -> tuple[list[str], list[list[str]]]:
    """Columns and rows: an arm each, with its held-out means and its points at the matched reward."""
    columns = ["method", "seeds", headline, "u", "corrected", "verdicts", "u, matched", "corrected, matched"]
    rows = []
    for arm in found:
        held_out = [over_seeds(arm.trained.get(name)) for name in (headline, "u", "corrected")]
        matched = [over_seeds(arm.matched[name]) for name in ("u", "corrected")]
        rows.append([arm.name, str(len(arm.runs)), *held_out, ", ".join(arm.verdicts), *matched])
    return columns, rows


def times_table(found: Sequence[Arm]) -> tuple[list[str], list[list[str]]]:
    """Columns and rows: an arm each, with minutes of sampling, scoring and updates, and to the matched reward."""
    columns = ["method", "sampling", "scoring", "updates", "whole training", "to matched reward", "runs there"]
    rows = []
    for arm in found:
        split = [None] * 4 if arm.costs is None else [*_split(arm.costs), arm.costs.total]
        reached = f"{arm.reached} of {len(arm.runs)}"
        rows.append([arm.name, *(minutes(each) for each in split), _to_reward_text(arm.to_reward), reached])
    return columns, rows


def _split(costs: Costs) -> list[float]:
    return [costs.sampling, costs.scoring, costs.updates]


def minutes(seconds: float | None) -> str:
    """Minutes with one decimal, two below ten."""
    if seconds is None:
        return MISSING
    return f"{seconds / 60:.2f}" if seconds < 600 else f"{seconds / 60:.1f}"


def _to_reward_text(value: Spread | None) -> str:
    if value is None:
        return MISSING
    ends = "" if value.seeds == 1 else f" ({minutes(value.low)} to {minutes(value.high)})"
    return minutes(value.mean) + ends


def over_seeds(value: Spread | None) -> str:
    """Mean, and lowest and highest of several seeds."""
    if value is None:
        return MISSING
    return number(value.mean) + ("" if value.seeds == 1 else f" ({number(value.low)} to {number(value.high)})")
