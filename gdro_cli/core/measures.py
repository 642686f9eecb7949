"""What an evaluation reports: which number of an image's score, and how its mean is taken."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

Detail = str | Mapping[str, float] | None
"""Which number of a score: a key of its details, several with their weights, or (None) the score itself."""


@dataclass(frozen=True, slots=True)
class Measure:
    """A quantity that an evaluation reports."""

    name: str
    detail: Detail = None
    tag: str | None = None
    """Only prompts whose metadata has this ``tag``."""
    by_tag: bool = False
    """The unweighted mean of the tags' means in place of the mean over images, as in GenEval's overall score."""
