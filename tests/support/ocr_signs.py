"""Little pictures of signs, and the prompts that belong to them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import matplotlib
from PIL import Image, ImageDraw, ImageFont

SCALE = 4
FONT = Path(matplotlib.get_data_path()) / "fonts" / "ttf" / "DejaVuSansMono-Bold.ttf"


@dataclass(frozen=True)
class Prompt:
    """The least that a reward needs."""

    prompt: str
    target: str | None
    metadata: Mapping[str, Any] = field(default_factory=dict)
    source: Image.Image | None = None


def ask(text: str) -> Prompt:
    """A prompt for a sign with this text."""
    return Prompt(f'a sign that says "{text}"', text)


def sign(words: Sequence[str], *, colour: str = "#c82828", ink: str = "#fafafa", left: int = 8) -> Image.Image:
    """A picture of 64 x 64 pixels with one sign of 22 pixels height per word, 14 px letters, from the top."""
    picture = Image.new("RGB", (64 * SCALE, 64 * SCALE), "#7090a8")
    draw = ImageDraw.Draw(picture)
    font = ImageFont.truetype(str(FONT), 14 * SCALE)
    for row, word in enumerate(words):
        top = 7 + 24 * row
        box = [(left - 4) * SCALE, top * SCALE, (left + 8 * len(word) + 4) * SCALE, (top + 22) * SCALE]
        draw.rounded_rectangle(box, 4 * SCALE, fill=colour, outline=ink, width=SCALE)
        for place, letter in enumerate(word):
            centre = ((left + 8 * place + 4) * SCALE, (top + 11) * SCALE)
            draw.text(centre, letter, font=font, fill=ink, anchor="mm")
    return picture.resize((64, 64), Image.Resampling.LANCZOS)
