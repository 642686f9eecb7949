"""``gdro score --images`` on files as other tools write them, with real OCR."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageDraw, ImageFont
from rich.console import Console

from gdro_cli.config.recipe import Recipe
from gdro_cli.data.imagefolder import metadata_line
from gdro_cli.data.records import PromptRecord
from gdro_cli.runtime.progress import Reporter
from gdro_cli.stages.evaluation import image_folder
from gdro_cli.stages.setup.session import Session
from tests.support.ocr_signs import FONT

pytestmark = pytest.mark.slow

ORIENTATION = 0x0112
NAMES = ["0.png", "1.png", "2.jpg", "3.png", "4.bmp", "5.tif", "6.avif"]


def lettering(*, on: tuple[int, ...]) -> Image.Image:
    """Black letters on a colour."""
    image = Image.new("RGB" if len(on) == 3 else "RGBA", (256, 128), on)
    font = ImageFont.truetype(str(FONT), 64)
    ImageDraw.Draw(image).text((128, 64), "OPEN", font=font, fill="black", anchor="mm")
    return image


def test_files_are_scored_as_a_viewer_shows_them(make_recipe: Callable[..., Recipe], tmp_path: Path) -> None:
    """Read without regard to transparency, EXIF and 16 bits, images 1 to 3 have scores of 0, 0.5 and 0."""
    samples = tmp_path / "images" / "00000" / "samples"
    samples.mkdir(parents=True)
    (samples.parent / "metadata.jsonl").write_text(
        metadata_line(PromptRecord.of('a sign that says "OPEN"', target="OPEN"))
    )
    plain = lettering(on=(255, 255, 255))
    lettering(on=(0, 0, 0, 0)).save(samples / "1.png")
    turned = Image.Exif()
    turned[ORIENTATION] = 2
    plain.transpose(Image.Transpose.FLIP_LEFT_RIGHT).save(samples / "2.jpg", exif=turned)
    levels = 2570 + np.asarray(plain.convert("L"), dtype=np.uint16) * 150
    Image.fromarray(levels).save(samples / "3.png")
    for name in ("0.png", "4.bmp", "5.tif", "6.avif"):
        plain.save(samples / name)
    (samples / "7.heic").write_bytes(b"a format that is not read")
    (samples / "seeds.json").touch()

    said = io.StringIO()
    session = Session(make_recipe(), tmp_path / "out", Reporter(Console(file=said)))
    result = image_folder.run(session, folder=tmp_path / "images")
    found = json.loads(result.results.read_text())
    assert {name: row["value"] for name, row in zip(NAMES, found["images"], strict=True)} == dict.fromkeys(NAMES, 1.0)
    assert found["left_out"] == ["00000/samples/7.heic", "00000/samples/seeds.json"]
    (line,) = [line for line in said.getvalue().splitlines() if "left out" in line]
    assert line == (
        "not images of a format that is read, and left out: 2 (00000/samples/7.heic, 00000/samples/seeds.json)"
    )
