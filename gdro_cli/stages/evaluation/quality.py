"""All that is known of a model's pictures in one place: reward, axes, u, corrected score, signals; and the verdict.

Rows are score rows whose details hold all numbers by name, so that one way leads from any number to its interval.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from itertools import groupby

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from gdro_cli.config.recipe import Recipe
from gdro_cli.core.corrected import corrected_score
from gdro_cli.core.signals import ImageSignals, group_diversity, image_signals, rank_disagreement
from gdro_cli.core.verdict import Change, Verdict, verdict
from gdro_cli.data.records import PromptRecord
from gdro_cli.data.scores import ScoreRow, ScoreTable
from gdro_cli.rewards.base import UnreadableImageError, read_rgb
from gdro_cli.rewards.judge.base import AXES
from gdro_cli.stages.evaluation.measures import Measured, measured
from gdro_cli.stages.setup.reward import Measure, measures

GROUP_SIGNALS = ("diversity", "rank_disagreement")


@dataclass(frozen=True, slots=True)
class Rated:
    """All that was measured of one model's pictures."""

    prompts: tuple[PromptRecord, ...]
    rows: tuple[ScoreRow, ...]
    """One per picture, prompt by prompt."""
    groups: Mapping[str, Mapping[str, float | None]]
    """The group signals of each prompt, by its id."""
    judged: bool

    def values(self, measure: Measure) -> Measured:
        """The values of one measure."""
        if isinstance(measure.detail, str) and measure.detail in GROUP_SIGNALS:
            return Measured([[self.groups[prompt.id][measure.detail]] for prompt in self.prompts], None)
        return measured(measure, self.prompts, self.rows)

    def has(self, measure: Measure) -> bool:
        """Whether there is a prompt of the measure's tag and at least one value in every stratum."""
        found = self.values(measure)
        strata = found.strata or [""] * len(found.values)
        present = {name for name, row in zip(strata, found.values, strict=True) if any(v is not None for v in row)}
        return bool(strata) and present == set(strata)

    @property
    def failed(self) -> int:
        """Pictures without a reward."""
        return sum(row.value is None for row in self.rows)

    @property
    def unjudged(self) -> int:
        """Pictures without u, where there is a judge."""
        return sum(row.details.get("u") is None for row in self.rows) if self.judged else 0


def rate_tables(recipe: Recipe, rewards: ScoreTable, judgements: ScoreTable | None) -> Rated:
    """Put a store's reward table and judge table together, and measure the signals of its pictures."""
    rows: list[ScoreRow] = []
    shards = range(len(rewards.store.shards))
    for number in shards:
        scored = rewards.read_shard(number)
        seen: Sequence[ScoreRow | None] = judgements.read_shard(number) if judgements else [None] * len(scored)
        rows += [joined(recipe, row, judgement) for row, judgement in zip(scored, seen, strict=True)]
    pictures = (_decoded(stored.path) for number in shards for stored in rewards.store.images(number))
    return rate(recipe, rewards.store.prompts, rows, pictures, judged=judgements is not None)


def rate(
    recipe: Recipe,
    prompts: Sequence[PromptRecord],
    rows: Sequence[ScoreRow],
    pictures: Iterable[Image.Image | None],
    *,
    judged: bool,
) -> Rated:
    """Add the signals of the i-th picture to ``rows[i]``; None is a picture that cannot be decoded.

    No more pictures than those of one prompt are held at a time.

    Raises:
        ValueError: the rows of a prompt do not lie side by side, or there are not as many pictures as rows.
    """
    full: list[ScoreRow] = []
    groups: dict[str, dict[str, float | None]] = {}
    headline = measures(recipe)[0].detail
    for prompt_id, group in groupby(zip(rows, pictures, strict=True), key=lambda pair: pair[0].prompt_id):
        if prompt_id in groups:
            raise ValueError(f"the rows of the prompt {prompt_id} do not lie side by side")
        own: list[ScoreRow] = []
        there: list[NDArray[np.uint8]] = []
        for row, picture in group:
            if picture is None:
                own.append(row)
                continue
            pixels = np.asarray(picture)
            own.append(replace(row, details={**row.details, **asdict(image_signals(pixels))}))
            there.append(pixels)
        groups[prompt_id] = {
            "diversity": group_diversity(there),
            "rank_disagreement": rank_disagreement(
                [row.measured(headline) for row in own], [row.measured("u") for row in own]
            ),
        }
        full += own
    return Rated(tuple(prompts), tuple(full), groups, judged)


def joined(recipe: Recipe, row: ScoreRow, judgement: ScoreRow | None) -> ScoreRow:
    """A reward's row with the axes, u and the corrected score of its task's headline measure."""
    if judgement is None:
        return row
    u = judgement.value
    details = {**row.details, **{axis: judgement.details.get(axis) for axis in AXES}, "u": u}
    details["corrected"] = corrected_score(row.measured(measures(recipe)[0].detail), u)
    if u is None:
        details["unjudged"] = judgement.reason
    return replace(row, details=details)


def quality_measures(recipe: Recipe) -> tuple[Measure, ...]:
    """What a judge adds to a task's measures."""
    by_tag = measures(recipe)[0].by_tag
    return (
        *(Measure(axis, axis) for axis in AXES),
        Measure("u", "u"),
        Measure("corrected", "corrected", by_tag=by_tag),
    )


def signal_measures(recipe: Recipe) -> tuple[Measure, ...]:
    """The signals of hacking that a task's pictures have."""
    names = [field.name for field in fields(ImageSignals)] + list(GROUP_SIGNALS)
    return tuple(Measure(name, name) for name in [*names, *(["text_area"] if recipe.prompts.task == "ocr" else [])])


def change(measure: Measure, base: Rated, trained: Rated, *, samples: int) -> Change:
    """Both models' intervals of one measure and the paired difference."""
    before, after = base.values(measure), trained.values(measure)
    return Change(
        before.interval(samples=samples), after.interval(samples=samples), after.gain(before, samples=samples)
    )


def pair_verdict(recipe: Recipe, base: Rated, trained: Rated) -> Verdict:
    """The verdict on a model against its base, on the same prompts and noise."""
    headline = measures(recipe)[0]
    wanted = {"reward": headline, **{m.name: m for m in (*quality_measures(recipe), *signal_measures(recipe))}}
    samples = recipe.eval.bootstrap
    changes = {
        name: change(measure, base, trained, samples=samples)
        for name, measure in wanted.items()
        if comparable(measure, base, trained)
    }
    return verdict(changes)


def comparable(measure: Measure, base: Rated, trained: Rated) -> bool:
    """Whether some picture has the measure on both sides (in every stratum)."""
    if not (base.has(measure) and trained.has(measure)):
        return False
    before, after = base.values(measure), trained.values(measure)
    strata = before.strata or [""] * len(before.values)
    both = {
        name
        for name, one, other in zip(strata, before.values, after.values, strict=True)
        if any(a is not None and b is not None for a, b in zip(one, other, strict=True))
    }
    return both == set(strata)


def _decoded(path: object) -> Image.Image | None:
    try:
        return read_rgb(path)  # type: ignore[arg-type]
    except UnreadableImageError:
        return None
