"""Measures of a set of images: values by prompt, their means and intervals."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from gdro_cli.config.recipe import Recipe
from gdro_cli.core.evaluation_points import MissingLimits
from gdro_cli.core.scores import Interval, bootstrap_ci, paired_bootstrap
from gdro_cli.data.records import PromptRecord
from gdro_cli.data.scores import ScoreRow
from gdro_cli.errors import StoreError
from gdro_cli.stages.setup.reward import Measure, measures


def headline(recipe: Recipe) -> Measure:
    """The measure that stands for the recipe's task."""
    return measures(recipe)[0]


def missing_limits(recipe: Recipe) -> MissingLimits:
    """How much may be missing of an evaluation point that is compared with others."""
    return MissingLimits(recipe.reward.max_failed_share, recipe.judge.max_failed_share)


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
    chosen = [p for p in prompts if measure.tag is None or p.metadata.get("tag") == measure.tag]
    values: dict[str, list[float | None]] = {prompt.id: [] for prompt in chosen}
    for row in rows:
        if row.prompt_id in values:
            values[row.prompt_id].append(row.measured(measure.detail))
    strata = [str(prompt.metadata["tag"]) for prompt in chosen] if measure.by_tag else None
    return Measured(list(values.values()), strata)
