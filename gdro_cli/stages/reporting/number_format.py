"""Numbers and verdicts as text, the same wherever a person reads them."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Final

from gdro_cli.core.scores import Interval

MISSING: Final = "-"
"""Stands for a number that is missing; a 0 is always a measured 0."""
SMALL, TINY = 0.01, 0.0001
"""Below these a number has four decimals, or a power of ten."""
VERDICTS: Mapping[str, str] = {
    "healthy": "Healthy: nothing that was measured moved beyond its limit.",
    "suspicious": "Suspicious: look at the images before you trust the reward.",
    "collapsed": "Collapsed: the images have broken down. Do not trust the reward.",
}


def number(value: float | None, *, sign: str = "") -> str:
    """Three decimals, four for small numbers; a dash for a missing one."""
    if value is None or math.isnan(value):
        return MISSING
    value += 0.0  # no -0
    size = abs(value)
    form = ".3f" if size >= SMALL or size == 0 else ".4f" if size >= TINY else ".0e"
    return f"{value:{sign}{form}}"


def signed(value: float | None) -> str:
    """A difference: always with its sign."""
    return number(value, sign="+")


def interval(value: Interval | None, *, sign: str = "") -> str:
    """``mean [low, high]``."""
    return MISSING if value is None else f"{number(value.mean, sign=sign)} {ends(value, sign=sign)}"


def ends(value: Interval | None, *, sign: str = "") -> str:
    """``[low, high]``; nothing where the interval is missing."""
    return "" if value is None else f"[{number(value.low, sign=sign)}, {number(value.high, sign=sign)}]"


def difference(value: Interval | None) -> str:
    """The interval of a difference."""
    return interval(value, sign="+")
