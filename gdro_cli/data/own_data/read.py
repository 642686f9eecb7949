"""Read a path of a user's own data, whatever its form."""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Iterator, Mapping
from hashlib import sha256
from pathlib import Path
from typing import Any

from gdro_cli.data.own_data.folder import read_images, tables_in
from gdro_cli.data.own_data.groups import ImageSource, OpenGroup, OwnData, OwnGroup, OwnImage
from gdro_cli.data.own_data.jsonl import SUFFIXES, Row, read_json_rows
from gdro_cli.data.own_data.lines import (
    HAS_LABEL,
    PAIRS,
    SCORED,
    Keys,
    find_keys,
    guess,
    ignored_keys,
    read_line,
    source_key,
    without_nesting,
)
from gdro_cli.data.own_data.parquet import SUFFIX, read_parquet_rows
from gdro_cli.data.own_data.paths import find_image
from gdro_cli.data.promptfile import MAX_PROBLEMS
from gdro_cli.data.records import IMAGE, PromptRecord
from gdro_cli.errors import UserError

GROUP = "group"
"""The key of the metadata that tells groups with the same prompt apart."""


def read_own_data(path: Path, *, edits: bool = False) -> OwnData:
    """Read prompts with their images, scores and weights. Images are found, but not decoded.

    Args:
        path: a table (``.jsonl``, ``.json``, ``.parquet``), a folder that holds one, or a folder of images; the forms
            are in docs/own-data.md.
        edits: whether the images are edited ones, so that each line of a table names the image that was edited.

    Raises:
        UserError: the path has no form that is known, or up to ten bad lines, each with what is wrong.
        PrerequisiteError: it is parquet and pyarrow is not installed.
    """
    path = Path(os.path.expanduser(path))
    if not path.exists():
        raise UserError(f"{path} does not exist: name a table or a folder of images")
    files = tables_in(path) if path.is_dir() else [path]
    return _Table(path, files[0].parent, edits=edits).read(files) if files else read_images(path)


def _rows(path: Path) -> Iterator[Row]:
    suffix = path.suffix.lower()
    if suffix == SUFFIX:
        return read_parquet_rows(path)
    if suffix in SUFFIXES:
        return read_json_rows(path)
    raise UserError(f"{path} is not a table: its name must end in {', '.join(SUFFIXES)} or {SUFFIX}")


