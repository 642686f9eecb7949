"""Images of any source: read as a viewer shows them, and brought to a size.

This module loads Pillow when an image is read, not before.
"""

from __future__ import annotations

import functools
import io
from pathlib import Path
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from PIL import Image

READING = 1
"""The version of the rules below, in the name of results that depend on them. Raise it if a file gives other pixels."""

MOST_PIXELS = 2**25
"""Images with more pixels are not decoded: a small file can expand to many gigabytes."""

Fitting = Literal["crop", "pad", "stretch"]
"""How an image gets another shape: cut to it, put on white, or stretched."""

_NOT_DECODED = {"BUFR", "EPS", "GRIB", "HDF5", "MPEG", "WMF"}
"""Formats that Pillow recognises, but passes to other programs (EPS to Ghostscript) or does not decode everywhere."""
_MOVING = {"AVIF", "FLI", "GIF", "PNG", "WEBP"}
"""Formats whose frames follow each other in time; in others they are pages, layers or sizes."""

_TURNS = {
    2: "FLIP_LEFT_RIGHT",
    3: "ROTATE_180",
    4: "FLIP_TOP_BOTTOM",
    5: "TRANSPOSE",
    6: "ROTATE_270",
    7: "TRANSVERSE",
    8: "ROTATE_90",
}
"""EXIF orientation -> Pillow's name of the turn that undoes it."""


class UnusableImageError(Exception):
    """An image cannot be used; the message is the reason, as in ``FILE cannot be used: REASON``."""


@functools.cache
def formats() -> tuple[str, ...]:
    """Formats that are read, by Pillow's names. The content of a file determines its format, not its name."""
    from PIL import Image

    Image.init()
    return tuple(sorted(Image.OPEN.keys() - _NOT_DECODED))


@functools.cache
def suffixes() -> frozenset[str]:
    """Ends of the names of files that are read, lower case, such as ``.png``."""
    from PIL import Image

    return frozenset(end for end, name in Image.registered_extensions().items() if name in {*formats(), "MPO"})


def open_image(source: bytes | Path) -> Image.Image:
    """Read an image file as a viewer shows it, in RGB.

    Args:
        source: the file, or its content; any format of ``formats``.

    Raises:
        UnusableImageError: the file is missing, damaged, empty, animated, no image, or larger than ``MOST_PIXELS``.
    """
    from PIL import Image, UnidentifiedImageError

    try:
        if (len(source) if isinstance(source, bytes) else source.stat().st_size) == 0:
            raise UnusableImageError("the file is empty")
        with Image.open(io.BytesIO(source) if isinstance(source, bytes) else source, formats=formats()) as image:
            return as_shown(image)
    except UnusableImageError:
        raise
    except UnidentifiedImageError as error:
        raise UnusableImageError("it is not an image of a format that is read") from error
    except Exception as error:  # a damaged file leads Pillow's decoders to errors of any kind
        raise UnusableImageError(_reason(error)) from error


def as_shown(image: Image.Image) -> Image.Image:
    """Return an opened image as a viewer shows it, in RGB.

    - It is turned as its EXIF orientation says.
    - Its colours are those of sRGB: the file's own profile (ICC) is applied, unless it is damaged or made for other
      pixels. CMYK without a profile is converted by the plain formula.
    - What is transparent shows white.
    - 16 bits become 8, and 65,535 is white. Numbers of 32 bits have no white, so they are refused.
    - Of the pages, layers or sizes in one file, the one that Pillow opens is taken. An animation is refused.

    Raises:
        UnusableImageError: see ``open_image``.
    """
    from PIL import Image

    if image.width * image.height > MOST_PIXELS:
        raise UnusableImageError(f"it has {image.width} x {image.height} pixels, more than {MOST_PIXELS:,}")
    try:
        frames = getattr(image, "n_frames", 1) if image.format in _MOVING else 1
        if frames > 1:
            raise UnusableImageError(f"it is an animation of {frames} frames: save the one that counts as an image")
        image.load()
        profile = image.info.get("icc_profile")
        image = _upright(image)
        if image.mode in ("I", "F") or image.mode.startswith("I;16"):
            image = _eight_bits(image)
        if image.has_transparency_data:
            image = image.convert("RGBA")
            white = Image.new("RGB", image.size, "white")
            shown = Image.composite(_in_srgb(image.convert("RGB"), profile), white, image.getchannel("A"))
        else:
            shown = _in_srgb(image, profile)
        shown.info = {}  # it has been applied: nobody may apply it again
        return shown
    except UnusableImageError:
        raise
    except Exception as error:
        raise UnusableImageError(_reason(error)) from error


