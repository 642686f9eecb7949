"""Runs that differ in their training seed alone count as one method: its means over seeds, and what it cost.

Times are wall times of sampling, scoring and updates, without evaluation points; see ``gdro_cli.core.costs``.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean

from gdro_cli.core.costs import Costs, costs_until, first_step_at
from gdro_cli.core.sweeps import Spread, spread
from gdro_cli.identity import digest
from gdro_cli.runtime.metrics import ValidationRow
from gdro_cli.stages.comparison.matched_reward import POINT_VALUES, EvaluatedRun, Gain, Matching
from gdro_cli.stages.reporting.charts import Banded


@dataclass(frozen=True, slots=True)
class SeedGroup:
    """Runs of one recipe, one per training seed."""

    name: str
    runs: tuple[str, ...]
    trained: Mapping[str, Spread | None]
    """Held-out means of the trained models, by measure."""
    verdicts: tuple[str, ...]
    """One per run."""
    matched: Mapping[str, Spread | None]
    """Values of the runs' points at the matched reward, by ``POINT_VALUES``."""
    costs: Costs | None
    """Of the whole training, mean over the runs; None where a run does not know its own."""
    reached: int
    """Runs with an evaluation point at the matched reward or above."""
    to_reward: Spread | None
    """Seconds until the first such point, over the runs that have one."""
    costs_to_reward: Costs | None
    """The same, split; mean over these runs."""
    curves: Mapping[str, tuple[Banded, ...]]
    """Reward and corrected score against minutes, at each step the runs' mean; empty where times are unknown."""


def group_seeds(runs: Sequence[EvaluatedRun], gains: Sequence[Gain], matching: Matching) -> tuple[SeedGroup, ...]:
    """Group the runs of a comparison, in the order of their first runs."""
    groups: dict[str, list[EvaluatedRun]] = {}
    for run in runs:
        groups.setdefault(_setting(run), []).append(run)
    names = Counter(members[0].results.recipe for members in groups.values())
    seed_groups = []
    for members in groups.values():
        first, recipe = members[0], members[0].results.recipe
        seed_groups.append(_group(recipe if names[recipe] == 1 else first.name, members, gains, matching))
    return tuple(seed_groups)


def _setting(run: EvaluatedRun) -> str:
    """What runs of one group share; a run whose recipe is unknown is a group of its own."""
    if not run.settings:
        return run.name
    train = run.settings.get("train", {})
    if isinstance(train, Mapping):
        train = {key: value for key, value in train.items() if key != "seed"}
    return digest([run.results.recipe, {**run.settings, "train": train}])


def _group(name: str, runs: Sequence[EvaluatedRun], gains: Sequence[Gain], matching: Matching) -> SeedGroup:
    members = {run.name for run in runs}
    means: dict[str, list[float | None]] = {}
    for gain in gains:
        if gain.run in members:
            means.setdefault(gain.measure, []).append(None if gain.trained is None else gain.trained.mean)
    matched = [point.values for point in matching.points if point.run in members and point.step is not None]
    first_steps = [(run, _first_step(run, matching)) for run in runs]
    to_reward = [_costs(run, step) for run, step in first_steps if step is not None]
    return SeedGroup(
        name=name,
        runs=tuple(run.name for run in runs),
        trained={measure: spread(values) for measure, values in means.items()},
        verdicts=tuple(run.results.verdict.level for run in runs),
        matched={value: spread(values.get(value) for values in matched) for value in POINT_VALUES},
        costs=mean_costs([_costs(run, max((row.step for row in run.steps), default=0)) for run in runs]),
        reached=len(to_reward),
        to_reward=spread(None if costs is None else costs.total for costs in to_reward),
        costs_to_reward=mean_costs(to_reward),
        curves={measure: _curve(runs, measure, matching.protocol) for measure in ("reward", "corrected")},
    )


def mean_costs(costs: Sequence[Costs | None]) -> Costs | None:
    """The mean of each kind; None if one is missing, or all are."""
    present = [one for one in costs if one is not None]
    if not present or len(present) < len(costs):
        return None
    return Costs(*(fmean(getattr(one, kind) for one in present) for kind in ("sampling", "scoring", "updates")))


def _costs(run: EvaluatedRun, step: int) -> Costs | None:
    return None if run.batches is None else costs_until(step, run.steps, run.batches)


def _points(run: EvaluatedRun, protocol: str | None) -> list[ValidationRow]:
    return [point for point in run.points if point.protocol == protocol]


def _first_step(run: EvaluatedRun, matching: Matching) -> int | None:
    """The step of the run's first point at the matched reward or above."""
    return None if matching.reward is None else first_step_at(matching.reward, _points(run, matching.protocol))


def _curve(runs: Sequence[EvaluatedRun], measure: str, protocol: str | None) -> tuple[Banded, ...]:
    pairs: dict[int, list[tuple[float, float]]] = {}
    for run in runs:
        for point in _points(run, protocol):
            costs, value = _costs(run, point.step), point.get(measure)
            if costs is not None and value is not None:
                pairs.setdefault(point.step, []).append((costs.total / 60.0, value))
    curve = []
    for _, at_step in sorted(pairs.items()):
        over_seeds = spread(value for _, value in at_step)
        if over_seeds is not None:
            curve.append(Banded(fmean(minutes for minutes, _ in at_step), over_seeds))
    return tuple(curve)
