"""Tables of JSON: one object per line, or a ``.json`` file with an array of objects."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from reprlib import repr as shown
from typing import Any

from gdro_cli.errors import UserError
from gdro_cli.files import parse_json

SUFFIXES = (".jsonl", ".ndjson", ".json")
MAX_LINE_BYTES = 10_000_000
_LARGEST = 3.4028234663852886e38
"""The largest finite number in single precision, in which scores are trained on."""
"""More than any line of paths and numbers needs: a longer one is another kind of file."""

_UTF8_MARK = b"\xef\xbb\xbf"

Row = tuple[str, dict[str, Any]]
"""Where a row is (``data.jsonl line 12``), and its values."""


def read_json_rows(path: Path) -> Iterator[Row]:
    """The objects of a file in order. Blank lines are skipped.

    Raises:
        UserError: the file cannot be read, a line is not a JSON object, or it is longer than 10 MB.
    """
    try:
        with path.open("rb") as file:
            is_array = path.suffix.lower() == ".json" and file.read(64).removeprefix(_UTF8_MARK).lstrip()[:1] == b"["
        yield from _array(path) if is_array else _lines(path)
    except OSError as error:
        raise unreadable(path, error) from error


def unreadable(path: Path, error: OSError) -> UserError:
    """The error of a table that the operating system does not let us read."""
    return UserError(f"{path} cannot be read ({error.strerror or error}): check its name and permissions")


def finite_number(value: Any, name: str) -> float:
    """The value as a float. Raises ValueError, with the name, if it is not a finite number in single precision."""
    if isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= _LARGEST:
        return float(value)
    raise ValueError(f"{name} must be a finite number, not {shown(value)}")


def _lines(path: Path) -> Iterator[Row]:
    with path.open("rb") as file:
        number = 0
        while raw := file.readline(MAX_LINE_BYTES + 1):
            number += 1
            if len(raw) > MAX_LINE_BYTES:
                raise UserError(f"{path} line {number} is longer than 10 MB: write one object with paths per line")
            raw = raw.removeprefix(_UTF8_MARK).strip() if number == 1 else raw.strip()
            if raw:
                yield f"{path.name} line {number}", _object(raw, f"{path} line {number}")


def _array(path: Path) -> Iterator[Row]:
    entries = _parsed(path.read_bytes().removeprefix(_UTF8_MARK), str(path))
    for number, entry in enumerate(entries, start=1):
        if not isinstance(entry, dict):
            raise UserError(f'{path} entry {number} is not a JSON object: write {{"prompt": ...}}')
        yield f"{path.name} entry {number}", entry


def _object(raw: bytes, where: str) -> dict[str, Any]:
    value = _parsed(raw, where)
    if not isinstance(value, dict):
        raise UserError(f'{where} is not a JSON object: write one {{"prompt": ...}} per line')
    return value


def _parsed(raw: bytes, where: str) -> Any:
    try:
        return parse_json(raw)
    except json.JSONDecodeError as error:
        reason = f"{error.msg[:1].lower()}{error.msg[1:]} at character {error.pos + 1}"
        raise UserError(f"{where} is not JSON ({reason}): correct it") from error
    except UnicodeDecodeError as error:
        raise UserError(f"{where} is not UTF-8 (byte {error.start + 1}): save the file as UTF-8") from error
    except RecursionError as error:
        raise UserError(f"{where} has JSON that is nested too deeply: correct it") from error
    except ValueError as error:
        raise UserError(f"{where} has JSON that cannot be used ({error}): write null for a missing number") from error
