"""Pictures that are cut off, of odd kinds, absurdly large or no pictures: scored, or missing with a reason."""

from __future__ import annotations

import io
import os
import struct
import zlib
from pathlib import Path

from PIL import Image

from gdro_cli.data.imagefolder import read_image_folder
from gdro_cli.rewards.base import UnreadableImageError, read_rgb
from gdro_cli.stages.reporting.html import picture
from tests.support.faulty import Case, check, command, outcome, rows
from tests.support.prompt_rewards import OCR


def png(mode: str = "RGB", size: tuple[int, int] = (16, 16)) -> bytes:
    return saved(Image.new(mode, size), "PNG")


def saved(image: Image.Image, form: str) -> bytes:
    data = io.BytesIO()
    image.save(data, form)
    return data.getvalue()


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def header(width: int, height: int, *, depth: int = 8, colour: int = 2) -> bytes:
    return chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0))


SIGNATURE = b"\x89PNG\r\n\x1a\n"
GOOD = png()
PICTURES = [
    Case("RGB", GOOD, 0),
    Case("grey", png("L"), 0),
    Case("grey with transparency", png("LA"), 0),
    Case("transparent", png("RGBA"), 0),
    Case("palette", png("P"), 0),
    Case("black and white", png("1"), 0),
    Case("16 bits", png("I;16"), 0),
    Case("CMYK as JPEG", saved(Image.new("CMYK", (16, 16)), "JPEG"), 0),
    Case("one pixel", png(size=(1, 1)), 0),
    Case("a hair", png(size=(1, 4000)), 0),
    Case("JPEG with the wrong name", saved(Image.new("RGB", (16, 16)), "JPEG"), 0),
    Case("WEBP with the wrong name", saved(Image.new("RGB", (16, 16)), "WEBP"), 0),
    Case("nothing", b"", 1, "cannot be decoded"),
    Case("one byte", b"\x89", 1, "cannot be decoded"),
    Case("signature alone", SIGNATURE, 1, "cannot be decoded"),
    Case("header alone", SIGNATURE + header(16, 16), 1, "cannot be decoded"),
    Case("cut in the middle", GOOD[: len(GOOD) // 2], 1, "cannot be decoded"),
    Case("large one cut off", png(size=(256, 256))[:-40], 1, "cannot be decoded"),
    Case("changed byte", GOOD[:45] + bytes([GOOD[45] ^ 0xFF]) + GOOD[46:], 1, "cannot be decoded"),
    Case("JPEG cut off", saved(Image.new("RGB", (64, 64)), "JPEG")[:200], 1, "cannot be decoded"),
    Case("WEBP cut off", saved(Image.new("RGB", (64, 64)), "WEBP")[:-10], 1, "cannot be decoded"),
    Case("4 billion pixels", SIGNATURE + header(65535, 65535) + chunk(b"IDAT", b""), 1, "cannot be decoded"),
    Case("2**31 wide", SIGNATURE + header(2**31 - 1, 1) + chunk(b"IDAT", b""), 1, "cannot be decoded"),
    Case("no pixels", SIGNATURE + header(0, 0) + chunk(b"IEND", b""), 1, "cannot be decoded"),
    Case("odd depth", SIGNATURE + header(8, 8, depth=7) + chunk(b"IDAT", b""), 1, "cannot be decoded"),
    Case("text bomb", SIGNATURE + header(8, 8) + chunk(b"zTXt", b"a\0\0" + zlib.compress(b"x" * 10**7)), 1, "decoded"),
    Case("text", b"not a picture", 1, "cannot be decoded"),
    Case("SVG", b"<svg xmlns='http://www.w3.org/2000/svg'><script>alert(1)</script></svg>", 1, "cannot be decoded"),
    Case("PostScript", b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n%%EndComments\nshowpage\n", 1, "decoded"),
    Case("GIF", saved(Image.new("P", (8, 8)), "GIF"), 1, "cannot be decoded"),
    Case("TIFF", saved(Image.new("RGB", (8, 8)), "TIFF"), 1, "cannot be decoded"),
    Case("zip", b"PK\x03\x04" + bytes(200), 1, "cannot be decoded"),
    Case("HTML", b"<!doctype html>", 1, "cannot be decoded"),
]


@rows(PICTURES)
def test_a_picture(case: Case, tmp_path: Path) -> None:
    """Code 1 stands for a score that is missing with this reason."""
    path = tmp_path / "0000.png"
    path.write_bytes(case.given)
    try:
        image = read_rgb(path)
    except UnreadableImageError as error:
        assert case.code == 1 and case.words in str(error) and str(path) in str(error)
        assert "\n" not in str(error) and len(str(error)) < 500
        assert picture(path) is None
    else:
        assert case.code == 0 and image.mode == "RGB"
        shown = picture(path)
        assert shown is not None and shown.startswith("data:image/png;base64,")


METADATA = b'{"prompt": "a sign that says \\"A\\""}'
PLACES = [
    Case("not there", "none", 2, "cannot be read"),
    Case("a file", "file", 2, "cannot be read"),
    Case("empty", "empty", 2, "holds no pictures"),
    Case("no metadata", "bare", 2, "has no metadata.jsonl"),
    Case("no samples", "words", 2, "holds no pictures"),
    Case("two prompts", "two", 2, "holds 2 prompts"),
    Case("metadata is a folder", "nested", 2, "is not a regular file"),
    Case("a pipe for a picture", "pipe", 2, "0000.png is no regular file"),
    Case("a link to no picture", "gone", 2, "0001.png is a link that leads nowhere"),
    Case("a link to no folder", "less", 2, "1 is a link that leads nowhere"),
    Case("a link to itself", "loop", 2, "0001.png is a link that leads nowhere"),
    Case("no UTF-8", "latin", 2, "line 1: byte"),
    Case("name with a NUL", "a\0b", 2, "cannot be read"),
    Case("name of 300 letters", "x" * 300, 2, "cannot be read"),
]


@rows(PLACES)
def test_a_picture_folder(case: Case, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for name, metadata in (("bare", None), ("words", METADATA), ("two", METADATA + b"\n" + METADATA[:-4] + b'B\\""}')):
        (tmp_path / name / "00000").mkdir(parents=True)
        if metadata is not None:
            (tmp_path / name / "00000" / "metadata.jsonl").write_bytes(metadata)
    (tmp_path / "empty").mkdir()
    (tmp_path / "nested" / "0" / "metadata.jsonl").mkdir(parents=True)
    (tmp_path / "pipe" / "0" / "samples").mkdir(parents=True)
    (tmp_path / "pipe" / "0" / "metadata.jsonl").write_bytes(METADATA)
    os.mkfifo(tmp_path / "pipe" / "0" / "samples" / "0000.png")
    for name in ("gone", "less", "loop"):
        samples = tmp_path / name / "0" / "samples"
        samples.mkdir(parents=True)
        (samples / "0000.png").write_bytes(GOOD)
        (samples.parent / "metadata.jsonl").write_bytes(METADATA)
    (tmp_path / "gone" / "0" / "samples" / "0001.png").symlink_to("nowhere.png")
    (tmp_path / "less" / "1").symlink_to("nowhere")
    (tmp_path / "loop" / "0" / "samples" / "0001.png").symlink_to("0001.png")
    (tmp_path / "latin" / "0").mkdir(parents=True)
    (tmp_path / "latin" / "0" / "metadata.jsonl").write_bytes(b'{"prompt": "caf\xe9"}')
    check(outcome(lambda: read_image_folder(tmp_path / case.given, reward=OCR)), case.code, case.words)


def test_the_command_line_says_the_same(tmp_path: Path) -> None:
    found = command("score", "--recipe", "smoke", "--images", str(tmp_path), "--out", str(tmp_path / "out"))
    check(found, 2, "holds no pictures")


CASES = [*PICTURES, *PLACES]
