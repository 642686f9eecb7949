"""What a value is known by: one fixed text, a short digest, and what differs between two values."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from pydantic import BaseModel

#: Hexadecimal digits kept of a sha256 digest: 48 bits, ample to tell recipes apart, short enough to read.
DIGEST_LENGTH = 12


def canonical_json(value: BaseModel | Mapping[str, Any] | list[Any]) -> str:
    """One fixed text per value: sorted keys, no spaces, ASCII; equal values give equal texts."""
    plain = value.model_dump(mode="json") if isinstance(value, BaseModel) else value
    return json.dumps(plain, sort_keys=True, separators=(",", ":"), ensure_ascii=True, allow_nan=False)


def digest(value: BaseModel | Mapping[str, Any] | list[Any]) -> str:
    """First 12 hexadecimal digits of the sha256 of the canonical JSON."""
    return hashlib.sha256(canonical_json(value).encode("ascii")).hexdigest()[:DIGEST_LENGTH]


@dataclass(frozen=True, slots=True)
class Difference:
    """One key whose value differs; a side that lacks the key has ``None`` and ``present`` false for it."""

    path: str
    before: Any
    after: Any
    before_present: bool = True
    after_present: bool = True

    @property
    def texts(self) -> tuple[str, str]:
        """Both values as JSON; ``(absent)`` for a side that lacks the key."""
        sides = ((self.before, self.before_present), (self.after, self.after_present))
        before, after = (json.dumps(value, ensure_ascii=False) if present else "(absent)" for value, present in sides)
        return before, after

    def __str__(self) -> str:
        return f"{self.path}: {' -> '.join(self.texts)}"


def differences(before: BaseModel | Mapping[str, Any], after: BaseModel | Mapping[str, Any]) -> tuple[Difference, ...]:
    """Every key whose value differs between two resolved recipes, by dotted path, in ``before``'s order."""
    return tuple(_differences(_plain(before), _plain(after), prefix=""))


def _plain(value: BaseModel | Mapping[str, Any]) -> Mapping[str, Any]:
    return value.model_dump(mode="json") if isinstance(value, BaseModel) else value


def _differences(before: Mapping[str, Any], after: Mapping[str, Any], *, prefix: str) -> Iterator[Difference]:
    for key in [*before, *(key for key in after if key not in before)]:
        path = f"{prefix}{key}"
        if key not in after:
            yield Difference(path, before[key], None, after_present=False)
        elif key not in before:
            yield Difference(path, None, after[key], before_present=False)
        elif isinstance(before[key], Mapping) and isinstance(after[key], Mapping):
            yield from _differences(before[key], after[key], prefix=f"{path}.")
        elif before[key] != after[key]:
            yield Difference(path, before[key], after[key])
