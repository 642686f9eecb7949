"""Prompt files: one prompt per line, or JSON Lines.

Text files have one prompt per line (Flow-GRPO's ``train.txt`` loads unchanged). Files named ``.jsonl``, ``.ndjson`` or
``.json`` have one JSON object per line with ``prompt`` and optionally ``target`` and ``image``, the path of the image
that the prompt edits; every other key becomes metadata.
Blank lines are skipped. All bad lines of a file are reported at once, with their numbers; on request they are left out
and counted.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from reprlib import repr as shown
from typing import Any

from gdro_cli.core.quotes import has_odd_mark, has_several
from gdro_cli.data.records import IMAGE, PromptReader, PromptRecord, PromptSet
from gdro_cli.data.sources import SourceImage, read_sources
from gdro_cli.errors import UserError
from gdro_cli.files import parse_json

MAX_PROMPT_CHARS = 4_000
"""Far more than any text encoder reads (FLUX: 512 tokens)."""
MAX_PROBLEMS = 10
"""How many bad lines one message lists."""
_SHOWN = 3
"""How many lines a remark shows."""

_JSON_SUFFIXES = {".jsonl", ".ndjson", ".json"}
_NOT_TEXT = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\ud800-\udfff]")
"""Control characters other than tab and line ends, and halves of surrogate pairs."""
_UTF8_MARK = b"\xef\xbb\xbf"


def read_prompt_file(path: Path, *, reward: PromptReader) -> list[PromptRecord]:
    """Read every prompt of ``path`` in file order, duplicates included.

    Args:
        path: the file; its suffix tells whether it is JSON Lines.
        reward: checks what a prompt carries.

    Raises:
        UserError: the message names the file and up to ten bad lines.
    """
    return _read(path, reward=reward, skip_bad=False)[0]


def read_prompt_set(path: Path, *, reward: PromptReader, skip_bad: bool = False) -> PromptSet:
    """Read the different prompts of ``path``, with remarks on lines that may not say what is meant.

    Args:
        path: the file; its suffix tells whether it is JSON Lines.
        reward: checks what a prompt carries.
        skip_bad: leave bad lines out, with a remark, instead of refusing the file.

    Raises:
        UserError: the message names the file and up to ten bad lines.
    """
    return PromptSet.of(*_read(path, reward=reward, skip_bad=skip_bad))


def _read(path: Path, *, reward: PromptReader, skip_bad: bool) -> tuple[list[PromptRecord], list[str]]:
    parse = _parse_json if path.suffix.lower() in _JSON_SUFFIXES else _parse_text
    parsed: list[tuple[int, _Line | ValueError]] = []
    for number, raw in _lines(path):
        try:
            if line := _decode(raw).strip():
                parsed.append((number, parse(line)))
        except ValueError as error:
            parsed.append((number, error))
    named = (line.image for _, line in parsed if isinstance(line, _Line) and line.image is not None)
    sources = read_sources(named, path.parent)
    records: list[PromptRecord] = []
    problems: list[str] = []
    several: list[str] = []
    odd: list[str] = []
    for number, said in parsed:
        try:
            if isinstance(said, ValueError):
                raise said
            record = _record(said, None if said.image is None else sources[said.image], reward=reward)
        except ValueError as error:
            problems.append(f"line {number}: {error}")
            continue
        prompt, target = said.prompt, said.target
        records.append(record)
        if target is None and record.target is not None:  # it was taken from the quotes
            if has_odd_mark(prompt):
                odd.append(f"line {number}: the target is {shown(record.target)}")
            elif has_several(prompt):
                several.append(str(number))
    if problems and not (skip_bad and records):
        raise UserError(_summary(path, problems))
    if not records:
        raise UserError(f"the prompt file {path} has no prompts: write one prompt per line")
    remarks = []
    if problems:
        remarks.append(f"bad lines left out: {len(problems)} ({_first(problems, '; ')})")
    if several:
        remarks.append(
            f"prompts with several quoted texts, of which the first is the target: {len(several)} (lines"
            f" {_first(several, ', ')})"
        )
    if odd:
        remarks.append(
            f"prompts with a double quote that has no partner: {len(odd)} ({_first(odd, '; ')}); if that is not the"
            " text to write, name it as `target` in JSON Lines"
        )
    return records, remarks


def _first(entries: list[str], separator: str) -> str:
    return separator.join(entries[:_SHOWN]) + (f"{separator}..." if len(entries) > _SHOWN else "")


def _summary(path: Path, problems: list[str]) -> str:
    if len(problems) == 1:
        return f"the prompt file {path} has a bad line; {problems[0]}"
    more = [f"and {len(problems) - MAX_PROBLEMS} more"] if len(problems) > MAX_PROBLEMS else []
    return f"the prompt file {path} has {len(problems)} bad lines; " + "; ".join(problems[:MAX_PROBLEMS] + more)


def _lines(path: Path) -> Iterator[tuple[int, bytes]]:
    try:
        data = path.read_bytes()
    except OSError as error:
        reason = error.strerror or str(error)
        raise UserError(f"the prompt file {path} cannot be read ({reason}): check its name and permissions") from error
    data = data.removeprefix(_UTF8_MARK).replace(b"\r\n", b"\n").replace(b"\r", b"\n")
    yield from enumerate(data.split(b"\n"), start=1)


def _decode(raw: bytes) -> str:
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"byte {error.start + 1} is not UTF-8; save the file as UTF-8") from error


def check_prompt(prompt: str, target: str | None) -> None:
    """Raise ValueError if the prompt is empty or too long, or if one of the texts has characters that are not text."""
    if not prompt:
        raise ValueError("the prompt is empty")
    if len(prompt) > MAX_PROMPT_CHARS:
        raise ValueError(f"the prompt has {len(prompt)} characters, more than the {MAX_PROMPT_CHARS} allowed")
    check_characters(prompt, "the prompt")
    if target is not None:
        check_characters(target, "the target")


def refuse_several(image: Any, key: str) -> None:
    """Raise ValueError if the value of ``key``, the image that a prompt edits, is a list."""
    if isinstance(image, list):
        raise ValueError(f"{key} is a list, and a prompt edits one image: name the path of one (docs/editing.md)")


def check_characters(text: str, what: str) -> None:
    """Raise ValueError, with ``what`` it is, if a text has control characters or halves of surrogate pairs."""
    match = _NOT_TEXT.search(text)
    if match is not None:
        raise ValueError(f"{what} contains the character U+{ord(match[0]):04X}, which is not text; remove it")


@dataclass(frozen=True, slots=True)
class _Line:
    """What a line says."""

    prompt: str
    target: str | None = None
    image: str | None = None
    metadata: Mapping[str, Any] = field(default_factory=dict)


def _parse_text(line: str) -> _Line:
    if line.startswith("{") and line.endswith("}") and '"prompt"' in line:
        raise ValueError("it looks like JSON; name the file .jsonl to have it read as JSON Lines")
    return _Line(line)


def _parse_json(line: str) -> _Line:
    try:
        value = parse_json(line)
    except json.JSONDecodeError as error:
        raise ValueError(f"it is not JSON ({error.msg.lower()} at character {error.pos + 1})") from error
    except ValueError as error:
        raise ValueError(f"its JSON cannot be used ({error})") from error
    if not isinstance(value, dict):
        raise ValueError('it is not a JSON object; write one {"prompt": ...} per line')
    if "prompt" not in value:
        raise ValueError(f"the key prompt is missing; the keys are {shown(sorted(value))}")
    prompt, target, image = value.pop("prompt"), value.pop("target", None), value.pop(IMAGE, None)
    if not isinstance(prompt, str):
        raise ValueError(f"prompt must be a text, not {type(prompt).__name__}")
    if target is not None and not isinstance(target, str):
        raise ValueError(f"target must be a text, not {type(target).__name__}")
    if image is not None:
        refuse_several(image, IMAGE)
        if not isinstance(image, str) or not image:
            raise ValueError(f"image must be the path of the image to edit, not {shown(image)}")
        check_characters(image, "the path of the image")
    return _Line(prompt.strip(), target, image, value)


def _record(line: _Line, source: SourceImage | str | None, *, reward: PromptReader) -> PromptRecord:
    """The record of a line; ``source`` is its image, or what is wrong with it. Raises ValueError."""
    check_prompt(line.prompt, line.target)
    if isinstance(source, str):
        raise ValueError(source)
    record = PromptRecord.of(line.prompt, target=line.target, metadata=line.metadata, image=source)
    target = reward.read_prompt(record.prompt, target=record.target, metadata=record.metadata)
    return PromptRecord.of(line.prompt, target=target, metadata=line.metadata, image=source)
