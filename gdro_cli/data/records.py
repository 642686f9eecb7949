"""Prompt records: what every stage knows about a prompt, and the set of them that a run uses."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol, Self

from gdro_cli.identity import digest


class PromptReader(Protocol):
    """What knows which prompts can be used: a reward."""

    @property
    def name(self) -> str:
        """Its name, for messages."""
        ...

    @property
    def needs(self) -> frozenset[str]:
        """What a prompt must carry: ``target``, keys of its metadata, or nothing."""
        ...

    def read_prompt(self, prompt: str, *, target: str | None, metadata: Mapping[str, Any]) -> str | None:
        """Check a prompt and return its target. Raises ValueError saying what is missing or wrong."""
        ...


@dataclass(frozen=True, slots=True)
class PromptRecord:
    """One prompt. Two records with the same content have the same ``id``, wherever they come from."""

    id: str
    """First 12 hex digits of the SHA-256 of the canonical JSON of ``[prompt, target, metadata]``."""
    prompt: str
    """The text that the model is asked for."""
    target: str | None = None
    """The text that must be readable in the image; ``None`` where the prompt asks for none."""
    metadata: Mapping[str, Any] = field(default_factory=dict, hash=False)
    """Everything else a reward needs, as JSON values (GenEval: ``tag``, ``include``, ``exclude``)."""

    @classmethod
    def of(cls, prompt: str, *, target: str | None = None, metadata: Mapping[str, Any] | None = None) -> Self:
        """Make a record and its id. Raises ValueError where ``metadata`` holds what JSON cannot."""
        extra = dict(metadata or {})
        return cls(id=digest([prompt, target, extra]), prompt=prompt, target=target, metadata=extra)

    def to_json(self) -> dict[str, Any]:
        """The record as a JSON object."""
        return {"id": self.id, "prompt": self.prompt, "target": self.target, "metadata": dict(self.metadata)}

    @classmethod
    def from_json(cls, value: Any) -> Self:
        """Read ``to_json`` back.

        Raises ValueError when a field is wrong or the id does not belong to the content.
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
    """The prompts of one source, in order, none twice."""

    records: tuple[PromptRecord, ...]
    digest: str
    """Short digest of the ids in order: equal for equal sets."""
    dropped_duplicates: int = 0
    """How many records of the source were left out because the same one stood earlier."""

    @classmethod
    def of(cls, records: Iterable[PromptRecord]) -> Self:
        """Keep the first of equal records, count the others, and take the digest."""
        unique: dict[str, PromptRecord] = {}
        dropped = 0
        for record in records:
            dropped += record.id in unique
            unique.setdefault(record.id, record)
        return cls(tuple(unique.values()), digest(list(unique)), dropped)

    def first(self, count: int) -> Self:
        """The first ``count`` prompts as a set of their own."""
        kept = self.records[:count]
        return type(self)(kept, digest([record.id for record in kept]), self.dropped_duplicates)

    def __len__(self) -> int:
        return len(self.records)
