"""Score tables: the rewards of a store's images, beside them, one table per reward and provenance.

    store/scores/<digest>/manifest.json   name and provenance of the reward, digest of the store
                          00000.jsonl     the scores of shard 0: a line with the digests of the rows and of the shard,
                                          then a row per image

Scoring resumes shard by shard. If a shard was made again with other content, its scores are missing. A failed score has
a reason instead of a value; it is never zero.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

from gdro_cli.core.measures import Detail, measured
from gdro_cli.data.store import GroupStore
from gdro_cli.errors import StoreError
from gdro_cli.files import json_lines, parse_json, read_file, read_object, refuse_links, sha256, write_bytes, write_json
from gdro_cli.identity import canonical_json, digest

TABLE_SCHEMA = 1
_KIND = "gdro score table"
_ACCEPTED = "accepted"
_MANIFEST = "manifest.json"


@dataclass(frozen=True, slots=True)
class ScoreRow:
    """The score of one image: a finite ``value``, or ``None`` and the ``reason`` why it is missing."""

    prompt_id: str
    index: int
    """Index of the image in its group."""
    value: float | None
    reason: str | None = None
    details: Mapping[str, Any] = field(default_factory=dict, hash=False)
    """What else the reward measured, as JSON values."""

    def __post_init__(self) -> None:
        if (self.value is None) == (self.reason is None):
            raise ValueError("a score row has either a value or a reason why it is missing")
        if self.value is not None and not math.isfinite(self.value):
            raise ValueError(f"a score is a finite number, not {self.value}: use None and a reason")

    def measured(self, detail: Detail = None) -> float | None:
        """The score, the number or boolean ``details[detail]``, or the weighted mean of several details.

        None if it, or one of them, is missing.
        """
        try:
            return measured(detail, self.value, self.details)
        except TypeError as error:
            raise StoreError(
                f"the {error} of image {self.index} of prompt {self.prompt_id} is not a number: score the images again"
            ) from error

    @classmethod
    def from_json(cls, value: Any) -> Self:
        """Read the result of ``to_json``. Raises ValueError for anything else."""
        match value:
            case {
                "prompt_id": str(),
                "index": int(),
                "value": int() | float() | None,
                "reason": str() | None,
                "details": dict(),
                **other,
            } if not other:
                return cls(**value)
        raise ValueError("a row is not the score of an image")

    def to_json(self) -> dict[str, Any]:
        """The row as a JSON object."""
        row: dict[str, Any] = {"prompt_id": self.prompt_id, "index": self.index, "value": self.value}
        return row | {"reason": self.reason, "details": dict(self.details)}


def write_scores(path: Path, rows: Sequence[ScoreRow], **head: Any) -> None:
    """Write rows after a line with their digest and the values of ``head``. Raises StoreError."""
    lines = json_lines(row.to_json() for row in rows)
    write_bytes(path, json_lines([{**head, "sha256": sha256(lines)}]) + lines)


def read_scores(path: Path, images: Iterable[tuple[str, int]], *, remedy: str) -> list[ScoreRow]:
    """Read the rows of ``write_scores``, which must be those of these images (prompt id, index in the group).

    Raises StoreError if the file is missing or damaged.
    """
    head, _, lines = read_file(path, remedy=remedy).partition(b"\n")
    try:
        if parse_json(head)["sha256"] != sha256(lines):
            raise ValueError("its SHA-256 differs")
        rows = [ScoreRow.from_json(parse_json(line)) for line in lines.splitlines()]
    except (ValueError, TypeError, KeyError) as error:
        raise StoreError(f"{path} is damaged ({error}): {remedy}") from error
    if [(row.prompt_id, row.index) for row in rows] != list(images):
        raise StoreError(f"{path} is damaged (it has scores of other images): {remedy}")
    return rows


@dataclass(frozen=True, slots=True)
class ScoreSummary:
    """Numbers of images and scores in a table or its finished part, and their mean."""

    images: int
    scored: int
    mean: float | None
    """Mean of the scores; ``None`` without scores."""
    reasons: tuple[tuple[str, int], ...]
    """Why scores are missing, and how often, the most frequent first."""

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
        """Make or open the table of a reward. Another provenance has another table.

        Raises StoreError if the table is damaged or the folder cannot be written.
        """
        plain = json.loads(canonical_json(provenance))
        content: dict[str, Any] = {
            "kind": _KIND, "schema": TABLE_SCHEMA, "name": name, "provenance": plain, "store": store.digest
        }  # fmt: skip
        key = digest(content)
        path = store.path / "scores" / key
        refuse_links((path.parent, path))
        manifest, remedy = path / _MANIFEST, f"delete the folder {path} and run `{command}`"
        if not manifest.exists():
            write_json(manifest, content)
        elif read_object(manifest, remedy=remedy) != content:
            raise StoreError(f"{manifest} is damaged (it was changed): {remedy}")
        return cls(store, path, name, plain, key, command)

    @property
    def is_complete(self) -> bool:
        """Whether the store has all its shards, and all of them are scored. Raises StoreError for damaged files."""
        return not self.store.missing_shards() and not self.missing_shards()

    def missing_shards(self) -> list[int]:
        """Numbers of the shards without scores; the shards themselves must exist.

        Raises StoreError for damaged files or a missing shard.
        """
        return [number for number in range(len(self.store.shards)) if not self._is_scored(number)]

    def shards_with_failures(self) -> list[int]:
        """Numbers of the scored shards in which scores are missing. Raises StoreError for damaged files."""
        scored = [number for number in range(len(self.store.shards)) if self._is_scored(number)]
        return [number for number in scored if len(self.scored_rows(number)) < len(self._images(number))]

    def scored_rows(self, number: int) -> list[ScoreRow]:
        """The rows of shard ``number`` that have a value; none if it is not scored. Raises StoreError."""
        return [row for row in self.read_shard(number) if row.value is not None] if self._is_scored(number) else []

    def write_shard(self, number: int, rows: Sequence[ScoreRow]) -> None:
        """Write the rows of shard ``number``, all or nothing: one per image, in the order of ``store.images``.

        Raises ValueError if the rows have another order or are not JSON, and StoreError if the disk refuses.
        """
        if [(row.prompt_id, row.index) for row in rows] != self._images(number):
            raise ValueError(f"shard {number} needs one row per image, in the order of the store")
        write_scores(self._path(number), rows, **self._head(number))

    def read_shard(self, number: int) -> list[ScoreRow]:
        """The rows of one shard, digest checked. Raises StoreError if they are missing or damaged."""
        if not self._is_scored(number):
            raise StoreError(f"the score table {self.path} has no scores of shard {number:05d}: run `{self.command}`")
        return read_scores(self._path(number), self._images(number), remedy=self._remedy(number))

    @property
    def accepted(self) -> bool:
        """Whether a command has used the scores, so that they must not change any more."""
        return (self.path / _ACCEPTED).exists()

    def accept(self) -> None:
        """Note that a command uses the scores. Raises StoreError if the disk refuses."""
        if not self.accepted:
            write_bytes(self.path / _ACCEPTED, b"")

    def rows(self) -> Iterator[ScoreRow]:
        """Every row, in the order of the store's shards, prompts and images.

        Raises StoreError if some are missing.
        """
        for number in range(len(self.store.shards)):
            yield from self.read_shard(number)

    def summary(self) -> ScoreSummary:
        """Counts and mean of the shards that are scored. Raises StoreError for damaged files."""
        numbers = [number for number in range(len(self.store.shards)) if self._is_scored(number)]
        rows = [row for number in numbers for row in self.read_shard(number)]
        values = [row.value for row in rows if row.value is not None]
        reasons = Counter(row.reason for row in rows if row.reason is not None)
        mean = math.fsum(values) / len(values) if values else None
        return ScoreSummary(len(rows), len(values), mean, tuple(reasons.most_common()))

    def _is_scored(self, number: int) -> bool:
        """Whether a shard in its present state has scores."""
        path, head = self._path(number), self._head(number)
        if not path.exists():
            return False
        first, _, _ = read_file(path, remedy=self._remedy(number)).partition(b"\n")
        try:
            own = dict(parse_json(first))
        except (ValueError, TypeError) as error:
            raise StoreError(f"{path} is damaged (its first line is not JSON): {self._remedy(number)}") from error
        return all(own.get(key) == entry for key, entry in head.items())

    def _head(self, number: int) -> dict[str, Any]:
        return {"shard": number, "shard_digest": self.store.shard_digest(number), "table": self.digest}

    def _images(self, number: int) -> list[tuple[str, int]]:
        prompts = self.store.shards[number]
        return [(prompt.id, index) for prompt in prompts for index in range(self.store.sizes[prompt.id])]

    def _path(self, number: int) -> Path:
        return self.path / f"{number:05d}.jsonl"

    def _remedy(self, number: int) -> str:
        return f"delete it and run `{self.command}`, which scores shard {number:05d} again"
