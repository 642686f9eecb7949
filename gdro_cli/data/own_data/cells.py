"""Images in the cells of parquet files, read as a stream, so that memory does not grow with the file."""

from __future__ import annotations

import threading
from bisect import bisect_right
from collections.abc import Iterator
from importlib.util import find_spec
from itertools import accumulate
from pathlib import Path
from typing import Any

from gdro_cli.errors import PrerequisiteError

ROWS_AT_ONCE = 16
"""Rows of images in memory. Row groups would be too large: pandas writes a whole table as one."""
_BUFFER_BYTES = 1 << 20

_thread = threading.local()


def open_parquet(path: Path) -> Any:
    """Open a parquet file that is read piece by piece.

    Raises:
        PrerequisiteError: pyarrow is not installed.
        ValueError: it is not a parquet file.
        OSError: it cannot be read.
    """
    if find_spec("pyarrow") is None:
        raise PrerequisiteError(
            f"{path} needs the package pyarrow: run `pip install 'gdro_cli[data]'` (docs/own-data.md)"
        )
    from pyarrow.parquet import ParquetFile

    return ParquetFile(path, buffer_size=_BUFFER_BYTES)


def read_cell(path: Path, *, row: int, column: str, item: int | None) -> bytes:
    """The bytes in a cell. Each thread keeps its place in the columns of one file, so the next rows cost little.

    Args:
        path: a parquet file.
        row: counted from 0.
        column: its cells are bytes, HF's struct of ``bytes`` and ``path``, or lists of these.
        item: the place in a cell that is a list.

    Raises:
        ValueError: the file was changed and has no bytes there.
        OSError: the file cannot be read.
    """
    readers: dict[str, _Column] = getattr(_thread, "readers", {})
    if getattr(_thread, "path", None) != path:
        readers = {}
        _thread.path, _thread.readers = path, readers
    if column not in readers:
        readers[column] = _Column(path, column)
    try:
        cell = readers[column].cell(row)
        value = (cell if item is None else cell.values[item]).as_py()
    except (IndexError, KeyError, StopIteration) as error:
        raise ValueError("it was changed and has no such cell") from error
    data = value["bytes"] if isinstance(value, dict) else value
    if not isinstance(data, bytes):
        raise ValueError("it was changed and the cell has no bytes")
    return data


class _Column:
    """One column of a file, read forwards; a step back starts again at the row group."""

    def __init__(self, path: Path, column: str) -> None:
        self._file = open_parquet(path)
        self._column = column
        groups = self._file.metadata.num_row_groups
        sizes = [self._file.metadata.row_group(group).num_rows for group in range(groups)]
        self._starts = [0, *accumulate(sizes)][:-1]
        self._batches: Iterator[Any] = iter(())
        self._batch: Any = ()
        self._first = 0

    def cell(self, row: int) -> Any:
        """The scalar in a row. Raises StopIteration if the file ends before it."""
        group = bisect_right(self._starts, row) - 1
        if row < self._first or self._starts[group] > self._first + len(self._batch) or not len(self._batch):
            self._batches = self._file.iter_batches(
                ROWS_AT_ONCE, range(group, len(self._starts)), columns=[self._column], use_threads=False
            )
            self._first, self._batch = self._starts[group], ()
        while row >= self._first + len(self._batch):
            self._first += len(self._batch)
            self._batch = ()  # freed before the next is read
            self._batch = next(self._batches).column(0)
        return self._batch[row - self._first]
