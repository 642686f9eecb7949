"""Validation that reports everything wrong with a recipe at once, each key by its dotted path."""

from __future__ import annotations

import copy
import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from gdro_cli.config.keys import field_names
from gdro_cli.config.methods import METHODS
from gdro_cli.config.rules import Problem
from gdro_cli.config.suggest import similar, similar_key
from gdro_cli.config.yamlfile import describe, shown
from gdro_cli.errors import UserError

if TYPE_CHECKING:
    from gdro_cli.config.recipe import Recipe

_RULES = "recipe_rules"
MAX_PROBLEMS = 20
"""How many problems one message lists."""
_MOST_HINTS = 100
"""Unknown keys and values that are compared with the known ones: a file that has more is no recipe."""
#: pydantic's error types -> what the value must be.
_EXPECTED = {
    "int_type": "a whole number",
    "int_from_float": "a whole number",
    "float_type": "a number",
    "finite_number": "a finite number",
    "bool_type": "true or false",
    "string_type": "text",
    "string_too_short": "text that is not empty",
    "string_pattern_mismatch": "letters, digits, '.', '_' or '-', beginning with a letter or digit",
    "tuple_type": "a list",
    "dict_type": "a section of keys and values",
    "model_type": "a section of keys and values",
    "model_attributes_type": "a section of keys and values",
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


def validate(model: type[Recipe], data: Mapping[str, Any], *, source: str) -> Recipe:
    """``data`` as a recipe, or a ``UserError`` with all its problems."""
    try:
        return model.model_validate(data)
    except ValidationError as error:
        found = [*_broken_rules(error), *_field_problems(error, data)]
        if not _broken_rules(error):  # the rules between keys only run once every single key is valid
            found += _rules_despite(model, data, error, found)
    lines = [f"{shown(problem.path)}: {problem.message}" for problem in found[:MAX_PROBLEMS]]
    if len(lines) == 1:
        raise UserError(f"{source}: {lines[0]}" + ("" if lines[0].endswith("?") else "."))
    more = [f"and {len(found) - len(lines)} more"] if len(found) > len(lines) else []
    raise UserError(f"{source} has {len(found)} problems:\n" + "\n".join(f"  {line}" for line in lines + more))


def _broken_rules(error: ValidationError) -> list[Problem]:
    return [problem for e in error.errors() if e["type"] == _RULES for problem in e["ctx"]["problems"]]


def _field_problems(error: ValidationError, data: Mapping[str, Any]) -> list[Problem]:
    """One problem per key, in the order of the errors; the branches of a union become one sentence."""
    expected: dict[str, list[str]] = {}
    inputs: dict[str, Any] = {}
    hints: dict[str, str] = {}
    whole: dict[str, Problem] = {}
    for detail in error.errors(include_url=False):
        path = _path(detail)
        if detail["type"] == _RULES:
            continue
        if detail["type"] == "missing":
            whole[path] = Problem(path, "is missing")
        elif detail["type"] == "extra_forbidden":
            whole[path] = Problem(path, _unknown(path, data) if len(whole) < _MOST_HINTS else "unknown key")
        else:
            expected.setdefault(path, []).append(_expectation(detail))
            inputs[path] = _input(detail, data)
            hints[path] = hints.get(path, "") or (_value_hint(detail) if len(hints) < _MOST_HINTS else "")
    found = list(whole.values())
    lists = {path[: match.start()] for path in expected for match in re.finditer(r"\[", path)}
    for path, phrases in expected.items():
        if path in lists:
            continue  # an element of this list is at fault; the other branches of the union add nothing
        wanted = " or ".join(dict.fromkeys(phrases))
        found.append(Problem(path, f"must be {wanted}, not {describe(inputs[path])}{hints[path]}"))
    return found


def _rules_despite(
    model: type[Recipe], data: Mapping[str, Any], error: ValidationError, found: list[Problem]
) -> list[Problem]:
    """The broken rules between keys that are fine themselves: the rest is tried without the faulty keys."""
    rest = copy.deepcopy(dict(data))
    for detail in error.errors(include_url=False, include_input=False):
        _remove(rest, _path(detail))
    rest.setdefault("name", "recipe")
    try:
        model.model_validate(rest)
    except ValidationError as second:
        faulty = [problem.path for problem in found]
        return [
            problem
            for problem in _broken_rules(second)
            if not any(_overlap(key, fault) for key in (problem.path, *problem.involves) for fault in faulty)
        ]
    return []


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
    from gdro_cli.config.recipe import Recipe

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
    if kind == "union_tag_not_found":
        return "a section of keys and values"
    if kind in _LIMITS:
        name, phrase = _LIMITS[kind]
        limit = context[name]
        return phrase.format(f"{limit:g}" if isinstance(limit, float) else limit)
    return _EXPECTED.get(kind, detail["msg"])


def _input(detail: ErrorDetails, data: Mapping[str, Any]) -> Any:
    return data["method"]["name"] if detail["type"] == "union_tag_invalid" else detail["input"]


def _value_hint(detail: ErrorDetails) -> str:
    given = detail["input"]
    if detail["type"] == "literal_error" and isinstance(given, str):
        return similar(given, detail["ctx"]["expected"].split("'")[1::2])
    if detail["type"] == "union_tag_invalid":
        return similar(str(detail["ctx"]["tag"]), METHODS)
    return ""


def _unknown(path: str, data: Mapping[str, Any]) -> str:
    """What to say about a key that the recipe, or its method, does not have."""
    method = data.get("method")
    if path.startswith("method.") and isinstance(method, Mapping):
        key = path.removeprefix("method.")
        owners = [name for name, model in METHODS.items() if key in model.model_fields]
        if owners:
            chosen, others = method.get("name"), ", ".join(owners)
            return f"the method {chosen!r} has no such key (it belongs to {others}): remove it"
        return f"unknown key{similar_key(path, field_names())}"
    return f"unknown key{similar_key(path, field_names(sections=True))}"
