"""Every key of a recipe: its type, default and meaning (``gdro recipes fields``), who uses it, what it affects."""

from __future__ import annotations

import json
import types
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cache, reduce
from typing import Annotated, Any, Literal, TypeVar, Union, get_args, get_origin

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from gdro_cli.config.base import Affects, Effect, FallsBackTo, StoredGroupsOnly
from gdro_cli.config.methods import METHODS, AnyMethod, GroupMethod
from gdro_cli.config.recipe import Recipe
from gdro_cli.config.rewards import IN_REGISTRY, reward_names
from gdro_cli.config.schema import OWN_KEYS, full_schema

SHORT_NAMES = {
    "method": "method.name",
    "lr": "train.lr",
    "rank": "train.lora.rank",
    "alpha": "train.lora.alpha",
}
"""Short names of keys. A key of `method` needs no entry: `tau` is `method.tau`."""
_TYPE_NAMES: dict[Any, str] = {int: "whole number", float: "number", str: "text", bool: "true | false"}
_STORED = tuple(name for name, model in METHODS.items() if issubclass(model, GroupMethod))
"""The methods that train on stored groups."""

_Note = TypeVar("_Note", Affects, StoredGroupsOnly, FallsBackTo)


@dataclass(frozen=True, slots=True)
class FieldDoc:
    """One key, or one section."""

    path: str
    type: str
    default: str
    text: str
    section: bool
    """Whether it only contains other keys."""
    methods: tuple[str, ...]
    """The methods that use it; empty for all."""
    reward: str | None
    """The reward that it is a setting of."""
    instead: str | None
    """The key that the other methods have instead."""
    affects: frozenset[Effect]
    falls_back_to: str | None
    """The key whose value counts if this one is not set."""


@cache
def _docs(schema: type[Recipe]) -> dict[str, FieldDoc]:
    return {doc.path: doc for doc in _walk(schema, prefix="", notes=())}


def describe_fields(schema: type[Recipe] | None = None) -> tuple[FieldDoc, ...]:
    """Every key and section in the order of the recipe.

    ``schema`` is the class of the recipe that is asked about (``gdro_cli.config.schema``). Default, also below: the one
    with all built-in rewards.
    """
    return tuple(_docs(schema or full_schema()).values())


@cache
def _names(schema: type[Recipe], sections: bool) -> tuple[str, ...]:
    return tuple(doc.path for doc in describe_fields(schema) if sections or not doc.section)


def field_names(schema: type[Recipe] | None = None, *, sections: bool = False) -> tuple[str, ...]:
    """The dotted path of every key, with or without the sections."""
    return _names(schema or full_schema(), sections)


def field_doc(path: str, schema: type[Recipe] | None = None) -> FieldDoc:
    """The key or section at a dotted path. Raises KeyError."""
    return _docs(schema or full_schema())[path]


def full_key(name: str, schema: type[Recipe] | None = None) -> str | None:
    """The dotted path of the recipe key with this full or short name, or None."""
    candidates = (name, SHORT_NAMES.get(name, ""), f"method.{name}")
    return next((key for key in candidates if key in field_names(schema)), None)


def foreign_keys(method: str) -> dict[str, FieldDoc]:
    """The keys that a method does not use, by path."""
    return {doc.path: doc for doc in describe_fields() if doc.methods and method not in doc.methods}


def values_that_affect(recipe: Recipe, *effects: Effect) -> dict[str, Any]:
    """The values of the keys with one of the effects, nested in their sections, as plain JSON.

    Keys that the recipe's method or reward does not use are left out. A key that is not set has the value of the key it
    falls back to.
    """
    resolved = recipe.resolved()
    chosen: dict[str, Any] = {}
    for doc in describe_fields(type(recipe)):
        if doc.affects.isdisjoint(effects) or not _uses(recipe, doc):
            continue
        *sections, name = doc.path.split(".")
        value = _value(resolved, doc.path)
        if value is None and doc.falls_back_to is not None:
            value = _value(resolved, doc.falls_back_to)
        reduce(lambda section, part: section.setdefault(part, {}), sections, chosen)[name] = value
    return chosen


def _uses(recipe: Recipe, doc: FieldDoc) -> bool:
    return not (doc.methods and recipe.method.name not in doc.methods) and doc.reward in (
        None,
        recipe.reward.kind,
        *recipe.reward.parts,
    )


