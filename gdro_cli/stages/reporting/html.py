"""Pages that are one file: no network, no script, pictures inside. Everything that was not written here is escaped."""

from __future__ import annotations

import base64
import io
import json
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Final

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from PIL import Image

from gdro_cli.rewards.base import UnreadableImageError, read_rgb

MISSING: Final = "-"
"""What stands for a number that is not there; a 0 is always a measured 0."""
PICTURE_SIDE = 256
"""Pixels; larger pictures are shrunk, or a page of fifty would weigh 100 MB."""
SMALL, TINY = 0.01, 0.0001
"""Below these a number has four decimals, or a power of ten."""

VERDICTS: Mapping[str | None, str] = {
    "healthy": "Healthy: nothing that was measured moved beyond its limit.",
    "suspicious": "Suspicious: look at the pictures before you trust the reward.",
    "collapsed": "Collapsed: the pictures have broken down. Do not trust the reward.",
    None: "No verdict: neither quality nor picture signals were measured.",
}


def render(template: str, **content: Any) -> bytes:
    """Fill a template of this package and return the page."""
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).with_name("templates")),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters.update(number=number, signed=signed, interval=interval, change=change, ends=ends)
    environment.globals.update(verdict_text=lambda level: VERDICTS.get(level, str(level)))
    return environment.get_template(template).render(**content).encode()


def number(value: float | None, *, sign: str = "") -> str:
    """Three decimals, four of what is small; a dash for what is missing."""
    if value is None or math.isnan(value):
        return MISSING
    value += 0.0  # no -0
    size = abs(value)
    form = ".3f" if size >= SMALL or size == 0 else ".4f" if size >= TINY else ".0e"
    return f"{value:{sign}{form}}"


def signed(value: float | None) -> str:
    """A difference: always with its sign."""
    return number(value, sign="+")


def interval(value: Mapping[str, Any] | None, *, sign: str = "") -> str:
    """``mean [low, high]`` of an interval as results hold it."""
    if value is None or value.get("mean") is None:
        return MISSING
    return f"{number(value['mean'], sign=sign)} {ends(value, sign=sign)}"


def ends(value: Mapping[str, Any] | None, *, sign: str = "") -> str:
    """``[low, high]``; nothing where the interval is missing."""
    if value is None or value.get("mean") is None:
        return ""
    return f"[{number(value['low'], sign=sign)}, {number(value['high'], sign=sign)}]"


def change(value: Mapping[str, Any] | None) -> str:
    """The interval of a difference."""
    return interval(value, sign="+")


def flat(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    """Dotted keys with their values as text, in the order given."""
    for key, value in values.items():
        path = f"{prefix}{key}"
        if isinstance(value, Mapping) and value:
            yield from flat(value, f"{path}.")
        elif isinstance(value, str):
            yield path, value
        else:
            yield path, MISSING if value is None else json.dumps(value, ensure_ascii=False)


def picture(path: Path, *, side: int = PICTURE_SIDE) -> str | None:
    """A picture as a PNG data URI, shrunk to at most ``side`` pixels; None when it is missing or damaged."""
    try:
        shown = read_rgb(path)
    except UnreadableImageError:
        return None
    shown.thumbnail((side, side), Image.Resampling.LANCZOS)
    data = io.BytesIO()
    shown.save(data, "PNG")
    return f"data:image/png;base64,{base64.b64encode(data.getvalue()).decode('ascii')}"
