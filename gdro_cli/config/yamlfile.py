"""Reading YAML without its surprises.

Plain scalars follow YAML 1.2's core rules, so ``3e-4`` is a number, ``no`` is text and ``1:30`` is text; a
repeated key and an alias are refused rather than resolved in silence.
"""

from __future__ import annotations

import re
from collections.abc import Hashable
from pathlib import Path
from typing import Any

import yaml

from gdro_cli.errors import UserError

#: A recipe is a page of text; anything larger is another file given by mistake.
MAX_BYTES = 1_000_000


#: Brackets inside brackets; PyYAML takes minutes over thousands.
MAX_NESTING = 50

_TAG = "tag:yaml.org,2002:"
#: Dates, sets and bytes are nothing that a recipe has.
_KINDS = ("null", "bool", "int", "float", "str", "seq", "map")
#: NUL, and halves of surrogate pairs, which can be written as escapes and are no text.
_NOT_TEXT = re.compile("[\0\ud800-\udfff]")


class _Loader(yaml.SafeLoader):
    """SafeLoader with YAML 1.2 scalars, no aliases, no repeated keys, no tags but those of plain values."""

    yaml_implicit_resolvers: dict[str, list[tuple[str, re.Pattern[str]]]] = {}  # noqa: RUF012 (PyYAML's own interface)

    def construct_object(self, node: yaml.Node, deep: bool = False) -> Any:
        kind = node.tag.removeprefix(_TAG)
        if kind not in _KINDS:
            raise _refusal(f"the tag {describe(kind)} is not supported", node.start_mark)
        try:
            return super().construct_object(node, deep=deep)
        except (LookupError, ValueError) as error:  # an explicit tag on what it does not fit
            raise _refusal(f"{describe(node.value)} cannot be read as {kind}", node.start_mark) from error

    def construct_scalar(self, node: yaml.ScalarNode | yaml.MappingNode) -> str:
        found = _NOT_TEXT.search(node.value) if isinstance(node.value, str) else None
        if found is not None:
            raise _refusal(f"the character U+{ord(found[0]):04X} is not text", node.start_mark)
        return super().construct_scalar(node)

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        if self.check_event(yaml.AliasEvent):
            event = self.peek_event()  # type: ignore[no-untyped-call]
            raise yaml.constructor.ConstructorError(None, None, "aliases (*name) are not supported", event.start_mark)
        return super().compose_node(parent, index)

    def fetch_flow_collection_start(self, token_class: type[yaml.Token]) -> None:
        if self.flow_level >= MAX_NESTING:
            raise _refusal("nested too deeply", self.get_mark())
        super().fetch_flow_collection_start(token_class)

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        seen: set[str] = set()
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode):
                raise yaml.constructor.ConstructorError(None, None, "a key must be a plain name", key.start_mark)
            if key.value in seen:
                raise yaml.constructor.ConstructorError(
                    None, None, f"repeated key {describe(key.value)}", key.start_mark
                )
            seen.add(key.value)
        return super().construct_mapping(node, deep)


def _refusal(reason: str, mark: yaml.Mark) -> yaml.MarkedYAMLError:
    return yaml.constructor.ConstructorError(None, None, reason, mark)


def _add_scalars() -> None:
    """YAML 1.2 core schema: null, booleans, decimal integers and decimal numbers; all else is text."""
    for tag, pattern, first in (
        ("tag:yaml.org,2002:null", r"^(?:~|null|Null|NULL|)$", ["~", "n", "N", ""]),
        ("tag:yaml.org,2002:bool", r"^(?:true|True|TRUE|false|False|FALSE)$", list("tTfF")),
        ("tag:yaml.org,2002:int", r"^[-+]?[0-9]+$", list("-+0123456789")),
        (
            "tag:yaml.org,2002:float",
            r"^[-+]?(?:\.[0-9]+|[0-9]+(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?$|^[-+]?\.(?:inf|Inf|INF)$|^\.(?:nan|NaN|NAN)$",
            list("-+0123456789."),
        ),
    ):
        _Loader.add_implicit_resolver(tag, re.compile(pattern), first)


def _construct_int(loader: yaml.SafeLoader, node: yaml.ScalarNode) -> int:
    return int(loader.construct_scalar(node))  # PyYAML's own would read 010 as octal 8


_add_scalars()
_Loader.add_constructor("tag:yaml.org,2002:int", _construct_int)


def parse_yaml(text: str, *, source: str) -> Any:
    """The value that a YAML text stands for; ``UserError`` names the source, line and column of a fault."""
    try:
        return yaml.load(text, Loader=_Loader)  # a subclass of SafeLoader
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        where = f" line {mark.line + 1}, column {mark.column + 1}" if mark is not None else ""
        raise UserError(f"{source}:{where} is not valid YAML: {error.problem or error.context}.") from error
    except (yaml.YAMLError, ValueError) as error:
        reason = " ".join(str(error).split())
        raise UserError(f"{source} is not valid YAML: {reason}.") from error
    except RecursionError as error:
        raise UserError(f"{source} is not valid YAML: nested too deeply.") from error


def read_yaml(path: Path) -> dict[str, Any]:
    """The mapping in a YAML file, empty for an empty file; ``UserError`` where it cannot be read."""
    try:
        with path.open("rb") as file:
            held = file.read(MAX_BYTES + 1)  # it may be a pipe or a device that does not end
        if len(held) > MAX_BYTES:
            raise UserError(f"{path} has more than 1 MB and cannot be a recipe: name another file.")
        text = held.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not a text file in UTF-8: save it as UTF-8.") from error
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror or error}.") from error
    data = parse_yaml(text, source=str(path))
    if data is None:
        return {}
    if not isinstance(data, dict):
        raise UserError(f"{path} must hold keys and values such as `name: ocr`, not {describe(data)}.")
    check_keys(data, source=str(path))
    return data


def check_keys(data: dict[Any, Any], *, source: str) -> None:
    """``UserError`` for a key, at any depth of sections, that is not text."""
    for key, value in data.items():
        if not isinstance(key, str):
            raise UserError(f"{source}: the key {shown(repr(key))} is not a name: put it in quotes or correct it.")
        if isinstance(value, dict):
            check_keys(value, source=source)


def shown(name: str) -> str:
    """A name in a message: on one line, and cut where it is longer than anyone reads."""
    line = name if name.isprintable() else repr(name)[1:-1]
    return line if len(line) <= 120 else f"{line[:117]}..."


def describe(value: object) -> str:
    """A value as an error message names it: short, and with its kind where that is the point."""
    if value is None:
        return "nothing"
    if isinstance(value, dict):
        return "a section"
    if isinstance(value, list | tuple):
        return f"a list of {len(value)}"
    if isinstance(value, bool):
        return "true" if value else "false"
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
