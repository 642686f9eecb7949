"""Evaluation points of a training run, and which of them may be compared.

A point maps ``step`` and names of measures to numbers, as in a run's metrics. If the reward or the judge failed on many
images, a mean over the rest also reflects the failures.
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
