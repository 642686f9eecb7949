"""Reading YAML without its surprises, and writing YAML that is read back as it was.

Plain scalars follow YAML 1.2's core rules, so ``3e-4`` is a number, ``no`` is text and ``1:30`` is text. Repeated keys,
aliases, anchors and tags are refused.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import yaml

from gdro_cli.errors import UserError

#: A recipe is a page of text; a larger file was named by mistake.
MAX_BYTES = 1_000_000
#: Sections inside sections, and brackets inside brackets.
MAX_NESTING = 50

_WORDS = {
    **dict.fromkeys(("", "~", "null", "Null", "NULL")),
    **dict.fromkeys(("true", "True", "TRUE"), True),
    **dict.fromkeys(("false", "False", "FALSE"), False),
}
_INTEGER = re.compile(r"[-+]?[0-9]{1,19}")
"""Integers fit into 64 bits, as PyTorch's seeds must. Longer ones become floats, which integer keys refuse."""
_NUMBER = re.compile(
    r"[-+]?(?:\.[0-9]+|[0-9]+(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN)"
)


def parse_yaml(text: str, *, source: str) -> Any:
    """The value of a YAML text; ``UserError`` names the source, line and column of a fault."""
    try:
        return _document(yaml.parse(text, Loader=yaml.SafeLoader))
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        position = "" if mark is None else f" line {mark.line + 1}, column {mark.column + 1}"
        raise UserError(f"{source}:{position} is not valid YAML: {error.problem or error.context}") from error
    except yaml.YAMLError as error:  # a character that no YAML has
        raise UserError(f"{source} is not valid YAML: {' '.join(str(error).split())}") from error


def parse_value(text: str, *, source: str) -> Any:
    """The value of a YAML text of the command line. A comment is refused: it would be a part of the value, lost."""
    value = parse_yaml(text, source=source)
    tokens = list(yaml.scan(text, Loader=yaml.SafeLoader))
    for token, following in pairwise(tokens):
        between = text[token.end_mark.index : following.start_mark.index]
        if "#" in between:
            raise UserError(
                f"{source} has a # that YAML takes for a comment: put the text in quotes, as in --set 'name=\"a #1\"'"
            )
    return value


def _document(events: Iterator[Any]) -> Any:
    next(events)  # the start of the stream
    if isinstance(next(events), yaml.StreamEndEvent):
        return None
    value = _value(next(events), events, depth=0)
    next(events)  # the end of the document
    end = next(events)
    if not isinstance(end, yaml.StreamEndEvent):
        raise _fault("a second document begins here", end)
    return value


def _value(event: Any, events: Iterator[Any], *, depth: int) -> Any:
    """The value that begins with ``event``; the rest of its events are taken from ``events``."""
    if isinstance(event, yaml.AliasEvent):
        raise _fault("aliases (*name) are not supported", event)
    if event.anchor is not None or event.tag is not None:
        raise _fault("anchors (&name) and tags (!name) are not supported", event)
    if isinstance(event, yaml.ScalarEvent):
        return _plain(event.value) if event.implicit[0] else event.value
    if depth == MAX_NESTING:
        raise _fault("nested too deeply", event)
    if isinstance(event, yaml.MappingStartEvent):
        return _mapping(events, depth=depth + 1)
    items = []
    while not isinstance(item := next(events), yaml.SequenceEndEvent):
        items.append(_value(item, events, depth=depth + 1))
    return items


def _mapping(events: Iterator[Any], *, depth: int) -> dict[str, Any]:
    mapping: dict[str, Any] = {}
    while not isinstance(event := next(events), yaml.MappingEndEvent):
        key = _value(event, events, depth=depth)
        if not isinstance(key, str):
            name = shown(event.value) if isinstance(event, yaml.ScalarEvent) else describe(key)
            raise _fault(f"the key {name} is not a name: put it in quotes or correct it", event)
        if key in mapping:
            raise _fault(f"repeated key {describe(key)}", event)
        mapping[key] = _value(next(events), events, depth=depth)
    return mapping


def _plain(text: str) -> Any:
    """The value of a scalar without quotes."""
    if text in _WORDS:
        return _WORDS[text]
    if _INTEGER.fullmatch(text):
        return int(text)
    return float(text.lower().replace(".inf", "inf").replace(".nan", "nan")) if _NUMBER.fullmatch(text) else text


def _fault(reason: str, event: Any) -> yaml.MarkedYAMLError:
    return yaml.MarkedYAMLError(problem=reason, problem_mark=event.start_mark)


def read_yaml(path: Path) -> dict[str, Any]:
    """The mapping in a YAML file, empty for an empty file. Raises ``UserError``."""
    try:
        with path.open("rb") as file:
            content = file.read(MAX_BYTES + 1)
        if len(content) > MAX_BYTES:
            raise UserError(f"{path} has more than 1 MB and cannot be a recipe: name another file")
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not a text file in UTF-8: save it as UTF-8") from error
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror or error}") from error
    data = parse_yaml(text, source=str(path))
    if data is not None and not isinstance(data, dict):
        raise UserError(f"{path} must hold keys and values such as `name: ocr`, not {describe(data)}")
    return data or {}


class _Dumper(yaml.SafeDumper):
    """PyYAML writes text by the rules of YAML 1.1, which leave ``1e-5`` without quotes."""


def _write_text(dumper: yaml.SafeDumper, text: str) -> yaml.ScalarNode:
    quotes = None if isinstance(_plain(text), str) else "'"
    if not {"\x85", "\u2028", "\u2029"}.isdisjoint(text):  # line breaks to PyYAML, which other quotes would fold
        quotes = '"'
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style=quotes)


_Dumper.add_representer(str, _write_text)


def dump_yaml(value: object) -> str:
    """A plain value as a YAML file that ``parse_yaml`` reads back."""
    return yaml.dump(value, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=100)


def dump_yaml_line(value: object) -> str:
    """A plain value as YAML on one line, as ``--set`` takes it."""
    text = yaml.dump(value, Dumper=_Dumper, default_flow_style=True, allow_unicode=True, width=10**6)
    return text.removesuffix("\n").removesuffix("\n...")


def shown(name: str) -> str:
    """A name in a message: on one line, and at most 120 characters."""
    line = name if name.isprintable() else repr(name)[1:-1]
    return line if len(line) <= 120 else f"{line[:117]}..."


def describe(value: object) -> str:
    """A value in an error message: short, and a section or list by its kind."""
    if value is None:
        return "null"
    if isinstance(value, dict):
        return "a section"
    if isinstance(value, list | tuple):
        return f"a list of {len(value)}"
    if isinstance(value, bool):
        return "true" if value else "false"
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
