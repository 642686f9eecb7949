"""Sheets of captioned images: an evaluation's grid, base above trained, and those of evaluation points."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from gdro_cli.data.records import PromptRecord
from gdro_cli.data.scores import ScoreRow, ScoreTable
from gdro_cli.data.store import GroupStore, StoredImage
from gdro_cli.files import write_bytes
from gdro_cli.rewards.base import Reward, UnreadableImageError, read_rgb
from gdro_cli.rewards.registry import reward_class

CELL = 160  # pixels per image on the sheet
MARGIN = 8
LINE = 15  # pixels per line of text
TEXT_SIZE = 11
INK, PAPER, FAINT = (24, 24, 28), (255, 255, 255), (110, 110, 118)

SheetRow = Sequence[tuple[Image.Image | None, ScoreRow | None]]
"""Images with their scores; None is a missing image. Source images have no score."""


def draw_grid(path: Path, base: ScoreTable, trained: ScoreTable, *, prompts: int) -> Path | None:
    """Draw the first image of the first ``prompts`` prompts of both models and write a PNG.

    Above them are the images that the prompts edit, if they do.
    The reward writes a caption below each image. Returns None for no prompts.
    """
    shown = base.store.prompts[:prompts]
    if not shown:
        return None
    rows = {name: first_images(table, len(shown)) for name, table in (("base", base), ("trained", trained))}
    edited = [stored.prompt for stored in _first_stored(base.store, len(shown))] if shown[0].image_sha256 else []
    draw_sheet(path, [prompt.prompt for prompt in shown], source_row(edited) | rows, reward=reward_class(base.name))
    return path


def draw_sheet(
    path: Path, prompts: Sequence[str], rows: Mapping[str, SheetRow], *, reward: Reward | type[Reward]
) -> None:
    """Write a PNG with one column per prompt and one named row per model; ``reward`` writes the captions."""
    row_height = CELL + 2 * LINE + MARGIN
    left, top = 60, 2 * LINE + MARGIN
    sheet = Image.new("RGB", (left + len(prompts) * (CELL + MARGIN), top + len(rows) * row_height), PAPER)
    pen = ImageDraw.Draw(sheet)
    font = ImageFont.load_default(TEXT_SIZE)
    for column, prompt in enumerate(prompts):
        for number, text in enumerate(wrapped(prompt, font, CELL)[:2]):
            pen.text((left + column * (CELL + MARGIN), 2 + number * LINE), text, fill=INK, font=font)
    for line, (name, images) in enumerate(rows.items()):
        y = top + line * row_height
        pen.text((MARGIN, y + CELL // 2), name, fill=INK, font=font)
        for column, (image, score) in enumerate(images):
            x = left + column * (CELL + MARGIN)
            shown = blank() if image is None else image
            sheet.paste(shown.resize((CELL, CELL), Image.Resampling.NEAREST), (x, y))
            for number, text in enumerate(() if score is None else caption(score, reward)):
                pen.text((x, y + CELL + 2 + number * LINE), wrapped(text, font, CELL)[0], fill=FAINT, font=font)
    data = io.BytesIO()
    sheet.save(data, "PNG")
    write_bytes(path, data.getvalue())


def point_sheet(run: Path, step: int) -> str | None:
    """The sheet of an evaluation point, relative to the run; None where there is none inside the run."""
    sheet = f"validation/step-{step:06d}.png"
    inside = (run / sheet).is_file() and (run / sheet).resolve().is_relative_to(run.resolve())
    return sheet if inside else None


def source_row(prompts: Sequence[PromptRecord]) -> dict[str, SheetRow]:
    """The row of the images that prompts edit; no row if they edit none."""
    return {"source": [(prompt.source, None) for prompt in prompts]} if any(prompt.image for prompt in prompts) else {}


def _first_stored(store: GroupStore, count: int) -> list[StoredImage]:
    """The first image of each of the first ``count`` prompts."""
    stored: list[StoredImage] = []
    for number in range(len(store.shards)):
        if len(stored) < count:
            stored += [image for image in store.images(number) if image.index == 0]
    return stored[:count]


def first_images(table: ScoreTable, count: int) -> list[tuple[Image.Image | None, ScoreRow]]:
    """The first image of each of the first ``count`` prompts with its score; None for one that cannot be decoded."""
    images: list[tuple[Image.Image | None, ScoreRow]] = []
    for number in range(len(table.store.shards)):
        if len(images) < count:
            rows = zip(table.store.images(number), table.read_shard(number), strict=True)
            images += [(decoded(stored.path), row) for stored, row in rows if stored.index == 0]
    return images[:count]


def decoded(path: Path) -> Image.Image | None:
    """The image in a file; None if it cannot be decoded."""
    try:
        return read_rgb(path)
    except UnreadableImageError:
        return None


def blank(why: str = "") -> Image.Image:
    """The grey field in place of a missing image."""
    field = Image.new("RGB", (CELL, CELL), FAINT)
    ImageDraw.Draw(field).text((MARGIN, CELL // 2), why, fill=PAPER, font=ImageFont.load_default(TEXT_SIZE))
    return field


def caption(row: ScoreRow, reward: Reward | type[Reward]) -> tuple[str, ...]:
    """The lines below an image."""
    if row.value is None:
        return "no score", str(row.reason)[:24]
    return reward.caption(row.value, row.details)


def wrapped(text: str, font: ImageFont.FreeTypeFont | ImageFont.ImageFont, width: int) -> list[str]:
    """Break a text into lines of at most ``width`` pixels."""
    lines = [""]
    for word in text.split():
        longer = f"{lines[-1]} {word}".strip()
        if font.getlength(longer) <= width or not lines[-1]:
            lines[-1] = longer
        else:
            lines.append(word)
    return lines
