"""Evaluation points of a training run, and which of them may be compared.

A point maps ``step`` and names of measures to numbers, as in a run's metrics. If the reward or the judge failed on many
images, a mean over the rest also reflects the failures.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

Point = Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class MissingLimits:
    """The largest shares of a point's images, 0 to 1, that may lack a value."""

    reward: float
    """Images without a reward."""
    judgement: float
    """Images without u."""

    def allow(self, point: Point) -> bool:
        """Whether the point may be compared with others; a share of exactly the limit is allowed."""
        unscored, unjudged = (int(point.get(name, 0)) for name in ("failed", "unjudged"))
        images = int(point.get("images", 0)) + unscored
        return unscored <= self.reward * images and unjudged <= self.judgement * images
