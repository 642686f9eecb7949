"""Evaluation points of a training, and which of them may be compared.

A point is a mapping with ``step`` and measures by name, as metrics hold them. Where the reward or the judge failed on
many pictures, means over the rest say something about the failures, too.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

Point = Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class MissingLimits:
    """Shares of a point's pictures, 0 to 1, up to which something may be missing."""

    reward: float
    """Pictures without a reward."""
    judgement: float
    """Pictures without u."""

    def allow(self, point: Point) -> bool:
        """Whether the point may be compared with others; exactly the limit is allowed."""
        unscored, unjudged = (int(point.get(name, 0)) for name in ("failed", "unjudged"))
        pictures = int(point.get("images", 0)) + unscored
        return unscored <= self.reward * pictures and unjudged <= self.judgement * pictures
