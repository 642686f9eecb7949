"""Built-in prompt sets: what their prompts carry, and which keys of a prompt source apply to them.

Train, validation and test share no word (OCR) and no content (GenEval). ``gdro_cli.data.prompts`` draws the prompts.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

#: The kinds of GenEval prompts.
GENEVAL_TAGS = ("single_object", "two_object", "counting", "colors", "position", "color_attr")

OPTIONS: Mapping[str, str] = {
    "two_line_share": "a built-in OCR set",
    "min_letters": "a built-in OCR set",
    "max_letters": "a built-in OCR set",
    "tags": "a built-in GenEval set",
    "plurals": "a geneval-coco set",
}
"""Keys of a prompt source that apply to some sets only, and a name for those sets."""


@dataclass(frozen=True, slots=True)
class BuiltinSet:
    """Facts about a built-in set that are known before it is drawn."""

    carries: frozenset[str]
    """What each of its prompts has: ``target``, or keys of its metadata."""
    options: tuple[str, ...]
    """The keys of ``OPTIONS`` that apply to it."""


_SIGNS = BuiltinSet(frozenset({"target"}), ("two_line_share", "min_letters", "max_letters"))
_SHAPES = BuiltinSet(frozenset({"tag", "include"}), ("tags",))
_COCO = BuiltinSet(frozenset({"tag", "include"}), ("tags", "plurals"))

BUILTIN_SETS: Mapping[str, BuiltinSet] = {
    f"{family}-{split}": facts
    for family, facts in (("ocr", _SIGNS), ("geneval", _SHAPES), ("geneval-coco", _COCO))
    for split in ("train", "validation", "test")
}
"""Every built-in set by its name."""


def fitting_sets(needs: frozenset[str]) -> tuple[str, ...]:
    """The built-in sets whose prompts carry all that a reward needs."""
    return tuple(name for name, facts in BUILTIN_SETS.items() if needs <= facts.carries)
