"""A mixture: the weighted mean of several rewards, or of numbers among their details."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Annotated, Any, Self

from pydantic import Field, model_validator

from gdro_cli.config.base import StrictModel
from gdro_cli.config.rewards import MIX, part_of, reward_names
from gdro_cli.core.measures import Measure, measured
from gdro_cli.errors import GdroError, UserError
from gdro_cli.rewards.base import UNIT, ImageSource, PromptLike, Resources, Reward, Score
from gdro_cli.suggest import similar


class MixSettings(StrictModel):
    """Settings of a mixture. A term is a reward such as `ocr`, or a number that it also measures, as `ocr.exact`."""

    weights: dict[str, float]
    """The weight of each term, above 0. The mixture is the weighted mean."""
    ranges: dict[str, Annotated[tuple[float, float], Field(strict=False)]] = Field(default_factory=dict)
    """For terms that do not go from 0 to 1: the value that counts as 0, and the value that counts as 1. Values beyond
    them count as 0 or 1. A first value above the second one makes less better."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        names = [name for name in reward_names() if name != MIX]
        for term, weight in self.weights.items():
            if part_of(term) not in names:
                raise ValueError(f"the weight of {term!r} belongs to no reward{similar(part_of(term), names)}")
            if not (math.isfinite(weight) and weight > 0):
                raise ValueError(f"the weight of {term!r} is {weight:g}: it must be above 0, or the term left out")
        if not self.weights:
            raise ValueError("`weights` needs at least one term, as in {ocr: 0.8, ocr.exact: 0.2}")
        for term, (worst, best) in self.ranges.items():
            if term not in self.weights:
                raise ValueError(f"the range of {term!r} has no weight: it has {', '.join(self.weights)}")
            if not (math.isfinite(worst) and math.isfinite(best) and worst != best):
                raise ValueError(f"the range of {term!r} must be two different numbers")
        return self

    @property
    def parts(self) -> tuple[str, ...]:
        """The rewards of the terms, each once."""
        return tuple(dict.fromkeys(map(part_of, self.weights)))


