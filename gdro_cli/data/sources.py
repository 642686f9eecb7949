"""Source images: the images that the prompts of an editing model edit.

A prompt names a file relative to the folder of its own file. Its identity has the SHA-256 of the image file, so a
changed image is another prompt, and a moved folder is the same one.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from gdro_cli.errors import UserError
from gdro_cli.files import sha256
from gdro_cli.images import UnusableImageError, fit, open_image

if TYPE_CHECKING:
    from PIL import Image


@dataclass(frozen=True, slots=True)
class SourceImage:
    """The file of a source image."""

    path: Path
    sha256: str
    """Of the file."""
    size: tuple[int, int] | None = None
    """Height and width that ``read`` brings it to, in pixels; None leaves it as it is."""

    def read(self) -> Image.Image:
        """The image in RGB, scaled until it covers ``size`` and cut to it, the same on both sides.

        Raises:
            UserError: the file is gone, or is another than when its digest was taken.
        """
        try:
            data = self.path.read_bytes()
        except OSError as error:
            raise UserError(f"the source image {self.path} cannot be read ({error.strerror or error})") from error
        if sha256(data) != self.sha256:
            raise UserError(
                f"the source image {self.path} has changed since its prompt was read: run the command again"
            )
        image = _opened(data, str(self.path))
        return image if self.size is None else fit(image, height=self.size[0], width=self.size[1], how="crop")


def _opened(data: bytes, name: str) -> Image.Image:
    try:
        return open_image(data)
    except UnusableImageError as error:
        raise UserError(f"the image {name} cannot be used: {error}") from error


def find_image_file(value: object, folder: Path, *, below: str = "") -> tuple[Path, str]:
    """The image file that a table or prompt file names, and its path relative to the folder.

    Args:
        value: what the file says, a path.
        folder: paths are relative to it, and it must hold the image, also behind links.
        below: another folder in it to look in.

    Raises:
        ValueError: it is not a path, or the file is missing or outside the folder.
    """
    if not isinstance(value, str) or not value:
        raise ValueError(f"an image must be a path, not {value!r}")
    root = os.path.join(os.path.realpath(folder), "")
    for base in (root, os.path.join(root, below)):
        full = os.path.realpath(os.path.join(base, value))
        if not full.startswith(root):
            raise ValueError(f"the image {value} is outside the folder {folder}; put it there, not a link to it")
        if os.path.isfile(full):
            return Path(full), full.removeprefix(root)
    raise ValueError(f"the image {value} is missing; paths are relative to {folder}")


def read_sources(names: Iterable[str], folder: Path) -> Mapping[str, SourceImage | str]:
    """Find and decode the images that a prompt file names; each gets a source, or the reason why it has none."""

    def read(name: str) -> SourceImage | str:
        try:
            path, _ = find_image_file(name, folder)
            data = path.read_bytes()
            _opened(data, name)
        except (ValueError, UserError) as error:
            return str(error)
        except OSError as error:
            return f"the image {name} cannot be read ({error.strerror or error})"
        return SourceImage(path, sha256(data))

    listed = list(dict.fromkeys(names))
    with ThreadPoolExecutor() as threads:  # Pillow releases the interpreter's lock while it decodes
        return dict(zip(listed, threads.map(read, listed), strict=True))
