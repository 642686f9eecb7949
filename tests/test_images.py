"""Image files as a viewer shows them, and images brought to a size."""

from __future__ import annotations

import io
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageCms

from gdro_cli.images import Fitting, UnusableImageError, as_shown, fit, formats, open_image, scaling, suffixes

RED, GREEN, BLUE, WHITE, BLACK = (255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 255), (0, 0, 0)
RANDOM = np.random.default_rng(0)
ORIENTATION = 0x0112


def saved(image: Image.Image, form: str = "PNG", **options: Any) -> bytes:
    data = io.BytesIO()
    image.save(data, form, **options)
    return data.getvalue()


def noisy(width: int, height: int) -> Image.Image:
    return Image.fromarray(RANDOM.integers(0, 256, (height, width, 3), dtype=np.uint8))


def two_colours(mode: str, left: Any, right: Any) -> Image.Image:
    image = Image.new(mode, (4, 2), left)
    image.paste(right, (2, 0, 4, 2))
    return image


def sides(data: bytes) -> tuple[Any, Any]:
    """The colours of the left and right half, as read."""
    image = open_image(data)
    assert image.mode == "RGB" and image.size == (4, 2)
    return image.getpixel((0, 0)), image.getpixel((3, 1))


def test_an_rgb_image_keeps_its_bits_from_a_file_and_from_memory(tmp_path: Path) -> None:
    image = noisy(7, 5)
    (tmp_path / "0").write_bytes(saved(image))
    for source in (saved(image), tmp_path / "0", saved(image, "WEBP", lossless=True), saved(image, "BMP")):
        assert open_image(source).tobytes() == image.tobytes()


# -- as a viewer shows them -------------------------------------------------------------------------------------------

# EXIF 2.32, 4.6.4: the row and column of the stored image that are the visual top and left side.
STORED = {
    1: lambda shown: shown,
    2: lambda shown: shown[:, ::-1],
    3: lambda shown: shown[::-1, ::-1],
    4: lambda shown: shown[::-1],
    5: lambda shown: shown.transpose(1, 0, 2),
    6: lambda shown: shown.transpose(1, 0, 2)[::-1],
    7: lambda shown: shown.transpose(1, 0, 2)[::-1, ::-1],
    8: lambda shown: shown.transpose(1, 0, 2)[:, ::-1],
}


@pytest.mark.parametrize("form", ["PNG", "TIFF", "WEBP"])
@pytest.mark.parametrize("orientation", STORED)
def test_an_image_is_turned_as_its_camera_was(orientation: int, form: str) -> None:
    shown = np.asarray(noisy(6, 4))
    stored = Image.fromarray(np.ascontiguousarray(STORED[orientation](shown)))
    exif = Image.Exif()
    exif[ORIENTATION] = orientation
    options = {"lossless": True} if form == "WEBP" else {}
    read = open_image(saved(stored, form, exif=exif.tobytes(), **options))
    assert np.array_equal(np.asarray(read), shown)


def test_what_was_applied_is_not_applied_again() -> None:
    """A scoring process gets images that were read before, and a file that is written from one shows the same."""
    exif = Image.Exif()
    exif[ORIENTATION] = 6
    for options in ({"exif": exif.tobytes()}, {"icc_profile": swapped_profile()}, {"transparency": BLACK}):
        once = open_image(saved(noisy(6, 4), **options))
        assert once.size == ((4, 6) if "exif" in options else (6, 4))
        for again in (as_shown(once), open_image(saved(once))):
            assert again.size == once.size and again.tobytes() == once.tobytes()


def test_a_damaged_description_does_not_hide_the_image() -> None:
    image = noisy(8, 8)
    data = saved(image, "PNG", exif=b"Exif\0\0not a TIFF header")
    assert open_image(data).tobytes() == image.tobytes()


def test_what_is_transparent_shows_white() -> None:
    clear, half = (0, 0, 0, 0), (0, 0, 0, 128)
    assert sides(saved(two_colours("RGBA", BLACK, clear))) == (BLACK, WHITE)
    assert sides(saved(two_colours("RGBA", half, clear), "WEBP", lossless=True)) == ((127, 127, 127), WHITE)
    assert sides(saved(two_colours("LA", (0, 255), (0, 0)))) == (BLACK, WHITE)
    palette = two_colours("P", 0, 1)
    palette.putpalette([*BLACK, *RED])
    for form in ("PNG", "GIF"):
        assert sides(saved(palette, form)) == (BLACK, RED)
        assert sides(saved(palette, form, transparency=0)) == (WHITE, RED)
    assert sides(saved(two_colours("L", 0, 90), transparency=0)) == (WHITE, (90, 90, 90))
    assert sides(saved(two_colours("RGB", BLACK, BLUE), transparency=BLACK)) == (WHITE, BLUE)