class MixReward(Reward):
    """The weighted mean of terms. An image that lacks one of them lacks the mixture.

    Details of a score: each part's value under its name, and each of its details under ``name.detail``.

    Args:
        settings: weights and ranges.
        parts: the rewards of the terms by name, opened with their own settings.

    Raises:
        UserError: a term is not a number that its reward reports.
    """

    name = MIX
    purpose = "to satisfy several rewards at once"
    Settings = MixSettings
    settings: MixSettings

    def __init__(self, settings: MixSettings, parts: Mapping[str, Reward]) -> None:
        super().__init__(settings)
        self.parts = dict(parts)
        every, axes = self.parts.values(), Reward.judge_axes
        for term in settings.weights:
            self._check_term(term)
        self.needs = frozenset().union(*(part.needs for part in every))  # type: ignore[misc]
        self.measures = (Measure("reward"), *self._measures_of_parts())  # type: ignore[misc]
        self.signals = {  # type: ignore[misc]
            f"{name}.{key}": text for name, part in self.parts.items() for key, text in part.signals.items()
        }
        shared = tuple(axis for axis in axes if all(axis in part.judge_axes for part in every))
        self.judge_axes = shared or axes  # type: ignore[misc]
        self.scale = UNIT if all(map(self._is_unit, settings.weights)) else (-math.inf, math.inf)  # type: ignore[misc]
        self.columns = tuple(settings.weights)  # type: ignore[misc]

    def _measures_of_parts(self) -> Iterator[Measure]:
        """Each part's value and the numbers that it reports, under the names of the details."""
        for name, part in self.parts.items():
            details = [measure.detail for measure in part.measures if isinstance(measure.detail, str)]
            yield from (Measure(key, key) for key in (name, *(f"{name}.{detail}" for detail in dict.fromkeys(details))))

    def _check_term(self, term: str) -> None:
        """Refuse a detail that no score has before anything is sampled."""
        name, dot, detail = term.partition(".")
        part = self.parts[name]
        measured = {measure.detail for measure in part.measures if isinstance(measure.detail, str)}
        known = sorted(part.unit_details | measured | part.signals.keys())
        if dot and detail not in known:
            names = ", ".join(f"{name}.{each}" for each in known) or "none"
            raise UserError(f"reward.mix.weights: {term} is not a number that {name} reports (it reports {names})")

    def _is_unit(self, term: str) -> bool:
        name, _, detail = term.partition(".")
        part = self.parts[name]
        return term in self.settings.ranges or (detail in part.unit_details if detail else part.scale == UNIT)

    @property
    def resources(self) -> Resources:
        """Of a single process that has all parts; ``setup.scorers`` gives each part its own processes."""
        return "device"

    @property
    def version(self) -> Mapping[str, Any]:
        """Provenance of every part."""
        from gdro_cli.rewards.registry import provenance

        return {"reward": self.name, "parts": {name: provenance(part) for name, part in self.parts.items()}}

    def read_prompt(self, prompt: str, *, target: str | None, metadata: Mapping[str, Any]) -> str | None:
        """Check that a prompt carries what every part needs, and return its target. Raises ``ValueError``."""
        for part in self.parts.values():
            target = part.read_prompt(prompt, target=target, metadata=metadata)
        return target

    def check_prompts(self, prompts: Sequence[PromptLike]) -> Sequence[str]:
        """The remarks of every part. Raises what the parts raise."""
        return [remark for part in self.parts.values() for remark in part.check_prompts(prompts)]

    @classmethod
    def facts(cls, details: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
        """The value and the facts of each part."""
        from gdro_cli.rewards.registry import reward_class

        for name in filter(details.__contains__, reward_names()):
            if details[name] is not None:
                yield name, f"{details[name]:.2f}"
            with contextlib.suppress(GdroError):  # the report of a run whose plug-in is gone
                yield from reward_class(name).facts(_own(details, name))

    # -- scoring --------------------------------------------------------------------------------------------------

    def load(self) -> None:
        """Load every part; a second call does nothing. Raises ``PrerequisiteError``."""
        for part in self.parts.values():
            part.load()

    def score(self, images: Sequence[ImageSource], prompts: Sequence[PromptLike]) -> list[Score]:
        """Score with every part in this process, and combine. Raises what the parts raise."""
        scores = {name: part.score(images, prompts) for name, part in self.parts.items()}
        return self.combined(scores)

    def combined(self, scores: Mapping[str, Sequence[Score]]) -> list[Score]:
        """The mixture of the parts' scores of the same images.

        Args:
            scores: the scores of each part by its name.

        Returns:
            One score per image, missing with the first reason of a part.
        """
        of_images = zip(*scores.values(), strict=True)
        return [self._combined(dict(zip(scores, of_image, strict=True))) for of_image in of_images]

    def _combined(self, scores: Mapping[str, Score]) -> Score:
        details: dict[str, Any] = {}
        numbers: dict[str, float | None] = {}
        for name, score in scores.items():
            number = measured(self.parts[name].trained_on, score.value, score.details)
            numbers[name] = details[name] = number
            details |= {f"{name}.{key}": value for key, value in score.details.items()}
        for name, score in scores.items():
            if numbers[name] is None:
                return Score(None, f"{name}: {score.reason or 'it has no value'}", details)
        values: dict[str, float] = {}
        for term in self.settings.weights:
            if not isinstance(details.get(term), bool | int | float):
                return Score(None, f"its score has no number {term}", details)
            values[term] = self._in_range(term, float(details[term]))
        weights = self.settings.weights
        return Score(
            math.fsum(weights[term] * values[term] for term in values) / math.fsum(weights.values()), None, details
        )

    def _in_range(self, term: str, value: float) -> float:
        if term not in self.settings.ranges:
            return value
        worst, best = self.settings.ranges[term]
        return min(max((value - worst) / (best - worst), 0.0), 1.0)


def _own(details: Mapping[str, Any], name: str) -> dict[str, Any]:
    """A part's details under their own names."""
    prefix = f"{name}."
    return {key.removeprefix(prefix): value for key, value in details.items() if key.startswith(prefix)}
