"""What an evaluation reports: a number of each image's score, and how to take its mean."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

Detail = str | Mapping[str, float] | None
"""A number of a score: a key of its details, the score itself (None), or the weighted mean of several, in which an
empty name is the score itself."""


def measured(detail: Detail, value: float | None, details: Mapping[str, Any]) -> float | None:
    """A number of a score: its value, the number or boolean ``details[detail]``, or the weighted mean of several.

    None if it, or one of them, is missing. Raises TypeError, with the detail's name, if it is not a number.
    """
    if isinstance(detail, Mapping):
        numbers = [(weight, measured(name, value, details)) for name, weight in detail.items() if weight]
        present = [(weight, number) for weight, number in numbers if number is not None]
        if len(present) < len(numbers):
            return None
        return math.fsum(weight * number for weight, number in present) / math.fsum(detail.values())
    number = details.get(detail) if detail else value
    if isinstance(number, str | list | dict):
        raise TypeError(detail)
    return None if number is None else float(number)


@dataclass(frozen=True, slots=True)
class Measure:
    """A quantity that an evaluation reports."""

    name: str
    detail: Detail = None
    tag: str | None = None
    """Only prompts whose metadata has this ``tag``."""
    by_tag: bool = False
    """Report the unweighted mean of the tags' means and not the mean over images, as GenEval's overall score does."""