def _upright(image: Image.Image) -> Image.Image:
    from PIL import ExifTags, Image

    try:
        turn = _TURNS.get(image.getexif().get(ExifTags.Base.Orientation, 1))
    except Exception:  # noqa: BLE001 - viewers show an image whose description is damaged
        return image
    return image if turn is None else image.transpose(Image.Transpose[turn])


def _eight_bits(image: Image.Image) -> Image.Image:
    """Grey in 16 bits, with or without a level that means transparent, as ``L`` or ``LA``."""
    import numpy as np
    from PIL import Image

    if image.mode == "F" or (image.mode == "I" and image.format not in ("PNG", "PPM")):
        raise UnusableImageError("its pixels are 32-bit numbers, of which none is white: save it with 8 or 16 bits")
    levels = np.asarray(image.convert("I"))
    grey = Image.fromarray((levels / 257).round().astype(np.uint8))
    if "transparency" in image.info:
        grey.putalpha(Image.fromarray(np.where(levels == image.info["transparency"], 0, 255).astype(np.uint8)))
    return grey


def _in_srgb(image: Image.Image, profile: bytes | None) -> Image.Image:
    from PIL import ImageCms

    if profile and image.mode in ("RGB", "L", "CMYK"):
        try:
            own, srgb = ImageCms.ImageCmsProfile(io.BytesIO(profile)), ImageCms.createProfile("sRGB")
            if (converted := ImageCms.profileToProfile(image, own, srgb, outputMode="RGB")) is not None:
                return converted
        except (ImageCms.PyCMSError, OSError):
            pass
    return image.convert("RGB")


def _reason(error: Exception) -> str:
    lines = (getattr(error, "strerror", None) or str(error)).strip().splitlines()
    return lines[0] if lines else type(error).__name__


def scaling(image: Image.Image, *, height: int, width: int, how: Fitting) -> float:
    """The factor by which ``fit`` scales the sides of an image (the larger one if stretched); above 1 it enlarges."""
    factors = width / image.width, height / image.height
    return min(factors) if how == "pad" else max(factors)


def fit(image: Image.Image, *, height: int, width: int, how: Fitting) -> Image.Image:
    """Bring an RGB image to a size, with Lanczos resampling; an image of that size is returned as it is.

    Args:
        image: the image.
        height, width: size in pixels.
        how: ``crop`` scales it so that it covers the size and cuts off what exceeds it, the same on both sides;
            ``pad`` scales it so that all of it is inside, centred on white; ``stretch`` scales each side by itself,
            which changes the proportions.
    """
    from PIL import Image, ImageOps

    size, lanczos = (width, height), Image.Resampling.LANCZOS
    if image.size == size:
        return image
    if how == "stretch":
        return image.resize(size, lanczos)
    if how == "crop":
        return ImageOps.fit(image, size, lanczos)
    factor = scaling(image, height=height, width=width, how=how)
    inside = image.resize((max(1, round(factor * image.width)), max(1, round(factor * image.height))), lanczos)
    sheet = Image.new("RGB", size, "white")
    sheet.paste(inside, ((width - inside.width) // 2, (height - inside.height) // 2))
    return sheet
