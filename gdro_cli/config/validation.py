"""Validation that reports all problems of a recipe at once, each with the dotted path of its key."""

from __future__ import annotations

import copy
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from pydantic import ValidationError
from pydantic_core import ErrorDetails

from gdro_cli.config.keys import field_doc, field_names
from gdro_cli.config.layers import with_fixed
from gdro_cli.config.recipe import Recipe
from gdro_cli.config.rules import Problem, problems
from gdro_cli.config.schema import schema_of, with_own_section
from gdro_cli.config.yamlfile import describe, shown
from gdro_cli.errors import UserError
from gdro_cli.suggest import similar, similar_key

MAX_PROBLEMS = 20
"""How many problems one message lists."""
_SENTENCE_END = re.compile(r"(?<=\.)\s+(?=[A-Z0-9`])")
_RANGE = re.compile(r"[0-9]|Above |In [\[(]|At (?:least|most) ")
"""The beginning of a sentence that states the range of a key."""
_STATES_RANGE = ("must be at ", "must be greater ", "must be less ")
_SUGGESTED = re.compile(r"`([a-z_.]+)`")
_SECTION = "a section of keys and values"
#: pydantic's error types -> what the value must be, a template for the error's context.
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


class RecipeError(UserError):
    """A recipe with problems."""

    def __init__(self, found: Sequence[Problem], source: str, schema: type[Recipe]) -> None:
        listed = found[:MAX_PROBLEMS]
        super().__init__(_message(found, source, [()] * len(listed)))
        self.explained = _message(found, source, [_explanation(problem, schema) for problem in listed])
        """The message, with the meaning of each key that it is about."""


def validate(data: Mapping[str, Any], *, source: str, check_fixed: bool = False) -> Recipe:
    """``data`` as a recipe.

    Args:
        data: the recipe as a mapping.
        source: what messages call it.
        check_fixed: whether the recipe must also be valid with the settings of each ``ablation.KEY.set``.

    Raises:
        RecipeError: it has problems; the message lists them and calls it ``source``.
        PrerequisiteError: it names a reward of a plug-in that cannot be used.
    """
    recipe, found = _checked(data)
    if recipe is not None and check_fixed:
        found += list(_fixed_problems(recipe, found))
    if recipe is None or found:
        raise RecipeError(found, source, schema_of(data))
    return recipe


def _checked(data: Mapping[str, Any]) -> tuple[Recipe | None, list[Problem]]:
    """``data`` as a recipe, None if a key is wrong, and its problems."""
    schema = schema_of(data)
    data = with_own_section(data, schema)
    try:
        recipe = schema.model_validate(data)
    except ValidationError as error:
        details = error.errors(include_url=False)
        wrong_keys = _key_problems(details, data, schema)
        return None, [*wrong_keys, *_rule_problems(details, data, wrong_keys, schema)]
    return recipe, list(problems(recipe))


def _fixed_problems(recipe: Recipe, known: Sequence[Problem]) -> Iterator[Problem]:
    """What is wrong with the recipe only because of the settings in an ``ablation.KEY.set``."""
    for name, entry in recipe.ablation.items():
        path = f"ablation.{name}.set"
        if entry.set and not any(problem.path == path for problem in known):
            _, found = _checked(with_fixed(recipe, entry.set))
            yield from (Problem(path, f"{shown(new.path)}: {new.message}") for new in found if new not in known)


def _message(found: Sequence[Problem], source: str, meanings: Sequence[Sequence[str]]) -> str:
    lines = [f"{shown(problem.path)}: {problem.message}" for problem in found[: len(meanings)]]
    if len(lines) == 1:
        return f"{source}: {lines[0]}" + "".join(f" ({meaning})" for meaning in meanings[0])
    lines = [part for line, more in zip(lines, meanings, strict=True) for part in (line, *(f"    {m}" for m in more))]
    if len(found) > len(meanings):
        lines.append(f"and {len(found) - len(meanings)} more")
    return f"{source} has {len(found)} problems:\n" + "\n".join(f"  {line}" for line in lines)


