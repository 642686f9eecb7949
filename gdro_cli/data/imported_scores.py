"""Scores that the user brought: score tables beside a store that are found by name.

They lie where those of a reward lie (``scores.py``). The table's reward is called ``imported`` and its provenance is
the name alone, so a store has one table of a name, and its content never changes.
"""

from __future__ import annotations

from collections.abc import Mapping

from gdro_cli.data.scores import ScoreRow, ScoreTable
from gdro_cli.data.store import GroupStore
from gdro_cli.errors import PrerequisiteError, StoreError
from gdro_cli.files import read_object
from gdro_cli.identity import digest
from gdro_cli.suggest import similar

KIND = "imported"
NO_SCORE = "the imported data has no score of it"
_REMEDY = "delete it and import the scores again"

ImageKey = tuple[str, int]
"""Prompt id, and the image's index in its group."""


def imported_scores(store: GroupStore, name: str) -> ScoreTable:
    """The scores that were imported as ``name``. Raises PrerequisiteError if there are none."""
    names = imported_score_names(store)
    if name not in names:
        known = f"it has {', '.join(names)}" if names else "it has none"
        raise PrerequisiteError(
            f"the store {store.path} has no imported scores called {name}{similar(name, names)} ({known}):"
            " repeat gdro import if they came with the images, or bring them with gdro score --import FILE --name NAME"
        )
    return _open(store, name)


def imported_score_names(store: GroupStore) -> list[str]:
    """The names of the store's imported scores that are complete, sorted. Raises StoreError for a damaged table."""
    manifests = [read_object(path, remedy=_REMEDY) for path in (store.path / "scores").glob("*/manifest.json")]
    names = sorted(str(value["provenance"]["name"]) for value in manifests if value.get("name") == KIND)
    return [name for name in names if _open(store, name).accepted]


def write_imported_scores(store: GroupStore, name: str, scores: Mapping[ImageKey, float | str]) -> ScoreTable:
    """Keep scores as ``name``: the number of an image, or why it has none; an image that is not named has none.

    Raises:
        StoreError: the store has other scores of that name, or the disk refuses.
    """
    table = _open(store, name)
    for number, prompts in enumerate(store.shards):
        images = [(prompt.id, index) for prompt in prompts for index in range(store.sizes[prompt.id])]
        rows = [_row(image, scores.get(image, NO_SCORE)) for image in images]
        if not table.accepted:
            table.write_shard(number, rows)
        elif rows != table.read_shard(number):
            raise StoreError(
                f"the store {store.path} has other scores called {name}: give them another name, or delete {table.path}"
            )
    table.accept()
    return table


def content_version(table: ScoreTable) -> dict[str, str]:
    """What a training on imported scores depends on. Raises StoreError."""
    values = [row.value for row in table.rows()]
    return {KIND: str(table.provenance["name"]), "values": digest(values)}


def _open(store: GroupStore, name: str) -> ScoreTable:
    return ScoreTable.create_or_open(store, KIND, provenance={"name": name}, command="gdro score --import")


def _row(image: ImageKey, score: float | str) -> ScoreRow:
    value, reason = (None, score) if isinstance(score, str) else (score, None)
    return ScoreRow(*image, value, reason)
