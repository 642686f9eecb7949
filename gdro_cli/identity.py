"""The identity of a value: one fixed text and a short digest; and the differences between two values."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from pydantic import BaseModel

DIGEST_LENGTH = 12
"""Hexadecimal digits of a digest: 48 bits, enough to tell recipes apart and short enough to read."""


def canonical_json(value: BaseModel | Mapping[str, Any] | list[Any]) -> str:
    """Return the one text of a value: sorted keys, no spaces, ASCII. Equal values give equal texts."""
    return json.dumps(_plain(value), sort_keys=True, separators=(",", ":"), allow_nan=False)


def digest(value: BaseModel | Mapping[str, Any] | list[Any]) -> str:
    """Return the first 12 hexadecimal digits of the SHA-256 of the canonical JSON."""
    return hashlib.sha256(canonical_json(value).encode("ascii")).hexdigest()[:DIGEST_LENGTH]


@dataclass(frozen=True, slots=True)
class Difference:
    """One key whose value differs; a side without the key has the value None and ``present`` False."""

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
    """Return every key whose value differs, by dotted path, in the order of ``before``."""
    return tuple(_differences(_plain(before), _plain(after), prefix=""))


def _plain(value: Any) -> Any:
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