def _explanation(problem: Problem, schema: type[Recipe]) -> list[str]:
    """What the key of a problem means, or each key that its message suggests instead.

    The first two sentences of its help, without a range that the message states.
    """
    names = field_names(schema, sections=True)
    own = problem.path.partition("[")[0]
    keys = [own] if own in names else [key for key in _SUGGESTED.findall(problem.message) if key in names]
    stated = problem.message.startswith(_STATES_RANGE)
    meanings = []
    for key in keys:
        sentences = _SENTENCE_END.split(field_doc(key, schema).text)[:2]
        text = " ".join(sentence for sentence in sentences if not (stated and _RANGE.match(sentence)))
        meanings += [text if key == own else f"{key}: {text}"] if text else []
    return meanings


def _key_problems(details: Sequence[ErrorDetails], data: Mapping[str, Any], schema: type[Recipe]) -> list[Problem]:
    """One problem per key, in the order of the errors. The branches of a union become one sentence."""
    keys: dict[str, str] = {}
    values: dict[str, list[ErrorDetails]] = {}
    for detail in details:
        path = _path(detail, schema)
        if detail["type"] == "missing":
            keys[path] = "is missing"
        elif detail["type"] == "value_error":  # a rule between the settings of a reward
            keys[path] = str(detail["ctx"]["error"])
        elif detail["type"] == "extra_forbidden":
            keys[path] = (
                _unknown(path, data, schema) if len(keys) < MAX_PROBLEMS else "unknown key"
            )  # a hint takes 1 ms
        else:
            values.setdefault(path, []).append(detail)
    # If an element of a list is wrong, the other branches of the list's union add nothing.
    lists = {path[: match.start()] for path in values for match in re.finditer(r"\[", path)}
    messages = keys | {path: _wrong(branches) for path, branches in values.items() if path not in lists}
    return [Problem(path, message) for path, message in messages.items()]


def _wrong(details: Sequence[ErrorDetails]) -> str:
    """The values that the branches of a key's type expect, and the value that it has."""
    expected = " or ".join(dict.fromkeys(_expectation(detail) for detail in details))
    hint = next(filter(None, map(_value_hint, details)), "")
    return f"must be {expected}, not {describe(_value(details[-1]))}{hint}"


def _rule_problems(
    details: Sequence[ErrorDetails], data: Mapping[str, Any], wrong_keys: Sequence[Problem], schema: type[Recipe]
) -> list[Problem]:
    """The rules that the rest of the recipe breaks, without those that depend on a wrong key."""
    rest = copy.deepcopy(dict(data))
    for detail in details:
        _remove(rest, _path(detail, schema))
    rest.setdefault("name", "recipe")
    try:
        recipe = schema.model_validate(rest)
    except ValidationError:
        return []
    return [
        problem
        for problem in problems(recipe)
        if not any(_overlap(key, wrong.path) for key in problem.keys for wrong in wrong_keys)
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


def _path(detail: ErrorDetails, schema: type[Recipe]) -> str:
    """The dotted path of the wrong key, without pydantic's labels for the branches of unions."""
    path = ""
    for number, part in enumerate(detail["loc"], start=1):
        inner = f"{path}.{part}".lstrip(".")
        unknown = number == len(detail["loc"]) and detail["type"] in ("extra_forbidden", "missing")
        free = path == "ablation" or path.endswith(".tags") or (path.startswith("ablation.") and part == "set")
        if isinstance(part, int):
            path += f"[{part}]"
        elif unknown or free or inner in field_names(schema, sections=True):
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


def _unknown(path: str, data: Mapping[str, Any], schema: type[Recipe]) -> str:
    """The message about a key that the recipe, its method or its reward does not have."""
    if path == "prompts.task":
        return "is not a key any more, since what prompts must carry follows from reward.kind: remove it"
    if path in field_names(schema):
        owners = ", ".join(field_doc(path, schema).methods)
        return f"the method {data['method']['name']!r} has no such key (it belongs to {owners}): remove it"
    return f"unknown key{similar_key(path, field_names(schema, sections=True))}"
