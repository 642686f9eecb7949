"""The image files that a table names."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from gdro_cli.data.own_data.groups import ImageSource
from gdro_cli.data.promptfile import check_characters
from gdro_cli.data.sources import find_image_file


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
    if isinstance(value, str):
        check_characters(value, "the path of an image")
    return ImageSource(*find_image_file(value, folder, below=below))
