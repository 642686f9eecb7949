"""Score tables: the rewards of a store's images, kept beside them, one table per reward and provenance.

    store/scores/<digest>/manifest.json   name and provenance of the reward, the store it belongs to
                          00000.jsonl     the rows of shard 0, one image per line
                          00000.json      digests of 00000.jsonl and of the shard it scores; written last

Scoring resumes shard by shard. Rows of a shard that was made anew since are missing, not wrong. A failed
score has no value and a reason; it is never zero.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

from gdro_cli.core.measures import Detail
from gdro_cli.data.store import GroupStore
from gdro_cli.errors import StoreError
from gdro_cli.files import (
    json_lines,
    parse_json,
    read_bytes,
    remove_partials,
    remove_tree,
    sha256,
    storage_errors,
    write_bytes,
    write_json,
)
from gdro_cli.identity import canonical_json, digest

TABLE_SCHEMA = 1
_KIND = "gdro score table"
_MANIFEST = "manifest.json"


@dataclass(frozen=True, slots=True)
class ScoreRow:
    """The score of one image: a finite ``value``, or ``None`` with the ``reason`` why it is missing."""

    prompt_id: str
    index: int
    """Place of the image in its group."""
    value: float | None
    reason: str | None = None
    details: Mapping[str, Any] = field(default_factory=dict, hash=False)
    """What else the reward found, as JSON values."""

    def __post_init__(self) -> None:
        if (self.value is None) == (self.reason is None):
            raise ValueError("a score row has either a value or a reason why it is missing")
        if self.value is not None and not math.isfinite(self.value):
            raise ValueError(f"a score is a finite number, not {self.value}: use None and a reason")
        if self.reason is not None:  # it may name a file whose name is no text, which could not be read back
            object.__setattr__(self, "reason", self.reason.encode(errors="backslashreplace").decode())

    def measured(self, detail: Detail = None) -> float | None:
        """The score, the number (or truth value) ``details[detail]``, or the mean of several with their weights.

        None when it, or one of them, is missing.
        """
        if isinstance(detail, Mapping):
            values = {name: self.measured(name) for name, weight in detail.items() if weight}
            present = {name: value for name, value in values.items() if value is not None}
            if len(present) < len(values):
                return None
            return math.fsum(detail[name] * value for name, value in present.items()) / math.fsum(detail.values())
        value = self.value if detail is None else self.details.get(detail)
        if isinstance(value, str | list | dict):
            raise StoreError(
                f"the {detail} of image {self.index} of prompt {self.prompt_id} is no number: score the images again"
            )
        return None if value is None else float(value)

    @classmethod
    def from_json(cls, value: Any) -> Self:
        """Read ``to_json`` back. Raises ValueError for anything else."""
        kinds: dict[str, Any] = {
            "prompt_id": str,
            "index": int,
            "value": int | float | None,
            "reason": str | None,
            "details": dict,
        }
        if not isinstance(value, dict) or value.keys() != kinds.keys():
            raise ValueError(f"a score row has the keys {', '.join(kinds)}")
        for key, kind in kinds.items():
            if not isinstance(value[key], kind):
                raise ValueError(f"the {key} of a score row is of another kind")
        try:
            return cls(**value)
        except OverflowError as error:
            raise ValueError("a score is larger than any number") from error

    def to_json(self) -> dict[str, Any]:
        """The row as a JSON object."""
        row: dict[str, Any] = {"prompt_id": self.prompt_id, "index": self.index, "value": self.value}
        return row | {"reason": self.reason, "details": dict(self.details)}


@dataclass(frozen=True, slots=True)
class ScoreSummary:
    """How a table, or the part of it that is there, turned out."""

    images: int
    scored: int
    mean: float | None
    """Mean of the scores that are there; ``None`` without any."""
    reasons: tuple[tuple[str, int], ...]
    """Why scores are missing and how often, the most frequent first."""

    @property
    def missing_share(self) -> float:
        """Share (0..1) of images without a score."""
        return 1 - self.scored / self.images if self.images else 0.0


@dataclass(frozen=True, slots=True)
class ScoreTable:
    """The scores that one reward gives to the images of a store."""

    store: GroupStore
    path: Path
    name: str
    """The reward, e.g. ``ocr``."""
    provenance: Mapping[str, Any]
    """Versions, settings and weight digests of the reward, as JSON."""
    digest: str
    command: str = "gdro score"
    """The command that makes the scores, for messages."""

    @classmethod
    def create_or_open(
        cls, store: GroupStore, name: str, *, provenance: Mapping[str, Any], command: str = "gdro score"
    ) -> Self:
        """Make the table of a reward, or open the one that is there. Another provenance is another table.

        Raises StoreError when the table is damaged or the folder cannot be written.
        """
        known = json.loads(canonical_json(provenance))
        content: dict[str, Any] = {
            "kind": _KIND, "schema": TABLE_SCHEMA, "name": name, "provenance": known, "store": store.digest
        }  # fmt: skip
        key = digest(content)
        path = store.path / "scores" / key
        for folder in (path.parent, path):
            if folder.is_symlink():
                raise StoreError(f"{folder} is a link that leaves the store: delete it and run `{command}`")
        manifest = path / _MANIFEST
        held = _read_json(manifest)
        if held is None:
            write_json(manifest, content)
        elif held != content:
            raise StoreError(
                f"the score table {path} is damaged ({_MANIFEST} was changed): delete the folder and run `{command}`"
            )
        return cls(store, path, name, known, key, command)

    def missing_shards(self) -> list[int]:
        """Numbers of the store's shards without scores yet; the shards themselves have to be there.

        Raises StoreError for damaged files or a missing shard.
        """
        return [number for number in range(len(self.store.shards)) if self._manifest(number) is None]

    def write_shard(self, number: int, rows: Sequence[ScoreRow]) -> None:
        """Write the rows of shard ``number``, all or nothing: one per image, in the order of
        ``store.images``.

        Raises ValueError when the rows are not those or hold what JSON cannot, StoreError when the disk
        refuses.
        """
        if [(row.prompt_id, row.index) for row in rows] != self._slots(number):
            raise ValueError(f"shard {number} needs one row per image, in the order of the store")
        data = json_lines(row.to_json() for row in rows)
        path, manifest = self._rows_path(number), self._manifest_path(number)
        with storage_errors(path):
            for old in (manifest, path):
                remove_partials(old)
            remove_tree(manifest)
        write_bytes(path, data)
        write_json(manifest, self._head(number) | {"bytes": len(data), "sha256": sha256(data)})

    def read_shard(self, number: int) -> list[ScoreRow]:
        """The rows of one shard, digest checked. Raises StoreError when they are missing or damaged."""
        manifest = self._manifest(number)
        if manifest is None:
            raise StoreError(f"the score table {self.path} has no scores of shard {number:05d}: run `{self.command}`")
        path = self._rows_path(number)
        try:
            data = b"" if path.is_symlink() else read_bytes(path)
        except OSError as error:
            raise self._damaged(number, f"{path.name} cannot be read: {error.strerror or error}") from error
        if len(data) != manifest["bytes"]:
            raise self._damaged(number, f"{path.name} has {len(data)} bytes instead of {manifest['bytes']}")
        if sha256(data) != manifest["sha256"]:
            raise self._damaged(number, f"{path.name} was changed: its SHA-256 is another")
        try:
            rows = [ScoreRow.from_json(parse_json(line)) for line in data.splitlines()]
        except ValueError as error:
            raise self._damaged(number, f"{path.name} has a row that cannot be read") from error
        if [(row.prompt_id, row.index) for row in rows] != self._slots(number):
            raise self._damaged(number, f"{path.name} lists other images than the shard has")
        return rows

    def rows(self) -> Iterator[ScoreRow]:
        """Every row, in the order of the store's shards, prompts and images.

        Raises StoreError when some are missing.
        """
        for number in range(len(self.store.shards)):
            yield from self.read_shard(number)

    def summary(self) -> ScoreSummary:
        """Counts and mean of the shards that are scored. Raises StoreError for damaged files."""
        todo = set(self.missing_shards())
        rows = [
            row for number in range(len(self.store.shards)) if number not in todo for row in self.read_shard(number)
        ]
        values = [row.value for row in rows if row.value is not None]
        reasons = Counter(row.reason for row in rows if row.reason is not None)
        mean = math.fsum(values) / len(values) if values else None
        return ScoreSummary(len(rows), len(values), mean, tuple(reasons.most_common()))

    def _manifest(self, number: int) -> dict[str, Any] | None:
        """The manifest of a shard's scores, or ``None`` when there is none for the shard as it is now."""
        path = self._manifest_path(number)
        try:
            value = _read_json(path)
        except StoreError as error:
            raise self._damaged(number, f"{path.name} is not JSON") from error
        if value is None or not self._rows_path(number).exists():
            return None
        head = self._head(number)
        if not isinstance(value, dict) or set(value) != {*head, "bytes", "sha256"}:
            raise self._damaged(number, f"{path.name} has other keys than it needs")
        return value if all(value[key] == entry for key, entry in head.items()) else None

    def _head(self, number: int) -> dict[str, Any]:
        return {"shard": number, "shard_digest": self.store.shard_digest(number), "table": self.digest}

    def _slots(self, number: int) -> list[tuple[str, int]]:
        prompts = self.store.shards[number]
        return [(prompt.id, index) for prompt in prompts for index in range(self.store.images_per_prompt)]

    def _rows_path(self, number: int) -> Path:
        return self.path / f"{number:05d}.jsonl"

    def _manifest_path(self, number: int) -> Path:
        return self.path / f"{number:05d}.json"

    def _damaged(self, number: int, what: str) -> StoreError:
        return StoreError(
            f"the scores of shard {number:05d} in {self.path} are damaged ({what}): "
            f"delete {self._manifest_path(number)} and run `{self.command}`, which makes them again"
        )


def _read_json(path: Path) -> Any:
    """The JSON in a file, ``None`` when there is none. Raises StoreError."""
    try:
        return parse_json(read_bytes(path))
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as error:
        raise StoreError(f"{path} cannot be read: {error.strerror or error}; check its permissions") from error
    except ValueError as error:
        raise StoreError(
            f"{path} is damaged (it is not JSON): delete the folder {path.parent} and make it again"
        ) from error