@pytest.mark.parametrize("form", ["PNG", "TIFF", "PPM"])
def test_sixteen_bits_become_eight(form: str) -> None:
    """40,000 is 155.6 of 255 where 65,535 is white; Pillow's own conversion makes it white."""
    levels = np.array([[40_000, 40_000, 65_535, 65_535], [0, 128, 0, 65_535]], dtype=np.uint16)
    read = open_image(saved(Image.fromarray(levels), form))
    assert np.asarray(read)[:, :, 0].tolist() == [[156, 156, 255, 255], [0, 0, 0, 255]]
    assert read.mode == "RGB"


def test_sixteen_bits_with_a_transparent_level() -> None:
    levels = np.full((2, 4), 40_000, dtype=np.uint16)
    levels[:, 2:] = 1000
    assert sides(saved(Image.fromarray(levels), transparency=1000)) == ((156, 156, 156), WHITE)


@pytest.mark.parametrize("kind", [np.float32, np.int32])
def test_numbers_without_a_white_are_refused(kind: type) -> None:
    with pytest.raises(UnusableImageError, match="its pixels are 32-bit numbers, of which none is white"):
        open_image(saved(Image.fromarray(np.zeros((2, 2), dtype=kind)), "TIFF"))


def test_grey_black_and_white_and_printing_colours() -> None:
    assert sides(saved(two_colours("1", 0, 1))) == (BLACK, WHITE)
    assert sides(saved(two_colours("L", 7, 200))) == ((7, 7, 7), (200, 200, 200))
    assert sides(saved(two_colours("CMYK", (0, 255, 255, 0), (0, 0, 0, 0)), "TIFF")) == (RED, WHITE)


def swapped_profile() -> bytes:
    """A profile like that of sRGB in which red light is green and green light red."""
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    return profile.replace(b"rXYZ", b"?XYZ").replace(b"gXYZ", b"rXYZ").replace(b"?XYZ", b"gXYZ")


def test_colours_are_those_of_the_profile_in_the_file() -> None:
    pair = two_colours("RGB", RED, GREEN)
    found = np.array(sides(saved(pair, icc_profile=swapped_profile())))
    assert np.abs(found - [GREEN, RED]).max() <= 1
    transparent = two_colours("RGBA", RED, (0, 0, 0, 0))
    found = np.array(sides(saved(transparent, icc_profile=swapped_profile())))
    assert np.abs(found - [GREEN, WHITE]).max() <= 1


def test_the_profile_of_srgb_changes_no_bit_and_an_unusable_one_is_ignored() -> None:
    image, srgb = noisy(32, 32), ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    for profile in (srgb, b"not a profile", swapped_profile()[:200]):
        assert open_image(saved(image, icc_profile=profile)).tobytes() == image.tobytes()
    assert sides(saved(two_colours("L", 7, 200), icc_profile=swapped_profile())) == ((7, 7, 7), (200, 200, 200))


@pytest.mark.parametrize("form", ["GIF", "PNG", "WEBP", "AVIF"])
def test_an_animation_is_refused(form: str) -> None:
    frames = [Image.new("RGB", (16, 16), colour) for colour in (RED, GREEN, BLUE)]
    with pytest.raises(UnusableImageError, match="it is an animation of 3 frames: save the one that counts"):
        open_image(saved(frames[0], form, save_all=True, append_images=frames[1:]))


@pytest.mark.parametrize("form", ["TIFF", "MPO"])
def test_of_several_pages_the_first_counts(form: str) -> None:
    pages = [Image.new("RGB", (16, 16), colour) for colour in (WHITE, BLACK)]
    assert open_image(saved(pages[0], form, save_all=True, append_images=pages[1:])).getpixel((0, 0)) == WHITE


# -- what is read, and what is not ------------------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", ["png", "jpg", "jpeg", "jfif", "webp", "avif", "bmp", "gif", "tif", "tiff", "jp2",
                                    "ppm", "tga", "ico", "qoi"])  # fmt: skip
def test_formats_that_are_read(suffix: str, tmp_path: Path) -> None:
    path = tmp_path / f"image.{suffix}"
    Image.new("RGB", (32, 32), RED).save(path)
    assert path.suffix in suffixes()
    read: Any = open_image(path).getpixel((16, 16))
    assert max(abs(a - b) for a, b in zip(read, RED, strict=True)) <= 3


def test_what_another_program_would_have_to_decode_is_not_read() -> None:
    assert not suffixes() & {".eps", ".ps", ".pdf", ".wmf", ".mpg", ".h5", ".svg", ".txt"}
    assert "EPS" not in formats()
    with pytest.raises(UnusableImageError, match="not an image of a format that is read"):
        open_image(saved(Image.new("RGB", (4, 4)), "EPS"))


