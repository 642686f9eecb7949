"""Validation that reports everything wrong with a recipe at once, each key by its dotted path."""

from __future__ import annotations

import copy
import re
from collections.abc import Mapping, Sequence
from typing import Any

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from gdro_cli.config.keys import field_names
from gdro_cli.config.methods import METHODS
from gdro_cli.config.recipe import Recipe
from gdro_cli.config.rules import Problem, problems
from gdro_cli.config.yamlfile import describe, shown
from gdro_cli.errors import UserError
from gdro_cli.suggest import similar, similar_key

MAX_PROBLEMS = 20
"""How many problems one message lists."""
#: pydantic's error types -> what the value must be.
_EXPECTED = {
    "int_type": "a whole number",
    "int_from_float": "a whole number",
    "float_type": "a number",
    "finite_number": "a finite number",
    "bool_type": "true or false",
    "string_type": "text",
    "string_unicode": "text",
    "string_too_short": "text that is not empty",
    "string_pattern_mismatch": "letters, digits, '.', '_' or '-', beginning with a letter or digit",
    "tuple_type": "a list",
    "dict_type": "a section of keys and values",
    "model_type": "a section of keys and values",
    "model_attributes_type": "a section of keys and values",
    "union_tag_not_found": "a section of keys and values",
}
#: The same for limits, with the name of the limit in the error's context.
_LIMITS = {
    "greater_than": ("gt", "greater than {}"),
    "greater_than_equal": ("ge", "at least {}"),
    "less_than": ("lt", "less than {}"),
    "less_than_equal": ("le", "at most {}"),
    "string_too_long": ("max_length", "text of at most {} letters"),
    "too_long": ("max_length", "a list of at most {} values"),
    "too_short": ("min_length", "a list of at least {} values"),
}


def validate(data: Mapping[str, Any], *, source: str) -> Recipe:
    """``data`` as a recipe, or a ``UserError`` with all its problems."""
    try:
        recipe = Recipe.model_validate(data)
    except ValidationError as error:
        details = error.errors(include_url=False)
        faults = _field_problems(details, data)
        raise _refusal([*faults, *_rule_problems_despite(faults, details, data)], source) from error
    broken = list(problems(recipe))
    if broken:
        raise _refusal(broken, source)
    return recipe


def _refusal(found: Sequence[Problem], source: str) -> UserError:
    lines = [f"{shown(problem.path)}: {problem.message}" for problem in found[:MAX_PROBLEMS]]
    if len(lines) == 1:
        return UserError(f"{source}: {lines[0]}")
    more = [f"and {len(found) - len(lines)} more"] if len(found) > len(lines) else []
    return UserError(f"{source} has {len(found)} problems:\n" + "\n".join(f"  {line}" for line in lines + more))


def _field_problems(details: Sequence[ErrorDetails], data: Mapping[str, Any]) -> list[Problem]:
    """One problem per key, in the order of the errors; the branches of a union become one sentence."""
    keys: dict[str, str] = {}
    values: dict[str, list[ErrorDetails]] = {}
    for detail in details:
        path = _path(detail)
        if detail["type"] == "missing":
            keys[path] = "is missing"
        elif detail["type"] == "extra_forbidden":
            keys[path] = _unknown(path, data) if len(keys) < MAX_PROBLEMS else "unknown key"
        else:
            values.setdefault(path, []).append(detail)
    # Where an element of a list is at fault, the other branches of the list's union add nothing.
    lists = {path[: match.start()] for path in values for match in re.finditer(r"\[", path)}
    wrong = [(path, own) for path, own in values.items() if path not in lists]
    found = [Problem(path, message) for path, message in keys.items()]
    return found + [Problem(path, _wrong(own, data, hint=n < MAX_PROBLEMS)) for n, (path, own) in enumerate(wrong)]


