"""Prompt files: one prompt per line, or JSON Lines.

Text files hold one prompt per line (Flow-GRPO's ``train.txt`` loads as it is). Files named ``.jsonl``,
``.ndjson`` or ``.json`` hold one JSON object per line: ``prompt``, optionally ``target``; every other key
becomes metadata. Blank lines are skipped. All bad lines of a file are reported at once, with their numbers.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NoReturn

from gdro_cli.data.records import PromptReader, PromptRecord
from gdro_cli.errors import UserError
from gdro_cli.files import small_integer

MAX_FILE_BYTES = 256 * 2**20
"""A larger file is not a prompt file: half a million long prompts fit."""
MAX_LINE_BYTES = 65_536
MAX_PROMPT_CHARS = 4_000
"""Far more than any text encoder reads (FLUX: 512 tokens)."""
MAX_PROBLEMS = 10
"""How many bad lines one message lists."""
_DEEPEST = 50
"""Lists and objects in each other; several hundred cannot be passed on to scoring processes."""
_MAX_KEYS = 8
"""How many keys of a line it lists."""

_JSON_SUFFIXES = {".jsonl", ".ndjson", ".json"}
_NOT_TEXT = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\ud800-\udfff]")
"""Control characters but tab and line ends, and halves of surrogate pairs."""
_UTF16_MARKS = (b"\xff\xfe", b"\xfe\xff")
_UTF8_MARK = b"\xef\xbb\xbf"


def read_prompt_file(path: Path, *, reward: PromptReader) -> list[PromptRecord]:
    """Read every prompt of ``path`` in file order, duplicates included.

    Args:
        path: the file; its name says whether it is JSON Lines.
        reward: says what a prompt must carry.

    Raises:
        UserError: naming the file and up to ten bad lines.
    """
    parse = _parse_json if path.suffix.lower() in _JSON_SUFFIXES else _parse_text
    records: list[PromptRecord] = []
    problems: list[str] = []
    for number, raw in _lines(path):
        try:
            line = _decode(raw).strip()
            if line:
                records.append(_record(*parse(line), reward=reward))
        except _BadLineError as error:
            problems.append(f"line {number}: {error}")
    if problems:
        raise UserError(_summary(path, problems))
    if not records:
        raise UserError(f"the prompt file {path} holds no prompts: write one prompt per line")
    return records


class _BadLineError(ValueError):
    """What is wrong with one line."""


def _summary(path: Path, problems: list[str]) -> str:
    if len(problems) == 1:
        return f"the prompt file {path} has a bad line; {problems[0]}"
    shown = problems[:MAX_PROBLEMS]
    more = [f"and {len(problems) - len(shown)} more"] if len(problems) > len(shown) else []
    return f"the prompt file {path} has {len(problems)} bad lines; " + "; ".join(shown + more)


def _lines(path: Path) -> Iterator[tuple[int, bytes]]:
    try:
        if not path.exists():
            raise UserError(f"the prompt file {path} does not exist: check the recipe's prompts section")
        if not path.is_file():
            raise UserError(f"the prompt file {path} is not a regular file: name a text or JSON Lines file")
        size = path.stat().st_size
        if size > MAX_FILE_BYTES:
            raise UserError(
                f"the prompt file {path} has {size} bytes, more than the {MAX_FILE_BYTES} allowed: split it"
            )
        data = path.read_bytes()
    except (OSError, ValueError) as error:
        reason = (error.strerror if isinstance(error, OSError) else None) or str(error)
        raise UserError(f"the prompt file {path} cannot be read: {reason}; check its name and permissions") from error
    if data.startswith(_UTF16_MARKS):
        raise UserError(f"the prompt file {path} is UTF-16: save it as UTF-8")
    data = data.removeprefix(_UTF8_MARK).replace(b"\r\n", b"\n").replace(b"\r", b"\n")
    yield from enumerate(data.split(b"\n"), start=1)


def _decode(raw: bytes) -> str:
    if len(raw) > MAX_LINE_BYTES:
        raise _BadLineError(f"it has {len(raw)} bytes, more than the {MAX_LINE_BYTES} allowed; is it a prompt file?")
    try:
        line = raw.decode("utf-8")
    except UnicodeDecodeError as error:
        raise _BadLineError(f"byte {error.start + 1} is not UTF-8; save the file as UTF-8") from error
    _check_characters(line, "it")
    return line


def _check_characters(text: str, what: str) -> None:
    found = _NOT_TEXT.search(text)
    if found is None:
        return
    if found.group() == "\0":
        raise _BadLineError(f"{what} contains a NUL character; remove it")
    raise _BadLineError(f"{what} contains the character U+{ord(found.group()):04X}, which is not text; remove it")


def _parse_text(line: str) -> tuple[str, str | None, dict[str, Any]]:
    if line.startswith("{") and line.endswith("}") and '"prompt"' in line:
        raise _BadLineError("it looks like JSON; name the file .jsonl to have it read as JSON Lines")
    return line, None, {}


def _parse_json(line: str) -> tuple[str, str | None, dict[str, Any]]:
    try:
        value = json.loads(line, object_pairs_hook=_unique_keys, parse_constant=_no_constant, parse_int=small_integer)
        json.dumps(value, allow_nan=False)
        if _depth(value) > _DEEPEST:
            raise RecursionError
    except json.JSONDecodeError as error:
        raise _BadLineError(f"it is not JSON ({error.msg.lower()} at character {error.pos + 1})") from error
    except RecursionError as error:
        raise _BadLineError("its JSON is nested too deeply") from error
    except ValueError as error:
        raise _BadLineError(f"its JSON cannot be used ({str(error).lower()})") from error
    if not isinstance(value, dict):
        raise _BadLineError('it is not a JSON object; write one {"prompt": ...} per line')
    if "prompt" not in value:
        raise _BadLineError(f"the key prompt is missing; found {_listed(value)}")
    prompt, target = value.pop("prompt"), value.pop("target", None)
    if not isinstance(prompt, str):
        raise _BadLineError(f"prompt must be a text, not {type(prompt).__name__}")
    if target is not None and not isinstance(target, str):
        raise _BadLineError(f"target must be a text, not {type(target).__name__}")
    for text in _texts(value):
        _check_characters(text, "its metadata")
    return prompt.strip(), target, value


def _listed(value: Mapping[str, Any]) -> str:
    """The first keys of an object."""
    keys = [key if len(key) <= 40 else f"{key[:37]}..." for key in sorted(value)]
    shown = ", ".join(keys[:_MAX_KEYS]) + (", ..." if len(keys) > _MAX_KEYS else "")
    return shown if shown.isprintable() and shown else repr(shown) if shown else "no keys"


def _depth(value: Any) -> int:
    """How many objects and lists lie in each other."""
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, list) else None
    return 0 if inner is None else 1 + max(map(_depth, inner), default=0)


def _texts(value: Any) -> Iterator[str]:
    """Every text in a JSON value, the keys of objects included."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for key, inner in value.items():
            yield key
            yield from _texts(inner)
    elif isinstance(value, list):
        for inner in value:
            yield from _texts(inner)


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError("a key stands twice")
    return found


def _no_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not a JSON number")


def _record(prompt: str, target: str | None, metadata: Mapping[str, Any], *, reward: PromptReader) -> PromptRecord:
    if not prompt:
        raise _BadLineError("the prompt is empty")
    if len(prompt) > MAX_PROMPT_CHARS:
        raise _BadLineError(f"the prompt has {len(prompt)} characters, more than the {MAX_PROMPT_CHARS} allowed")
    _check_characters(prompt, "the prompt")
    if target is not None:
        _check_characters(target, "the target")
    try:
        target = reward.read_prompt(prompt, target=target, metadata=metadata)
    except ValueError as error:
        raise _BadLineError(str(error)) from error
    return PromptRecord.of(prompt, target=target, metadata=metadata)
