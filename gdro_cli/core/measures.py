"""What an evaluation reports: a number of each image's score, and how to take its mean."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

Detail = str | Mapping[str, float] | None
"""A number of a score: a key of its details, the weighted sum of several, or (None) the score itself."""


@dataclass(frozen=True, slots=True)
class Measure:
    """A quantity that an evaluation reports."""

    name: str
    detail: Detail = None
    tag: str | None = None
    """Only prompts whose metadata has this ``tag``."""
    by_tag: bool = False
    """Report the unweighted mean of the tags' means and not the mean over images, as GenEval's overall score does."""
