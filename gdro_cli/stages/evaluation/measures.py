"""The numbers of an evaluation: which ones a reward and a judge have, and their values with intervals."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, fields

from gdro_cli.core.measures import Measure
from gdro_cli.core.scores import Interval, bootstrap_ci, paired_bootstrap
from gdro_cli.core.signals import ImageSignals
from gdro_cli.data.records import PromptRecord
from gdro_cli.data.scores import ScoreRow
from gdro_cli.errors import StoreError
from gdro_cli.rewards.base import UNIT, Reward
from gdro_cli.rewards.judge.base import AXES

CORRECTED = "corrected"
GROUP_SIGNALS = ("diversity", "rank_disagreement")
"""Signals of reward hacking that a whole group has."""


def quality_measures(reward: Reward | type[Reward]) -> tuple[Measure, ...]:
    """What a judge adds to a reward's measures; the corrected score is made for rewards from 0 to 1."""
    corrected = Measure(CORRECTED, CORRECTED, by_tag=reward.measures[0].by_tag)
    return (
        *(Measure(axis, axis) for axis in AXES),
        Measure("u", "u"),
        *([corrected] if reward.scale == UNIT else []),
    )


def deciding_measure(reward: Reward, *, judged: bool) -> str:
    """What evaluation points are chosen by: the corrected score, or the headline where there is none."""
    return CORRECTED if judged and reward.scale == UNIT else reward.measures[0].name


def signal_measures(reward: Reward | type[Reward]) -> tuple[Measure, ...]:
    """The signals of reward hacking that a reward's images have."""
    names = (*(field.name for field in fields(ImageSignals)), *GROUP_SIGNALS, *reward.signals)
    return tuple(Measure(name, name) for name in names)


def measure_of(name: str, reward: Reward | type[Reward]) -> Measure:
    """The measure of that name. One that is not known is looked for among the details of scores."""
    known = {measure.name: measure for measure in (*reward.measures, *quality_measures(reward))}
    return known.get(name) or Measure(name, name)


@dataclass(frozen=True, slots=True)
class Measured:
    """The values of one measure, as ``core.scores`` takes them."""

    values: list[list[float | None]]
    """Of each prompt's images, in the store's order; None is missing."""
    strata: list[str] | None
    """The tag of each prompt, where the measure is a mean of tags."""

    def interval(self, *, samples: int) -> Interval:
        """Mean and bootstrap interval. Raises StoreError when nothing, or nothing of one tag, was scored."""
        try:
            return bootstrap_ci(self.values, strata=self.strata, samples=samples)
        except ValueError as error:
            raise _nothing_scored(error) from error

    def gain(self, base: Measured, *, samples: int) -> Interval:
        """Paired difference to ``base``. Raises StoreError when nothing, or nothing of one tag, was scored in both."""
        try:
            return paired_bootstrap(base.values, self.values, strata=self.strata, samples=samples)
        except ValueError as error:
            raise _nothing_scored(error) from error


def _nothing_scored(error: ValueError) -> StoreError:
    return StoreError(f"there is {error}: fix what the scores' reasons name, and score again")


def measured(measure: Measure, prompts: Iterable[PromptRecord], rows: Iterable[ScoreRow]) -> Measured:
    """The values of ``measure`` for those of ``prompts`` that it is about."""
    chosen = [prompt for prompt in prompts if measure.tag is None or prompt.metadata.get("tag") == measure.tag]
    values: dict[str, list[float | None]] = {prompt.id: [] for prompt in chosen}
    for row in rows:
        if row.prompt_id in values:
            values[row.prompt_id].append(row.measured(measure.detail))
    strata = [str(prompt.metadata["tag"]) for prompt in chosen] if measure.by_tag else None
    return Measured(list(values.values()), strata)
