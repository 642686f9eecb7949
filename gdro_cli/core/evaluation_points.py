"""Evaluation points of a training, and which of them may be compared.

A point has ``step`` and measures by name. Where the reward or the judge failed on many images, means over the rest
also say something about the failures.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol


class Point(Protocol):
    """A row of metrics: a mapping, or what is read like one."""

    def __getitem__(self, name: str, /) -> Any: ...

    def get(self, name: str, default: Any = None, /) -> Any:
        """The value of that name; ``default`` where it is missing."""
        ...


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
