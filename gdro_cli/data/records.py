"""Prompt records: a prompt with everything that the stages need, and the set of prompts that a run uses."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Protocol, Self

from gdro_cli.data.sources import SourceImage
from gdro_cli.identity import digest

if TYPE_CHECKING:
    from PIL import Image

IMAGE = "image"
"""The key of a prompt's source image: its path in a prompt file, its SHA-256 in the metadata of a record."""
_SHA256 = re.compile("[0-9a-f]{64}")


class PromptReader(Protocol):
    """The part of a reward that checks prompts."""

    @property
    def name(self) -> str:
        """Its name, for messages."""
        ...

    @property
    def needs(self) -> frozenset[str]:
        """What a prompt must carry: ``target``, keys of its metadata, or nothing."""
        ...

    def read_prompt(self, prompt: str, *, target: str | None, metadata: Mapping[str, Any]) -> str | None:
        """Check a prompt and return its target. Raises ValueError if something is missing or wrong."""
        ...


@dataclass(frozen=True, slots=True)
class PromptRecord:
    """One prompt. Records with the same content have the same ``id``, regardless of their source."""

    id: str
    """First 12 hex digits of the SHA-256 of the canonical JSON of ``[prompt, target, metadata]``."""
    prompt: str
    """The text that images are sampled for."""
    target: str | None = None
    """The text that must be readable in the image; ``None`` if the prompt asks for no text."""
    metadata: Mapping[str, Any] = field(default_factory=dict, hash=False)
    """Everything else that a reward needs, as JSON values (GenEval: ``tag``, ``include``, ``exclude``)."""
    image: SourceImage | None = field(default=None, compare=False)
    """The file of the source image; None if there is none, or if the record comes from a manifest."""

    @classmethod
    def of(
        cls,
        prompt: str,
        *,
        target: str | None = None,
        metadata: Mapping[str, Any] | None = None,
        image: SourceImage | None = None,
    ) -> Self:
        """Make a record and its id. The digest of ``image`` becomes part of the metadata.

        Raises ValueError if ``metadata`` is not JSON.
        """
        extra = dict(metadata or {}) | ({} if image is None else {IMAGE: image.sha256})
        return cls(digest([prompt, target, extra]), prompt, target, extra, image)

    @property
    def image_sha256(self) -> str | None:
        """The SHA-256 of the source image; None for a prompt that edits none."""
        value = self.metadata.get(IMAGE)
        return value if isinstance(value, str) and _SHA256.fullmatch(value) else None

    @property
    def source(self) -> Image.Image | None:
        """The source image in RGB, as the model sees it; None if there is none. Raises UserError."""
        return None if self.image is None else self.image.read()

    def to_json(self) -> dict[str, Any]:
        """The record as a JSON object."""
        return {"id": self.id, "prompt": self.prompt, "target": self.target, "metadata": dict(self.metadata)}

    @classmethod
    def from_json(cls, value: Any) -> Self:
        """Read the result of ``to_json``.

        Raises ValueError if a field is wrong or the id does not match the content.
        """
        if not isinstance(value, dict) or set(value) != {"id", "prompt", "target", "metadata"}:
            raise ValueError("a prompt record needs the keys id, prompt, target and metadata")
        name, prompt, target, metadata = value["id"], value["prompt"], value["target"], value["metadata"]
        if not isinstance(prompt, str) or not isinstance(target, str | None) or not isinstance(metadata, dict):
            raise ValueError(f"the prompt record {name!r} has a field of the wrong type")
        record = cls.of(prompt, target=target, metadata=metadata)
        if name != record.id:
            raise ValueError(f"the prompt record {name!r} was changed: its content has the id {record.id}")
        return record


@dataclass(frozen=True, slots=True)
class PromptSet:
    """The different prompts of one source, in order."""

    records: tuple[PromptRecord, ...]
    dropped_duplicates: int
    """How many records of the source were left out because an equal one came before."""
    remarks: tuple[str, ...] = field(default=(), compare=False)
    """What a user should know about the source, such as lines that were left out."""

    @classmethod
    def of(cls, records: Iterable[PromptRecord], remarks: Iterable[str] = ()) -> Self:
        """Keep the first of equal records, count the others, and add a remark about them."""
        listed = list(records)
        unique = {record.id: record for record in listed}
        dropped = len(listed) - len(unique)
        repeated = [f"prompts left out because they repeat earlier ones: {dropped}"] if dropped else []
        return cls(tuple(unique.values()), dropped, (*remarks, *repeated))

    @property
    def digest(self) -> str:
        """Short digest of the ids in order: equal for equal sets."""
        return digest([record.id for record in self.records])

    def at_size(self, height: int, width: int) -> Self:
        """The set with its source images brought to a size in pixels."""
        return replace(
            self,
            records=tuple(
                record if record.image is None else replace(record, image=replace(record.image, size=(height, width)))
                for record in self.records
            ),
        )

    def first(self, count: int) -> Self:
        """The set of the first ``count`` prompts."""
        return replace(self, records=self.records[:count])

    def __len__(self) -> int:
        return len(self.records)