class _Table:
    """The lines of a table, gathered into groups."""

    def __init__(self, path: Path, folder: Path, *, edits: bool) -> None:
        self.path = path
        self.folder = folder
        self.edits = edits
        self.digests: dict[Path, str] = {}
        """SHA-256 of source images that are files."""
        self.keys: Keys | None = None
        self.keys_from = ""
        self.groups: dict[str, OpenGroup] = {}
        self.numbers: dict[str, int] = {}
        """Id of a record -> how many groups have its prompt."""
        self.ignored: Counter[str] = Counter()
        self.guesses: dict[str, str] = {}
        self.seen: set[bytes] = set()
        self.repeated = 0
        self.unlabelled = 0
        self.problems: list[str] = []

    def read(self, files: list[Path]) -> OwnData:
        for file in files:
            for where, row in _rows(file):
                if file.suffix.lower() != SUFFIX and self._is_repeated(row):
                    continue
                try:
                    self._add(where, row, below=file.stem)
                except ValueError as error:
                    self.problems.append(f"{where}: {error}")
        if self.problems:
            raise UserError(self._summary())
        if self.keys is None or not self.groups:
            raise UserError(f"{self.path} has no data: write one prompt with its images per line")
        groups = tuple(group.close() for group in self.groups.values())
        if self.keys.form == SCORED and not any(image.scores for group in groups for image in group.images):
            raise UserError(f"{self.path} has no score, only null: leave the scores out, or give them")
        return OwnData(self.path, self.keys.form, groups, (*self._notes(), *_score_notes(groups, self.keys.form)))

    def _is_repeated(self, row: Mapping[str, Any]) -> bool:
        key = sha256(json.dumps(row, sort_keys=True).encode("ascii")).digest()
        is_repeated = key in self.seen
        self.seen.add(key)
        self.repeated += is_repeated
        return is_repeated

    def _add(self, where: str, row: Mapping[str, Any], *, below: str) -> None:
        """Add a line. Raises ValueError if it is wrong, UserError if its form is."""
        line = without_nesting(row, edits=self.edits)
        keys = self._form(where, line)
        for key in ignored_keys(line, keys, edits=self.edits):
            self.ignored[key] += 1
            self.guesses.setdefault(key, guess(key, line))
        if HAS_LABEL in keys.unused and line.get(HAS_LABEL) is False:
            self.unlabelled += 1
            return
        said = read_line(line, keys)
        source = find_image(line[source_key(line, keys)], self.folder, below=below) if self.edits else None
        record = said.record if source is None else self._editing(said.record, source)
        group = self.groups.get(record.id)
        is_new = group is None or not keys.one_image
        if group is None or not keys.one_image:
            group = OpenGroup(self._unique(record), said.weight, where, source)
        elif group.weight != said.weight:
            raise ValueError(
                f"weight is {said.weight:g}, and {group.weight:g} in {group.where}; a group has one weight"
            )
        for image, scores in said.images:
            group.add(OwnImage(find_image(image, self.folder, below=below), scores))
        if is_new:
            self.groups[group.record.id] = group

    def _editing(self, record: PromptRecord, source: ImageSource) -> PromptRecord:
        """The record with the digest of the image that it edits."""
        if IMAGE in record.metadata:
            raise ValueError(f"metadata {IMAGE} is the name of the source image's digest; rename yours")
        digest = self.digests.get(source.path) if source.row is None else None
        if digest is None:
            digest = sha256(source.read()).hexdigest()
            if source.row is None:
                self.digests[source.path] = digest
        return PromptRecord.of(record.prompt, target=record.target, metadata={**record.metadata, IMAGE: digest})

    def _form(self, where: str, line: Mapping[str, Any]) -> Keys:
        try:
            keys = find_keys(line)
        except ValueError as error:
            raise UserError(f"{self.folder / where}: {error}") from error
        if self.keys is None:
            self.keys, self.keys_from = keys, where
        elif self.keys is not keys:
            raise UserError(
                f"{self.folder / where} has {keys.text}, and {self.keys_from} has {self.keys.text}: write all lines"
                " alike, with null for a missing score"
            )
        return keys

    def _unique(self, record: PromptRecord) -> PromptRecord:
        """The record, with the number of its group if an earlier group has the same."""
        unique = record
        while unique.id in self.groups:
            if GROUP in record.metadata:
                raise ValueError(f"an earlier group has the same prompt, and metadata {GROUP} is in use; change it")
            self.numbers[record.id] = self.numbers.get(record.id, 1) + 1
            metadata = {**record.metadata, GROUP: str(self.numbers[record.id])}
            unique = PromptRecord.of(record.prompt, target=record.target, metadata=metadata)
        return unique

    def _summary(self) -> str:
        if len(self.problems) == 1:
            return f"{self.folder / self.problems[0]}"
        more = [f"and {len(self.problems) - MAX_PROBLEMS} more"] if len(self.problems) > MAX_PROBLEMS else []
        return f"{self.path} has {len(self.problems)} bad lines; " + "; ".join(self.problems[:MAX_PROBLEMS] + more)

    def _notes(self) -> Iterator[str]:
        if self.repeated:
            yield f"{_lines(self.repeated, 'repeats', 'repeat')} an earlier one and {_was(self.repeated)} left out"
        if self.unlabelled:
            what = _lines(self.unlabelled, "has", "have")
            yield f"{what} no preference ({HAS_LABEL}) and {_was(self.unlabelled)} left out"
        if self.ignored:
            listed = ", ".join(f"`{key}` in {_lines(n)}{self.guesses[key]}" for key, n in self.ignored.items())
            yield f"keys that no form has were ignored: {listed}"


def _score_notes(groups: tuple[OwnGroup, ...], form: str) -> Iterator[str]:
    """What the scores lack: ties, missing values, and spread."""
    images = [image for group in groups for image in group.images]
    for name in dict.fromkeys(name for image in images for name in image.scores):
        missing = sum(name not in image.scores for image in images)
        if missing:
            yield f"{missing} of {len(images)} images have no score `{name}`"
        flat = sum(len({image.scores[name] for image in group.images if name in image.scores}) < 2 for group in groups)
        if form == PAIRS and flat:
            yield f"{flat} tie{'s give' if flat > 1 else ' gives'} both images 0.5"
        if flat == len(groups):
            yield f"no group has two different scores `{name}`, so a training cannot learn from it"
        elif flat and form != PAIRS:
            yield f"{flat} of {len(groups)} groups have no two different scores `{name}`; a training leaves them out"


def _lines(count: int, singular: str = "", plural: str = "") -> str:
    return f"{count} line{'' if count == 1 else 's'} {singular if count == 1 else plural}".rstrip()


def _was(count: int) -> str:
    return "was" if count == 1 else "were"
