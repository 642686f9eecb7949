"""Built-in prompt sets for the embedded world: signs that say a word.

    a red sign that says "HELLO" on a brick background

The list of words is our own (``words/signs.txt``). A digest of its letters assigns each word permanently to the
training, the validation or the test sets, so that no word is both trained on and tested. A set depends only on its
options, and a longer set begins with the shorter one.
"""

from __future__ import annotations

import hashlib
from functools import cache, partial
from importlib.resources import files
from typing import Literal, get_args

from gdro_cli.errors import UserError

Split = Literal["train", "validation", "test"]

COLOURS = ("red", "orange", "yellow", "green", "blue", "purple", "pink", "brown")
BACKGROUNDS = ("plain", "wooden", "brick", "grassy", "starry", "sandy")
SCENES = tuple((colour, background) for colour in COLOURS for background in BACKGROUNDS)

OCR_SETS: dict[str, Split] = {f"ocr-{split}": split for split in get_args(Split)}
"""The split that each built-in OCR set draws its words from."""

_TRAIN_BELOW, _VALIDATION_BELOW = 0.70, 0.82
"""Bounds of the splits on the unit interval: 70 % train, 12 % validation, 18 % test."""


def split_of(word: str) -> Split:
    """The split of a word, which depends only on its letters."""
    share = int.from_bytes(_mix("split", word)[:8], "big") / 2**64
    if share < _TRAIN_BELOW:
        return "train"
    return "validation" if share < _VALIDATION_BELOW else "test"


@cache
def all_words() -> tuple[str, ...]:
    """The whole word list, upper-case A to Z, in alphabetical order."""
    return tuple(files("gdro_cli.data").joinpath("words", "signs.txt").read_text(encoding="ascii").split())


@cache
def words(split: Split, *, min_letters: int = 1, max_letters: int = 6) -> tuple[str, ...]:
    """The words of one split that have between ``min_letters`` and ``max_letters`` letters."""
    return tuple(word for word in all_words() if min_letters <= len(word) <= max_letters and split_of(word) == split)


def ocr_prompts(
    name: str,
    *,
    count: int | None = None,
    seed: int = 0,
    two_line_share: float = 0.0,
    min_letters: int = 4,
    max_letters: int = 6,
) -> list[str]:
    """``count`` different prompts of the built-in set ``name`` (a key of ``OCR_SETS``).

    In each round, in a new random order, every word appears once as the first line, in a scene (a colour and a
    background) that it has not had before. So all words are equally frequent, and no prompt appears twice.

    Args:
        name: the set.
        count: number of prompts; by default one per word.
        seed: selects order, scenes and second words.
        two_line_share: share (0..1, rounded down) of the first n prompts, for each n, that have a second line.
        min_letters: letters of the shortest word.
        max_letters: letters of the longest word.

    Raises:
        UserError: there are no such words, or too few of them.
    """
    split = OCR_SETS[name]
    pool = words(split, min_letters=min_letters, max_letters=max_letters)
    if len(pool) < (2 if two_line_share > 0 else 1):
        raise UserError(
            f"the built-in prompt set {name} has too few words of {min_letters} to {max_letters} letters: widen the "
            "range of letters"
        )
    count = len(pool) if count is None else count
    if count > len(pool) * len(SCENES):
        raise UserError(
            f"the built-in prompt set {name} has {len(pool) * len(SCENES)} different prompts with words of "
            f"{min_letters} to {max_letters} letters, fewer than the count {count}: lower count or widen the range of "
            "letters"
        )
    prompts: list[str] = []
    for turn in range(-(-count // len(pool))):
        for first in sorted(pool, key=partial(_mix, "order", split, seed, turn))[: count - len(prompts)]:
            colour, background = _scene_order(first, seed)[turn]
            text = first
            if int((len(prompts) + 1) * two_line_share) > int(len(prompts) * two_line_share):
                text = f"{first} {_partner(pool, first, seed, turn)}"
            prompts.append(f'a {colour} sign that says "{text}" on a {background} background')
    return prompts


@cache
def _scene_order(word: str, seed: int) -> tuple[tuple[str, str], ...]:
    return tuple(sorted(SCENES, key=lambda scene: _mix("scene", seed, word, *scene)))


def _partner(pool: tuple[str, ...], first: str, seed: int, turn: int) -> str:
    *others, last = pool
    second = others[int.from_bytes(_mix("second", seed, turn, first)[:8], "big") % len(others)]
    return second if second != first else last


def _mix(*keys: str | int) -> bytes:
    return hashlib.sha256("/".join(("gdro-signs", *map(str, keys))).encode()).digest()
