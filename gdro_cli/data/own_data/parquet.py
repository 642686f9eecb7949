"""Tables in parquet files: the same columns as in JSON, with images as paths, bytes, or HF's ``{bytes, path}``."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import count
from pathlib import Path
from typing import Any

from gdro_cli.data.own_data.cells import ROWS_AT_ONCE, open_parquet
from gdro_cli.data.own_data.groups import ImageSource
from gdro_cli.data.own_data.jsonl import Row, unreadable
from gdro_cli.data.own_data.lines import READ
from gdro_cli.errors import UserError

SUFFIX = ".parquet"
_PATHS_AT_ONCE = 4096
"""Rows in memory if no cell holds an image."""


def read_parquet_rows(path: Path) -> Iterator[Row]:
    """The rows of a file in order; the bytes of images become sources, and columns that no form has become None.

    Raises:
        UserError: the file is not parquet or cannot be read.
        PrerequisiteError: pyarrow is not installed.
    """
    try:
        yield from _rows(path)
    except OSError as error:
        raise unreadable(path, error) from error
    except ValueError as error:
        reason = str(error).splitlines()[0].rstrip(".")
        raise UserError(f"{path} is not a whole parquet file ({reason}): copy it again") from error


def _rows(path: Path) -> Iterator[Row]:
    file = open_parquet(path)
    schema = file.schema_arrow
    columns = [name for name in schema.names if name in READ]
    others = dict.fromkeys(name for name in schema.names if name not in READ)
    at_once = ROWS_AT_ONCE if any(_has_bytes(schema.field(name).type) for name in columns) else _PATHS_AT_ONCE
    first = 0
    for batch in file.iter_batches(at_once, columns=columns):
        cells = [_values(batch.column(name), path, name, first) for name in columns]
        for index in range(batch.num_rows):
            values = {name: column[index] for name, column in zip(columns, cells, strict=True)}
            yield f"{path.name} row {first + index}", values | others
        first += batch.num_rows


def _has_bytes(kind: Any) -> bool:
    import pyarrow.types as types

    if types.is_list(kind) or types.is_large_list(kind):
        return _has_bytes(kind.value_type)
    if types.is_struct(kind):
        return kind.get_field_index("bytes") >= 0 and _has_bytes(kind.field("bytes").type)
    return bool(types.is_binary(kind) or types.is_large_binary(kind))


def _values(array: Any, path: Path, column: str, first: int) -> list[Any]:
    """The values of a column in the rows from ``first`` on."""
    import pyarrow.types as types
    from pyarrow.compute import list_value_length

    if not _has_bytes(array.type):
        return list(array.to_pylist())
    if not (types.is_list(array.type) or types.is_large_list(array.type)):
        images = zip(count(first), _images(array), strict=False)
        return [_source(image, path, column, row) for row, image in images]
    flat = iter(_images(array.flatten()))
    lengths = list_value_length(array).to_pylist()
    return [
        None if length is None else [_source(next(flat), path, column, row, item) for item in range(length)]
        for row, length in zip(count(first), lengths, strict=False)
    ]


def _images(array: Any) -> list[int | str | None]:
    """Of each cell the number of its bytes, else its path."""
    import pyarrow.types as types
    from pyarrow.compute import binary_length, struct_field

    if not types.is_struct(array.type):
        return list(binary_length(array).to_pylist())
    sizes = binary_length(struct_field(array, "bytes")).to_pylist()
    if array.type.get_field_index("path") < 0:
        return list(sizes)
    paths = struct_field(array, "path").to_pylist()
    return [name if size is None else size for size, name in zip(sizes, paths, strict=True)]


def _source(
    image: int | str | None, path: Path, column: str, row: int, item: int | None = None
) -> ImageSource | str | None:
    if not isinstance(image, int):
        return image
    name = f"{path.name} row {row} {column}" + ("" if item is None else f"[{item}]")
    return ImageSource(path, name, row, column, item, image)