def _wrong(details: Sequence[ErrorDetails], data: Mapping[str, Any], *, hint: bool) -> str:
    """What a value must be, by all branches of its type, and what it is."""
    expected = " or ".join(dict.fromkeys(_expectation(detail) for detail in details))
    hints = (_value_hint(detail) for detail in details) if hint else ()
    return f"must be {expected}, not {describe(_input(details[-1], data))}{next(filter(None, hints), '')}"


def _rule_problems_despite(
    faults: Sequence[Problem], details: Sequence[ErrorDetails], data: Mapping[str, Any]
) -> list[Problem]:
    """The rules that the rest of the recipe breaks, without those that a faulty key has a part in."""
    rest = copy.deepcopy(dict(data))
    for detail in details:
        _remove(rest, _path(detail))
    rest.setdefault("name", "recipe")
    try:
        recipe = Recipe.model_validate(rest)
    except ValidationError:
        return []
    return [
        problem
        for problem in problems(recipe)
        if not any(_overlap(key, fault.path) for key in (problem.path, *problem.involves) for fault in faults)
    ]


def _overlap(one: str, other: str) -> bool:
    return one == other or one.startswith(f"{other}.") or other.startswith(f"{one}.")


def _remove(data: dict[str, Any], path: str) -> None:
    *parents, last = path.split("[", 1)[0].split(".")
    section: Any = data
    for parent in parents:
        section = section.get(parent) if isinstance(section, dict) else None
    if isinstance(section, dict):
        section.pop(last, None)


def _path(detail: ErrorDetails) -> str:
    """The dotted path of the key at fault, without pydantic's labels for the branches of unions."""
    path = ""
    model: type[BaseModel] | None = Recipe
    location = list(detail["loc"])
    for position, part in enumerate(location):
        if path == "method" and part in METHODS:
            model = METHODS[str(part)]
        elif isinstance(part, int):
            path += f"[{part}]"
        elif model is not None or path == "ablation" or path.endswith(".tags"):  # sections whose keys are free
            path += f".{part}" if path else part
            field = model.model_fields.get(part) if model is not None else None
            annotation = field.annotation if field is not None else None
            model = annotation if isinstance(annotation, type) and issubclass(annotation, BaseModel) else None
        elif position == len(location) - 1 and detail["type"] == "extra_forbidden":
            path += f".{part}"
    return f"{path}.name" if detail["type"] == "union_tag_invalid" else path


def _expectation(detail: ErrorDetails) -> str:
    kind, context = detail["type"], detail.get("ctx", {})
    if kind == "literal_error":
        return str(context["expected"])
    if kind == "union_tag_invalid":
        return f"one of {context['expected_tags']}"
    if kind in _LIMITS:
        name, phrase = _LIMITS[kind]
        limit = context[name]
        return phrase.format(f"{limit:g}" if isinstance(limit, float) else limit)
    return _EXPECTED.get(kind, detail["msg"])


def _input(detail: ErrorDetails, data: Mapping[str, Any]) -> Any:
    return data["method"]["name"] if detail["type"] == "union_tag_invalid" else detail["input"]


def _value_hint(detail: ErrorDetails) -> str:
    value = detail["input"]
    if detail["type"] == "literal_error" and isinstance(value, str):
        return similar(value, detail["ctx"]["expected"].split("'")[1::2])
    if detail["type"] == "union_tag_invalid":
        return similar(str(detail["ctx"]["tag"]), METHODS)
    return ""


def _unknown(path: str, data: Mapping[str, Any]) -> str:
    """The message about a key that the recipe, or its method, does not have."""
    method = data.get("method")
    if path.startswith("method.") and isinstance(method, Mapping):
        key = path.removeprefix("method.")
        owners = [name for name, model in METHODS.items() if key in model.model_fields]
        if owners:
            return f"the method {method.get('name')!r} has no such key (it belongs to {', '.join(owners)}): remove it"
        return f"unknown key{similar_key(path, field_names())}"
    return f"unknown key{similar_key(path, field_names(sections=True))}"
