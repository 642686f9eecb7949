"""How long it took to make the stores that a run learns from: ``stores.json`` in the run."""

from __future__ import annotations

from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError

from gdro_cli.core.costs import Batch
from gdro_cli.data.scores import ScoreTable
from gdro_cli.data.shard_times import total_time
from gdro_cli.errors import StoreError
from gdro_cli.files import read_file
from gdro_cli.runtime.metrics import train_rows
from gdro_cli.runtime.run import RunFolder

_FILE = "stores.json"
_REMEDY = "delete it, and times are left out"


class _StoreTimes(BaseModel):
    """Seconds of one store, which the run learns from after ``step`` steps; None where they are unknown."""

    model_config = ConfigDict(frozen=True, strict=True, allow_inf_nan=False)

    step: int
    sampling: Annotated[float, Field(ge=0)] | None
    scoring: Annotated[float, Field(ge=0)] | None


_STORES = TypeAdapter(tuple[_StoreTimes, ...])


def batch_of(table: ScoreTable, *, step: int) -> Batch | None:
    """The times of a store and its scores, which a run learns from after ``step`` steps; None where one is unknown."""
    shards = len(table.store.shards)
    sampling, scoring = total_time(table.store.path, shards=shards), total_time(table.path, shards=shards)
    return None if sampling is None or scoring is None else Batch(step, sampling, scoring)


def note_batch(folder: RunFolder, batch: Batch | None, *, step: int) -> None:
    """Add the times of the store that a run learns from after ``step`` steps to those of earlier steps."""
    earlier = _read(folder) or ()
    sampling, scoring = (None, None) if batch is None else (batch.sampling, batch.scoring)
    times = _StoreTimes(step=step, sampling=sampling, scoring=scoring)
    stores = (*(store for store in earlier if store.step < step), times)
    if stores != earlier:
        folder.write_json(_FILE, _STORES.dump_python(stores, mode="json"))


def read_batches(folder: RunFolder) -> tuple[Batch, ...] | None:
    """The times of all stores of a run; None where one is unknown.

    Raises:
        StoreError: the file is damaged.
    """
    stores = _read(folder)
    if stores is None:  # an online training has its times in the rows of its steps
        return () if any(row.seconds_sampling is not None for row in train_rows(folder.metrics())) else None
    batches = [
        Batch(store.step, store.sampling, store.scoring)
        for store in stores
        if store.sampling is not None and store.scoring is not None
    ]
    return tuple(batches) if len(batches) == len(stores) else None


def _read(folder: RunFolder) -> tuple[_StoreTimes, ...] | None:
    """The content of the file; None where there is none."""
    path = folder.path / _FILE
    if not path.is_file():
        return None
    try:
        return _STORES.validate_json(read_file(path, remedy=_REMEDY))
    except ValidationError as error:
        raise StoreError(f"{path} is damaged: {_REMEDY}") from error
