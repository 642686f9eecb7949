"""Validation that reports everything wrong with a recipe at once, each key by its dotted path."""

from __future__ import annotations

import copy
import re
from collections.abc import Mapping, Sequence
from typing import Any

from pydantic import ValidationError
from pydantic_core import ErrorDetails

from gdro_cli.config.keys import field_doc, field_names
from gdro_cli.config.recipe import Recipe
from gdro_cli.config.rules import Problem, problems
from gdro_cli.config.yamlfile import describe, shown
from gdro_cli.errors import UserError
from gdro_cli.suggest import similar, similar_key

MAX_PROBLEMS = 20
"""How many problems one message lists."""
_SECTION = "a section of keys and values"
#: pydantic's error types -> what the value must be, with the error's context.
_EXPECTED = {
    "int_type": "a whole number",
    "int_from_float": "a whole number",
    "float_type": "a number",
    "finite_number": "a finite number",
    "bool_type": "true or false",
    "string_type": "text",
    "string_unicode": "text",
    "string_too_short": "text that is not empty",
    "string_too_long": "text of at most {max_length} letters",
    "string_pattern_mismatch": "letters, digits, '.', '_' or '-', beginning with a letter or digit",
    "tuple_type": "a list",
    "too_long": "a list of at most {max_length} values",
    "too_short": "a list of at least {min_length} values",
    "dict_type": _SECTION,
    "model_type": _SECTION,
    "model_attributes_type": _SECTION,
    "union_tag_not_found": _SECTION,
    "union_tag_invalid": "one of {expected_tags}",
    "literal_error": "{expected}",
    "greater_than": "greater than {gt:g}",
    "greater_than_equal": "at least {ge:g}",
    "less_than": "less than {lt:g}",
    "less_than_equal": "at most {le:g}",
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


def _refusal(faults: Sequence[Problem], source: str) -> UserError:
    lines = [f"{shown(problem.path)}: {problem.message}" for problem in faults[:MAX_PROBLEMS]]
    if len(lines) == 1:
        return UserError(f"{source}: {lines[0]}")
    more = [f"and {len(faults) - len(lines)} more"] if len(faults) > len(lines) else []
    return UserError(f"{source} has {len(faults)} problems:\n" + "\n".join(f"  {line}" for line in lines + more))


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
    faults = [Problem(path, message) for path, message in keys.items()]
    return faults + [Problem(path, _wrong(own, hint=n < MAX_PROBLEMS)) for n, (path, own) in enumerate(wrong)]


def _wrong(details: Sequence[ErrorDetails], *, hint: bool) -> str:
    """What a value must be, by all branches of its type, and what it is."""
    expected = " or ".join(dict.fromkeys(_expectation(detail) for detail in details))
    hints = (_value_hint(detail) for detail in details) if hint else ()
    return f"must be {expected}, not {describe(_value(details[-1]))}{next(filter(None, hints), '')}"


def _rule_problems_despite(
    faults: Sequence[Problem], details: Sequence[ErrorDetails], data: Mapping[str, Any]
) -> list[Problem]:
    """The rules that the rest of the recipe breaks, without those that depend on a faulty key."""
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
        if not any(_overlap(key, fault.path) for key in problem.keys for fault in faults)
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
    for number, part in enumerate(detail["loc"], start=1):
        inner = f"{path}.{part}".lstrip(".")
        unknown = number == len(detail["loc"]) and detail["type"] == "extra_forbidden"
        if isinstance(part, int):
            path += f"[{part}]"
        elif unknown or inner in field_names(sections=True) or path == "ablation" or path.endswith(".tags"):
            path = inner
    return f"{path}.name" if detail["type"] == "union_tag_invalid" else path


def _expectation(detail: ErrorDetails) -> str:
    phrase = _EXPECTED.get(detail["type"])
    return detail["msg"] if phrase is None else phrase.format(**detail.get("ctx", {}))


def _value(detail: ErrorDetails) -> Any:
    return detail.get("ctx", {}).get("tag", detail["input"])


def _value_hint(detail: ErrorDetails) -> str:
    context, value = detail.get("ctx", {}), _value(detail)
    choices = context.get("expected") or context.get("expected_tags")
    return similar(value, choices.split("'")[1::2]) if choices and isinstance(value, str) else ""


def _unknown(path: str, data: Mapping[str, Any]) -> str:
    """The message about a key that the recipe, or its method, does not have."""
    if path in field_names():
        owners = ", ".join(field_doc(path).methods)
        return f"the method {data['method']['name']!r} has no such key (it belongs to {owners}): remove it"
    return f"unknown key{similar_key(path, field_names(sections=True))}"
