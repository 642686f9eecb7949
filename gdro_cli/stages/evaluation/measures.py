"""The numbers of an evaluation: which ones a reward and a judge have, and their values with intervals."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, fields, replace

from gdro_cli.core.corrected import RewardAndQuality, corrected_of_means
from gdro_cli.core.measures import Measure
from gdro_cli.core.scores import Interval, Values, bootstrap_ci, paired_bootstrap
from gdro_cli.core.signals import ImageSignals
from gdro_cli.data.records import PromptRecord
from gdro_cli.data.scores import ScoreRow
from gdro_cli.errors import StoreError
from gdro_cli.rewards.base import UNIT, Reward
from gdro_cli.rewards.judge.base import AXES

CORRECTED = "corrected"
CORRECTED_OF_MEANS = "corrected of the means"
"""The other reading of the corrected score; nothing is decided by it."""
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
    names = (*(signal.name for signal in fields(ImageSignals)), *GROUP_SIGNALS, *reward.signals)
    return tuple(Measure(name, name) for name in names)


def other_measure(name: str) -> Measure:
    """The value of a reward that was not trained on: ``clip reward``. No reward has a detail with a space."""
    return Measure(f"{name} reward", f"{name} reward")


@dataclass(frozen=True, slots=True)
class CorrectedOfMeans(Measure):
    """The corrected score of the mean of ``reward`` and the mean u."""

    reward: Measure = field(kw_only=True)


def reported_measures(reward: Reward | type[Reward]) -> tuple[Measure, ...]:
    """What an evaluation reports of a reward and a judge, the headline first."""
    headline, quality = reward.measures[0], quality_measures(reward)
    of_means = [CorrectedOfMeans(CORRECTED_OF_MEANS, reward=headline)] if reward.scale == UNIT else []
    return (*reward.measures, *quality, *of_means)


def measure_of(name: str, reward: Reward | type[Reward]) -> Measure:
    """The measure of that name. A name that no measure has is a detail of scores."""
    by_name = {measure.name: measure for measure in reported_measures(reward)}
    return by_name.get(name) or Measure(name, name)


@dataclass(frozen=True, slots=True)
class Measured:
    """The values of one measure, as ``core.scores`` takes them."""

    values: Values
    """Of each prompt's images, in the store's order; None is missing."""
    strata: Sequence[str] | None
    """The tag of each prompt, where the measure is a mean of tags."""
    us: Values | None = None
    """u of the same images, where the measure is the corrected score of the means and ``values`` are rewards."""

    @property
    def complete(self) -> bool:
        """Whether there is a prompt and at least one value in every stratum, and u where it is needed."""
        strata = self.strata or [""] * len(self.values)
        scored = {name for name, row in zip(strata, self.values, strict=True) if _any(row)}
        return bool(strata) and scored == set(strata) and (self.us is None or any(map(_any, self.us)))

    def comparable(self, base: Measured) -> bool:
        """Whether some images, in every stratum, have what is needed on both sides."""
        us = None if self.us is None or base.us is None else _shared(self.us, base.us)
        return Measured(_shared(self.values, base.values), self.strata, us).complete

    def interval(self, *, samples: int) -> Interval:
        """Mean and bootstrap interval. Raises StoreError when nothing, or nothing of one tag, was scored."""
        try:
            if self.us is not None:
                return corrected_of_means(self._rewards_and_quality(self.us), samples=samples)
            return bootstrap_ci(self.values, strata=self.strata, samples=samples)
        except ValueError as error:
            raise _nothing_scored(error) from error

    def gain(self, base: Measured, *, samples: int) -> Interval:
        """Paired difference to ``base``. Raises StoreError when nothing, or nothing of one tag, was scored in both."""
        try:
            if self.us is not None and base.us is not None:
                own, other = self._rewards_and_quality(self.us), base._rewards_and_quality(base.us)
                return corrected_of_means(own, base=other, samples=samples)
            return paired_bootstrap(base.values, self.values, strata=self.strata, samples=samples)
        except ValueError as error:
            raise _nothing_scored(error) from error

    def _rewards_and_quality(self, us: Values) -> RewardAndQuality:
        return RewardAndQuality(self.values, us, self.strata)


def _any(values: Iterable[float | None]) -> bool:
    return any(value is not None for value in values)


def _shared(values: Values, others: Values) -> Values:
    """The values that are not missing on the other side."""
    return [
        [None if other is None else value for value, other in zip(row, other_row, strict=True)]
        for row, other_row in zip(values, others, strict=True)
    ]


def _nothing_scored(error: ValueError) -> StoreError:
    return StoreError(f"there is {error}: fix what the scores' reasons name, and score again")


def measured(measure: Measure, prompts: Sequence[PromptRecord], rows: Sequence[ScoreRow]) -> Measured:
    """The values of ``measure`` for those of ``prompts`` that it is about."""
    if isinstance(measure, CorrectedOfMeans):
        rewards, us = (measured(part, prompts, rows) for part in (measure.reward, Measure("u", "u")))
        return replace(rewards, us=us.values)
    chosen = [prompt for prompt in prompts if measure.tag is None or prompt.metadata.get("tag") == measure.tag]
    values: dict[str, list[float | None]] = {prompt.id: [] for prompt in chosen}
    for row in rows:
        if row.prompt_id in values:
            values[row.prompt_id].append(row.measured(measure.detail))
    strata = [str(prompt.metadata["tag"]) for prompt in chosen] if measure.by_tag else None
    return Measured(list(values.values()), strata)