WHOLE = saved(noisy(64, 64))
JPEG = saved(noisy(64, 64), "JPEG")


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "the file is empty"),
        (b"an essay", "it is not an image of a format that is read"),
        (WHOLE[: len(WHOLE) // 2], "truncated"),
        (JPEG[: len(JPEG) // 2], "truncated"),
        (WHOLE[:20], "Truncated File Read"),
        (saved(Image.new("1", (5793, 5793))), "it has 5793 x 5793 pixels, more than 33,554,432"),
        (b"qoif" + struct.pack(">IIBB", 65535, 65535, 3, 0) + bytes(8), r"4294836225 pixels\) exceeds limit"),
    ],
    ids=["empty", "text", "half a PNG", "half a JPEG", "a header", "too many pixels", "a bomb"],
)
def test_what_cannot_be_used_has_a_short_reason(data: bytes, reason: str, tmp_path: Path) -> None:
    (tmp_path / "image.png").write_bytes(data)
    for source in (data, tmp_path / "image.png"):
        with pytest.raises(UnusableImageError, match=reason) as caught:
            open_image(source)
        assert 0 < len(str(caught.value)) < 150 and "\n" not in str(caught.value)
        assert str(tmp_path) not in str(caught.value)


def test_missing_files_and_folders_have_a_reason(tmp_path: Path) -> None:
    for path, reason in ((tmp_path / "none.png", "No such file"), (tmp_path, "Is a directory")):
        with pytest.raises(UnusableImageError, match=reason):
            open_image(path)


# -- sizes ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["crop", "pad", "stretch"])
def test_an_image_of_the_size_passes_unchanged(how: Fitting) -> None:
    image = noisy(24, 16)
    assert fit(image, height=16, width=24, how=how) is image


def striped(*colours: tuple[int, int, int], vertical: bool) -> Image.Image:
    """Stripes 40 pixels wide and 120 long."""
    image = Image.new("RGB", (40 * len(colours), 120))
    for number, colour in enumerate(colours):
        image.paste(colour, (40 * number, 0, 40 * number + 40, 120))
    return image if vertical else image.transpose(Image.Transpose.TRANSPOSE)


def colours_at(image: Image.Image, *places: tuple[int, int]) -> list[Any]:
    return [image.getpixel(place) for place in places]


@pytest.mark.parametrize("vertical", [True, False])
def test_crop_keeps_the_centre(vertical: bool) -> None:
    """Of five stripes, 200 x 120, a square keeps the inner three."""
    image = fit(striped(BLACK, RED, GREEN, BLUE, BLACK, vertical=vertical), height=60, width=60, how="crop")
    places = [(9, 30), (30, 9), (30, 30), (50, 30), (30, 50)]
    along, across = ([0, 2, 3], [1, 4]) if vertical else ([1, 2, 4], [0, 3])
    assert image.size == (60, 60)
    assert colours_at(image, *(places[i] for i in along)) == [RED, GREEN, BLUE]
    assert colours_at(image, *(places[i] for i in across)) == [GREEN, GREEN]
    assert BLACK not in colours_at(image, (2, 2), (57, 57))


@pytest.mark.parametrize("vertical", [True, False])
def test_pad_keeps_everything_and_adds_white_on_both_sides(vertical: bool) -> None:
    """Two stripes, 80 x 120, become 40 x 60 in a square of 60, with 10 of white on each side."""
    image = fit(striped(RED, BLUE, vertical=vertical), height=60, width=60, how="pad")
    places = [(9, 30), (11, 30), (48, 30), (50, 30)]
    turned = places if vertical else [(y, x) for x, y in places]
    assert image.size == (60, 60) and colours_at(image, *turned) == [WHITE, RED, BLUE, WHITE]


def test_stretch_changes_the_proportions() -> None:
    image = fit(striped(RED, BLUE, vertical=True), height=40, width=200, how="stretch")
    assert image.size == (200, 40) and colours_at(image, (2, 2), (90, 38), (110, 2), (197, 38)) == [
        RED,
        RED,
        BLUE,
        BLUE,
    ]


def test_fine_patterns_become_grey_and_not_other_patterns() -> None:
    """Resampling without a filter would take single pixels of a chequerboard."""
    board = Image.fromarray((np.indices((256, 256)).sum(0) % 2 * 255).astype(np.uint8)).convert("RGB")
    hows: tuple[Fitting, ...] = ("crop", "pad", "stretch")
    for how in hows:
        small = np.asarray(fit(board, height=32, width=32, how=how), dtype=int)
        assert np.abs(small - 127.5).max() < 12


@pytest.mark.parametrize(
    ("size", "how", "factor"),
    [
        ((32, 16), "crop", 4),
        ((32, 16), "pad", 2),
        ((32, 16), "stretch", 4),
        ((128, 64), "crop", 1),
        ((640, 64), "pad", 0.1),
    ],
)
def test_the_caller_learns_whether_an_image_was_enlarged(size: tuple[int, int], how: Fitting, factor: float) -> None:
    image = noisy(*size)
    assert scaling(image, height=64, width=64, how=how) == factor
    assert fit(image, height=64, width=64, how=how).size == (64, 64)


def test_a_line_can_be_padded() -> None:
    """1000 x 1 in 64 x 64 would be a sixteenth of a pixel high."""
    assert BLACK in colours_at(fit(Image.new("RGB", (1000, 1)), height=64, width=64, how="pad"), (32, 31), (32, 32))
