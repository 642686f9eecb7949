"""The image files that a table names."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from gdro_cli.data.own_data.groups import ImageSource
from gdro_cli.data.promptfile import check_characters


def find_image(value: Any, folder: Path, *, below: str = "") -> ImageSource:
    """The source of an image as a table has it.

    Args:
        value: a path, or a source (the cell of a parquet file).
        folder: paths are relative to it, and it must hold the file.
        below: another folder in it to look in (HPDv2 keeps the images of ``test.json`` in ``test``).

    Raises:
        ValueError: the file is missing or outside the folder, or the cell is empty.
    """
    if isinstance(value, ImageSource):
        if not value.cell_size:
            raise ValueError(f"the image in the column {value.column} is empty")
        return value
    if not isinstance(value, str) or not value:
        raise ValueError(f"an image must be a path, not {value!r}")
    check_characters(value, "the path of an image")
    root = os.path.join(os.path.realpath(folder), "")
    for base in (root, os.path.join(root, below)):
        full = os.path.realpath(os.path.join(base, value))
        if not full.startswith(root):
            raise ValueError(f"the image {value} is outside the folder {folder}; put it there, not a link to it")
        if os.path.isfile(full):
            return ImageSource(Path(full), full.removeprefix(root))
    raise ValueError(f"the image {value} is missing; paths are relative to {folder}")
