"""The one form that every table and folder is read into: prompts with their images, scores and weights."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from gdro_cli.data.own_data.cells import read_cell
from gdro_cli.data.records import PromptRecord
from gdro_cli.errors import UserError
from gdro_cli.identity import digest


@dataclass(frozen=True, slots=True)
class ImageSource:
    """Where the bytes of one image are: a file, or a cell of a parquet file."""

    path: Path
    """The image file, or the parquet file that holds it."""
    name: str
    """Relative to the folder of the data: ``images/a.png``, ``data.parquet row 3 jpg_0``."""
    row: int | None = None
    """The row in the parquet file, counted from 0."""
    column: str | None = None
    """The column in the parquet file."""
    item: int | None = None
    """The place in the cell, from 0, if the cell is a list of images."""
    cell_size: int = 0
    """Bytes of the cell."""

    def size(self) -> int:
        """Bytes of the encoded image. Raises UserError if the file cannot be read."""
        if self.row is not None:
            return self.cell_size
        try:
            return self.path.stat().st_size
        except OSError as error:
            raise self._unreadable(error.strerror or str(error)) from error

    def modified(self) -> int:
        """When its file was changed last, in nanoseconds. Raises UserError if the file cannot be read."""
        try:
            return self.path.stat().st_mtime_ns
        except OSError as error:
            raise self._unreadable(error.strerror or str(error)) from error

    def read(self) -> bytes:
        """The encoded image. Cells are cheap to read in the order of their rows. Raises UserError, with the name."""
        try:
            if self.row is not None and self.column is not None:
                return read_cell(self.path, row=self.row, column=self.column, item=self.item)
            return self.path.read_bytes()
        except OSError as error:
            raise self._unreadable(error.strerror or str(error)) from error
        except ValueError as error:
            raise self._unreadable(str(error)) from error

    def _unreadable(self, reason: str) -> UserError:
        return UserError(f"the image {self.name} cannot be read ({reason}): check {self.path}")


@dataclass(frozen=True, slots=True)
class OwnImage:
    """An image with its scores."""

    source: ImageSource
    scores: Mapping[str, float]
    """By name; a score that the data lacks is absent."""


@dataclass(frozen=True, slots=True)
class OwnGroup:
    """A prompt with its images."""

    record: PromptRecord
    images: tuple[OwnImage, ...]
    weight: float
    """How much the group counts in a training, 1 unless the data says otherwise."""
    where: str
    """For messages: ``data.jsonl line 12``."""
    source: ImageSource | None = None
    """The image that was edited, whose SHA-256 is in the record; None for a model that edits none."""


@dataclass(slots=True)
class OpenGroup:
    """A group that may still get images."""

    record: PromptRecord
    weight: float
    where: str
    source: ImageSource | None = None
    images: dict[str, OwnImage] = field(default_factory=dict)
    """By their names."""

    def add(self, image: OwnImage) -> None:
        """Add an image. Raises ValueError if the group has it."""
        if image.source.name in self.images:
            raise ValueError(f"the image {image.source.name} appears twice in the group of {self.where}; keep one")
        self.images[image.source.name] = image

    def close(self) -> OwnGroup:
        """The group with the images that it has."""
        return OwnGroup(self.record, tuple(self.images.values()), self.weight, self.where, self.source)


@dataclass(frozen=True, slots=True)
class OwnData:
    """Everything that was read from one path."""

    path: Path
    form: str
    """``scored groups``, ``rankings``, ``pairs``, ``demonstrations``, ``images with sidecar prompts`` or ``GenEval
    layout``."""
    groups: tuple[OwnGroup, ...]
    """Their records have different ids."""
    notes: tuple[str, ...]
    """What was left out or decided, with counts."""

    @property
    def score_names(self) -> tuple[str, ...]:
        """Names of the scores, in order of first appearance."""
        return tuple(dict.fromkeys(name for group in self.groups for image in group.images for name in image.scores))

    @property
    def digest(self) -> str:
        """Digest of the prompts, their weights, and the names of their images."""
        return digest(
            [[group.record.id, group.weight, [image.source.name for image in group.images]] for group in self.groups]
        )