def _value(resolved: dict[str, Any], path: str) -> Any:
    return reduce(lambda section, part: section[part], path.split("."), resolved)


def settings_that_affect(settings: BaseModel, *effects: Effect) -> dict[str, Any]:
    """The values of a reward's settings with one of the effects, by path, as plain JSON."""
    notes = Recipe.model_fields["reward"].metadata
    values = settings.model_dump(mode="json")
    docs = (doc for doc in _walk(type(settings), prefix="", notes=notes) if not doc.section)
    return {doc.path: _value(values, doc.path) for doc in docs if not doc.affects.isdisjoint(effects)}


def _walk(model: type[BaseModel], *, prefix: str, notes: Sequence[object]) -> Iterator[FieldDoc]:
    """The fields of a section. ``notes`` are the annotations of the sections around it, innermost last."""
    for name, field in model.model_fields.items():
        path, own = f"{prefix}{name}", (*notes, *field.metadata)
        inner = field.annotation
        if path == "method":
            yield _doc(path, field, own, section=True)
            yield from _method_fields(own)
        elif isinstance(inner, type) and issubclass(inner, BaseModel):
            yield _doc(path, field, own, section=True)
            yield from _walk(inner, prefix=f"{path}.", notes=own)
        else:
            yield _doc(path, field, own)


def _method_fields(notes: Sequence[object]) -> Iterator[FieldDoc]:
    name = _doc("method.name", AnyMethod.model_fields["name"], notes)
    yield replace(name, type=" | ".join(METHODS), default="gdro")
    for key in dict.fromkeys(key for model in METHODS.values() for key in model.model_fields if key != "name"):
        fields = {method: model.model_fields[key] for method, model in METHODS.items() if key in model.model_fields}
        field = next(iter(fields.values()))
        doc = _doc(f"method.{key}", field, (*notes, *field.metadata))
        defaults = {method: _default(other) for method, other in fields.items()}
        others = "".join(f" ({method}: {value})" for method, value in defaults.items() if value != doc.default)
        methods = tuple(fields) if len(fields) < len(METHODS) else ()
        yield replace(doc, default=doc.default + others, methods=methods)


def _doc(path: str, field: FieldInfo, notes: Sequence[object], *, section: bool = False) -> FieldDoc:
    affects, stored, fallback = _last(notes, Affects), _last(notes, StoredGroupsOnly), _last(notes, FallsBackTo)
    parts = path.split(".")
    return FieldDoc(
        path=path,
        type="section" if section else _type_of(field),
        default="" if section else _default(field),
        text=" ".join((field.description or "").split()),
        section=section,
        methods=() if stored is None else _STORED,
        reward=parts[1] if parts[0] == "reward" and parts[1:] and parts[1] not in OWN_KEYS else None,
        instead=None if stored is None else stored.instead,
        affects=frozenset() if section or affects is None else affects.effects,
        falls_back_to=None if fallback is None else fallback.key,
    )


def _last(notes: Sequence[object], kind: type[_Note]) -> _Note | None:
    return next((note for note in reversed(notes) if isinstance(note, kind)), None)


def _default(field: FieldInfo) -> str:
    if field.is_required():
        return "(required)"
    value = field.get_default(call_default_factory=True, validated_data={})
    return value if isinstance(value, str) and value else json.dumps(value)


def _type_of(field: FieldInfo) -> str:
    return " | ".join(reward_names()) if IN_REGISTRY in field.metadata else _type_text(field.annotation)


def _type_text(annotation: Any) -> str:
    """A type in words for readers of YAML: ``whole number``, ``png | webp``, ``list of text``."""
    origin, arguments = get_origin(annotation), get_args(annotation)
    if annotation in _TYPE_NAMES:
        return _TYPE_NAMES[annotation]
    if annotation is type(None):
        return "null"
    if origin is Annotated:
        return _type_text(arguments[0])
    if origin is Literal:
        return " | ".join(str(argument) for argument in arguments)
    if origin in (Union, types.UnionType):
        return " | ".join(_type_text(argument) for argument in arguments)
    if origin is tuple:
        inner = dict.fromkeys(_type_text(argument) for argument in arguments if argument is not Ellipsis)
        return f"list of {', '.join(inner)}"
    if origin is dict:
        return f"section of {'numbers' if _type_text(arguments[1]) == 'number' else 'lists'}"
    return "any value"
