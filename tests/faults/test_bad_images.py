"""Images that are truncated, of rare kinds, far too large or not images: scored, or missing with a reason."""

from __future__ import annotations

import io
import struct
import zlib
from pathlib import Path

from PIL import Image

from gdro_cli.rewards.base import UnreadableImageError, read_rgb
from gdro_cli.stages.reporting.html import data_uri
from tests.support.faulty import Case, check, command, rows


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
IMAGES = [
    Case("RGB", GOOD, 0),
    Case("grey", png("L"), 0),
    Case("transparent", png("RGBA"), 0),
    Case("palette", png("P"), 0),
    Case("16 bits", png("I;16"), 0),
    Case("CMYK as JPEG", saved(Image.new("CMYK", (16, 16)), "JPEG"), 0),
    Case("one pixel", png(size=(1, 1)), 0),
    Case("JPEG with the wrong name", saved(Image.new("RGB", (16, 16)), "JPEG"), 0),
    Case("WEBP with the wrong name", saved(Image.new("RGB", (16, 16)), "WEBP"), 0),
    Case("nothing", b"", 1, "cannot be decoded"),
    Case("header alone", SIGNATURE + header(16, 16), 1, "cannot be decoded"),
    Case("cut in the middle", GOOD[: len(GOOD) // 2], 1, "cannot be decoded"),
    Case("changed byte", GOOD[:45] + bytes([GOOD[45] ^ 0xFF]) + GOOD[46:], 1, "cannot be decoded"),
    Case("JPEG cut off", saved(Image.new("RGB", (64, 64)), "JPEG")[:200], 1, "cannot be decoded"),
    Case("4 billion pixels", SIGNATURE + header(65535, 65535) + chunk(b"IDAT", b""), 1, "cannot be decoded"),
    Case("text bomb", SIGNATURE + header(8, 8) + chunk(b"zTXt", b"a\0\0" + zlib.compress(b"x" * 10**7)), 1, "decoded"),
    Case("SVG", b"<svg xmlns='http://www.w3.org/2000/svg'><script>alert(1)</script></svg>", 1, "cannot be decoded"),
    Case("PostScript", b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n%%EndComments\nshowpage\n", 1, "decoded"),
    Case("GIF", saved(Image.new("P", (8, 8)), "GIF"), 0),
    Case("zip", b"PK\x03\x04" + bytes(200), 1, "cannot be decoded"),
]


@rows(IMAGES)
def test_an_image(case: Case, tmp_path: Path) -> None:
    """Code 1 means that the score is missing with this reason."""
    path = tmp_path / "0000.png"
    path.write_bytes(case.given)
    try:
        image = read_rgb(path)
    except UnreadableImageError as error:
        assert case.code == 1 and case.words in str(error) and str(path) in str(error)
        assert "\n" not in str(error) and len(str(error)) < 500
        assert data_uri(path) is None
    else:
        assert case.code == 0 and image.mode == "RGB"
        shown = data_uri(path)
        assert shown is not None and shown.startswith("data:image/png;base64,")


def test_the_command_line_refuses_a_folder_without_images(tmp_path: Path) -> None:
    result = command("score", "--recipe", "smoke", "--images", str(tmp_path), "--out", str(tmp_path / "out"))
    check(result, 2, "has no folders 00000")
