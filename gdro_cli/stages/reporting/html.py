"""Pages from templates. Text from data is escaped. Reports are one file: no network, no script, images inside."""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from PIL import Image

from gdro_cli.stages.reporting.image_sheet import decoded
from gdro_cli.stages.reporting.number_format import MISSING, VERDICTS, difference, ends, interval, number, signed

TEMPLATES = Path(__file__).with_name("templates")
IMAGE_SIDE = 256
"""Pixels; larger images are shrunk, or a page of fifty would weigh 100 MB."""


def environment(**options: Any) -> Environment:
    """The templates of this package, HTML's or Markdown's."""
    made = Environment(
        loader=FileSystemLoader(TEMPLATES),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
        **options,
    )
    made.globals["verdicts"] = VERDICTS
    return made


def render(template: str, **content: Any) -> bytes:
    """Fill an HTML template and return the page."""
    filling = environment(autoescape=True)
    filling.filters.update(number=number, signed=signed, interval=interval, difference=difference, ends=ends)
    return filling.get_template(template).render(**content).encode()


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


def data_uri(path: Path, *, side: int = IMAGE_SIDE) -> str | None:
    """An image as a PNG data URI, shrunk to at most ``side`` pixels; None when it is missing or damaged."""
    image = decoded(path)
    if image is None:
        return None
    image.thumbnail((side, side), Image.Resampling.LANCZOS)
    data = io.BytesIO()
    image.save(data, "PNG")
    return f"data:image/png;base64,{base64.b64encode(data.getvalue()).decode('ascii')}"
