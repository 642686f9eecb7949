"""The interface of a judge of quality: an image and the text of its prompt in, three axes of quality out.

The corrected score ``r_corrected = r * (u - 3) + 0.2`` weighs a reward ``r`` by a quality ``u`` that must not depend on
it. So a judge sees only images and texts: no score, no target, no metadata.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from gdro_cli.rewards.base import ImageSource, PromptLike, Resources, Score

AXES = ("alignment", "coherence", "style")
"""Does the image show what the prompt says? Is it free of glitches and distortions? Is it pleasing?"""
LOWEST, HIGHEST = 1.0, 5.0
"""Ends of the scale of every axis."""


@dataclass(frozen=True, slots=True)
class Judgement:
    """A judge's opinion of one image."""

    axes: Mapping[str, float | None]
    """Each of ``AXES`` in 1..5; ``None`` if the judge gave no usable number for it."""
    reason: str | None = None
    """Why an axis is missing, for a person to read; ``None`` if none is."""
    details: Mapping[str, Any] = field(default_factory=dict)
    """What the axes were read from, as JSON values."""

    def __post_init__(self) -> None:
        """Check that every axis is on the scale, or missing with a reason. Raises ``ValueError`` if not."""
        if set(self.axes) != set(AXES):
            raise ValueError(f"a judgement has the axes {', '.join(AXES)}, got {', '.join(self.axes) or 'none'}")
        for axis, value in self.axes.items():
            if value is not None and not on_scale(value):
                raise ValueError(f"{axis} must be between {LOWEST:g} and {HIGHEST:g}, got {value}")
        if (None in self.axes.values()) != (self.reason is not None):
            raise ValueError("a judgement has all its axes, or a reason why one is missing")

    @classmethod
    def missing(cls, reason: str, *, details: Mapping[str, Any] | None = None) -> Judgement:
        """No axis at all."""
        return cls(dict.fromkeys(AXES), reason, details or {})


class Judge(Protocol):
    """A way to judge images.

    As with a reward, constructing one is quick and ``load`` does the heavy part, so that the judge can be sent to a
    worker process first. A judge knows nothing about rewards: equal images and texts get equal judgements.
    """

    @property
    def version(self) -> Mapping[str, Any]:
        """Provenance as JSON values: equal versions give equal judgements."""
        ...

    @property
    def resources(self) -> Resources:
        """What limits the number of processes."""
        ...

    def load(self) -> None:
        """Load models or check connections; a second call does nothing. Raises ``PrerequisiteError``."""
        ...

    def judge(self, images: Sequence[ImageSource], prompts: Sequence[str]) -> list[Judgement]:
        """Judge ``images[i]`` for the text ``prompts[i]``, in order. An image that fails is missing with a reason."""
        ...


class JudgeReward:
    """A judge used as a reward, so that ``ScoringPool`` and score tables also work for judges.

    The value of a score is ``u``, the mean of the chosen axes, in 1..5; it is missing if one of them is. The details
    are those of the judge and every axis under its name, even if ``u`` is missing; ``missing`` says why an axis that
    was not chosen is missing.

    Args:
        judge: the judge.
        axes: the axes of ``u``, a reward's ``judge_axes``.

    Raises:
        ValueError: there are no axes, an unknown one, or one twice.
    """

    def __init__(self, judge: Judge, *, axes: Sequence[str]) -> None:
        if not axes or len(set(axes)) < len(axes) or not set(axes) <= set(AXES):
            raise ValueError(f"the axes of u must be some of {', '.join(AXES)}, got {', '.join(axes) or 'none'}")
        self._judge = judge
        self._axes = tuple(axis for axis in AXES if axis in axes)

    @property
    def version(self) -> Mapping[str, Any]:
        """Provenance: the judge's own, and the axes of ``u``."""
        return {"judge": dict(self._judge.version), "axes": list(self._axes)}

    @property
    def resources(self) -> Resources:
        """Those of the judge."""
        return self._judge.resources

    def load(self) -> None:
        """Load the judge; a second call does nothing. Raises ``PrerequisiteError``."""
        self._judge.load()

    def score(self, images: Sequence[ImageSource], prompts: Sequence[PromptLike]) -> list[Score]:
        """The scores of ``images[i]`` for ``prompts[i]``, in order. The judge sees only the texts of the prompts.

        Raises:
            ValueError: the numbers of images, prompts and judgements differ.
            PrerequisiteError: the judge cannot be loaded, or its endpoint refuses the requests.
        """
        judgements = self._judge.judge(images, [prompt.prompt for _, prompt in zip(images, prompts, strict=True)])
        if len(judgements) != len(images):
            raise ValueError(f"the judge gave {len(judgements)} judgements for {len(images)} images")
        return [self._score(judgement) for judgement in judgements]

    def _score(self, judgement: Judgement) -> Score:
        details = {**judgement.details, **judgement.axes}
        values = [value for axis in self._axes if (value := judgement.axes[axis]) is not None]
        if len(values) < len(self._axes):
            return Score(None, judgement.reason, details)
        if judgement.reason is not None:
            details["missing"] = judgement.reason
        return Score(sum(values) / len(values), None, details)


def on_scale(value: float) -> bool:
    """Whether a number is on the scale."""
    return math.isfinite(value) and LOWEST <= value <= HIGHEST
