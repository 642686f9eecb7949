"""Every key of a recipe with its type, default and meaning: for ``gdro recipes fields`` and suggestions."""

from __future__ import annotations

import json
import types
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from gdro_cli.config.methods import METHODS
from gdro_cli.config.rewards import IN_REGISTRY, REWARDS

_TYPE_NAMES: dict[Any, str] = {int: "whole number", float: "number", str: "text", bool: "true | false"}


@dataclass(frozen=True, slots=True)
class FieldDoc:
    """One key; ``section``: it only holds other keys; ``methods``: those that have it, if not all do."""

    path: str
    type: str
    default: str
    text: str
    section: bool = False
    methods: tuple[str, ...] = ()


@cache
def describe_fields() -> tuple[FieldDoc, ...]:
    """Every key in the order of the recipe, sections included."""
    from gdro_cli.config.recipe import Recipe

    return tuple(_walk(Recipe, prefix=""))


@cache
def field_names(*, sections: bool = False) -> tuple[str, ...]:
    """The dotted path of every key, with or without the sections themselves."""
    return tuple(doc.path for doc in describe_fields() if sections or not doc.section)


def _walk(model: type[BaseModel], *, prefix: str) -> Iterator[FieldDoc]:
    for name, field in model.model_fields.items():
        path = f"{prefix}{name}"
        annotation = field.annotation
        if path == "method":
            yield FieldDoc(path, "section", "", _text(field), section=True)
            yield from _method_fields()
        elif isinstance(annotation, type) and issubclass(annotation, BaseModel):
            yield FieldDoc(path, "section", "", _text(field), section=True)
            yield from _walk(annotation, prefix=f"{path}.")
        else:
            kind = " | ".join(REWARDS) if IN_REGISTRY in field.metadata else type_text(annotation)
            yield FieldDoc(path, kind, _default(field), _text(field))


def _method_fields() -> Iterator[FieldDoc]:
    yield FieldDoc("method.name", " | ".join(METHODS), "gdro", "Which method trains.")
    names = dict.fromkeys(name for model in METHODS.values() for name in model.model_fields if name != "name")
    for name in names:
        owners = tuple(method for method, model in METHODS.items() if name in model.model_fields)
        field = METHODS[owners[0]].model_fields[name]
        methods = owners if len(owners) < len(METHODS) else ()
        default = _default(field)
        for owner in owners[1:]:
            other = _default(METHODS[owner].model_fields[name])
            if other != _default(field):
                default += f" ({owner}: {other})"
        yield FieldDoc(f"method.{name}", type_text(field.annotation), default, _text(field), methods=methods)


def _text(field: FieldInfo) -> str:
    return " ".join((field.description or "").split())


def _default(field: FieldInfo) -> str:
    if field.is_required():
        return "(required)"
    value = field.get_default(call_default_factory=True, validated_data={})
    return "(nothing)" if value is None else value if isinstance(value, str) and value else json.dumps(value)


def type_text(annotation: Any) -> str:
    """A field's type as a reader of YAML says it: ``whole number``, ``png | webp``, ``list of text``."""
    origin, arguments = get_origin(annotation), get_args(annotation)
    if annotation in _TYPE_NAMES:
        return _TYPE_NAMES[annotation]
    if annotation is type(None):
        return "nothing"
    if origin is Annotated:
        return type_text(arguments[0])
    if origin is Literal:
        return " | ".join(str(argument) for argument in arguments)
    if origin in (Union, types.UnionType):
        return " | ".join(type_text(argument) for argument in arguments)
    if origin is tuple:
        inner = dict.fromkeys(type_text(argument) for argument in arguments if argument is not Ellipsis)
        return f"list of {', '.join(inner)}"
    if origin is dict:
        return f"section of {'numbers' if type_text(arguments[1]) == 'number' else 'lists'}"
    return "any value"
