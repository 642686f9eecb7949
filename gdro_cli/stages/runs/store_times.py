"""How long it took to make the stores that a run learns from: ``stores.json`` in the run."""

from __future__ import annotations

from typing import Any

from gdro_cli.core.costs import Batch
from gdro_cli.data.scores import ScoreTable
from gdro_cli.data.shard_times import is_time, total_time
from gdro_cli.errors import StoreError
from gdro_cli.runtime.run import RunFolder

_FILE = "stores.json"
_TIMES = ("sampling", "scoring")


def batch_of(table: ScoreTable, *, step: int) -> Batch | None:
    """The times of a store and its scores, which a run learns from after ``step`` steps; None where one is unknown."""
    shards = len(table.store.shards)
    sampling, scoring = total_time(table.store.path, shards=shards), total_time(table.path, shards=shards)
    return None if sampling is None or scoring is None else Batch(step, sampling, scoring)


def note_batch(folder: RunFolder, batch: Batch | None, *, step: int) -> None:
    """Keep the times of the store that a run learns from after ``step`` steps, beside those of earlier steps."""
    there = _rows(folder) if (folder.path / _FILE).is_file() else []
    known = None if batch is None else (batch.sampling, batch.scoring)
    row = {"step": step, "sampling": known and known[0], "scoring": known and known[1]}
    rows = [*(each for each in there if each["step"] < step), row]
    if rows != there:
        folder.write_json(_FILE, rows)


def read_batches(folder: RunFolder) -> tuple[Batch, ...] | None:
    """The times of all stores of a run; None where one is not known.

    Raises:
        StoreError: the file is damaged.
    """
    if not (folder.path / _FILE).is_file():
        # a training that samples as it goes has its times in the steps' rows
        return () if any("seconds_sampling" in row for row in folder.metrics()) else None
    rows = _rows(folder)
    if any(row[name] is None for row in rows for name in _TIMES):
        return None
    return tuple(Batch(row["step"], *(float(row[name]) for name in _TIMES)) for row in rows)


def _rows(folder: RunFolder) -> list[dict[str, Any]]:
    """What the file holds. Raises StoreError for anything but steps and times."""
    rows = folder.read_json(_FILE)
    if not isinstance(rows, list) or not all(isinstance(row, dict) and type(row.get("step")) is int for row in rows):
        raise _damaged(folder)
    if not all(row.get(name, "") is None or is_time(row.get(name)) for row in rows for name in _TIMES):
        raise _damaged(folder)
    return rows


def _damaged(folder: RunFolder) -> StoreError:
    return StoreError(f"{folder.path / _FILE} is damaged: delete it, and times are left out")
