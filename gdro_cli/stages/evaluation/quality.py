"""Everything measured in a model's images, in one place: reward, axes, u, corrected score, signals; and the verdict.

Rows are score rows whose details have all numbers by name, so every number gets its interval in the same way.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import groupby

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from gdro_cli.core.corrected import corrected_score
from gdro_cli.core.measures import Measure
from gdro_cli.core.signals import group_diversity, image_signals, rank_disagreement
from gdro_cli.core.verdict import Change, Verdict, verdict
from gdro_cli.data.records import PromptRecord
from gdro_cli.data.scores import ScoreRow, ScoreTable
from gdro_cli.rewards.base import UNIT, Reward
from gdro_cli.rewards.judge.base import AXES
from gdro_cli.stages.evaluation.measures import (
    GROUP_SIGNALS,
    Measured,
    measured,
    other_measure,
    quality_measures,
    signal_measures,
)
from gdro_cli.stages.reporting.image_sheet import decoded


@dataclass(frozen=True, slots=True)
class Rated:
    """Everything measured in one model's images."""

    prompts: tuple[PromptRecord, ...]
    rows: tuple[ScoreRow, ...]
    """One per image, prompt by prompt."""
    groups: Mapping[str, Mapping[str, float | None]]
    """The group signals of each prompt, by its id."""
    judged: bool

    def values(self, measure: Measure) -> Measured:
        """The values of one measure."""
        if isinstance(measure.detail, str) and measure.detail in GROUP_SIGNALS:
            return Measured([[self.groups[prompt.id][measure.detail]] for prompt in self.prompts], None)
        return measured(measure, self.prompts, self.rows)

    @property
    def failed(self) -> int:
        """Images without a reward."""
        return sum(row.value is None for row in self.rows)

    @property
    def unjudged(self) -> int:
        """Images without u, where there is a judge."""
        return sum(row.details.get("u") is None for row in self.rows) if self.judged else 0


def rate_tables(
    reward: Reward, rewards: ScoreTable, judgements: ScoreTable | None, others: Mapping[str, ScoreTable]
) -> Rated:
    """Put a store's tables together, and measure the signals of its images.

    The value of another reward is the detail that ``other_measure`` names.
    """
    rows: list[ScoreRow] = []
    shards = range(len(rewards.store.shards))
    for number in shards:
        scored = rewards.read_shard(number)
        judged: Sequence[ScoreRow | None] = judgements.read_shard(number) if judgements else [None] * len(scored)
        shard = [joined(reward, row, judgement) for row, judgement in zip(scored, judged, strict=True)]
        for name, table in others.items():
            values = (other.value for other in table.read_shard(number))
            key = other_measure(name).name
            shard = [
                replace(row, details={**row.details, key: value}) for row, value in zip(shard, values, strict=True)
            ]
        rows += shard
    images = (decoded(stored.path) for number in shards for stored in rewards.store.images(number))
    return rate(reward, rewards.store.prompts, rows, images, judged=judgements is not None)


def rate(
    reward: Reward,
    prompts: Sequence[PromptRecord],
    rows: Sequence[ScoreRow],
    images: Iterable[Image.Image | None],
    *,
    judged: bool,
) -> Rated:
    """Add the signals of the i-th image to ``rows[i]``; None is an image that cannot be decoded.

    Only the images of one prompt are in memory at a time.

    Raises:
        ValueError: the rows of a prompt are not side by side, or there are not as many images as rows.
    """
    all_rows: list[ScoreRow] = []
    groups: dict[str, dict[str, float | None]] = {}
    headline = reward.measures[0].detail
    for prompt_id, group in groupby(zip(rows, images, strict=True), key=lambda pair: pair[0].prompt_id):
        if prompt_id in groups:
            raise ValueError(f"the rows of the prompt {prompt_id} are not side by side")
        group_rows: list[ScoreRow] = []
        decoded: list[NDArray[np.uint8]] = []
        for row, image in group:
            if image is not None:
                decoded.append(np.asarray(image))
                row = replace(row, details={**row.details, **asdict(image_signals(decoded[-1]))})
            group_rows.append(row)
        groups[prompt_id] = {
            "diversity": group_diversity(decoded),
            "rank_disagreement": rank_disagreement(
                [row.measured(headline) for row in group_rows], [row.measured("u") for row in group_rows]
            ),
        }
        all_rows += group_rows
    return Rated(tuple(prompts), tuple(all_rows), groups, judged)


def joined(reward: Reward, row: ScoreRow, judgement: ScoreRow | None) -> ScoreRow:
    """A reward's row with the axes, u and, for a reward from 0 to 1, the corrected score of its headline measure."""
    if judgement is None:
        return row
    u = judgement.value
    details = {**row.details, **{axis: judgement.details.get(axis) for axis in AXES}, "u": u}
    if reward.scale == UNIT:
        details["corrected"] = corrected_score(row.measured(reward.measures[0].detail), u)
    if u is None:
        details["unjudged"] = judgement.reason
    return replace(row, details=details)


def changes(measures: Iterable[Measure], base: Rated, trained: Rated, *, samples: int) -> dict[str, Change]:
    """Both models' intervals and the paired difference of each measure that both models' images have, by name."""
    sides = [(measure.name, base.values(measure), trained.values(measure)) for measure in measures]
    return {
        name: Change(
            before.interval(samples=samples), after.interval(samples=samples), after.gain(before, samples=samples)
        )
        for name, before, after in sides
        if after.comparable(before)
    }


def pair_verdict(reward: Reward, base: Rated, trained: Rated, *, samples: int) -> Verdict:
    """The verdict on a model against its base, on the same prompts and noise."""
    headline = replace(reward.measures[0], name="reward")
    judged = (headline, *quality_measures(reward), *signal_measures(reward))
    return verdict(changes(judged, base, trained, samples=samples))
