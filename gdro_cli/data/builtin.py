"""Built-in prompt sets for the embedded world: signs that say a word.

    a red sign that says "HELLO" on a brick background

The words are our own list (``words/signs.txt``). Each word belongs to the training, the validation or the
test sets for good, by a digest of its letters, so that no word is both trained on and tested. A set is a
function of its options alone, and a longer set begins with the shorter one.
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
"""Name of each built-in OCR set and the words it draws from."""

_TRAIN_BELOW, _VALIDATION_BELOW = 0.70, 0.82
"""Bounds of the splits on the unit interval: 70 % train, 12 % validation, 18 % test."""


def split_of(word: str) -> Split:
    """The set that a word belongs to: fixed by its letters, whatever else is in the list."""
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


def sign_prompt(text: str, *, colour: str, background: str) -> str:
    """The prompt for one sign; a space in ``text`` parts its two lines."""
    return f'a {colour} sign that says "{text}" on a {background} background'


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

    Round after round, in an order drawn again each time, every word is used once (as the first line) in a
    scene, that is a colour and a background, which it has not had before; so words are used equally often,
    and no prompt comes twice. Of the first n prompts, n times ``two_line_share`` (0..1, rounded down) have a
    second word as a second line. ``count`` defaults to one prompt per word. ``min_letters`` and
    ``max_letters`` hold for each word. Raises UserError when there are no such words or not enough of them.
    """
    split = OCR_SETS[name]
    pool = words(split, min_letters=min_letters, max_letters=max_letters)
    if len(pool) < (2 if two_line_share > 0 else 1):
        raise UserError(
            f"the built-in prompt set {name} has too few words of {min_letters} to {max_letters} letters: {len(pool)}"
        )
    wanted = len(pool) if count is None else count
    if wanted > len(pool) * len(SCENES):
        raise UserError(
            f"the built-in prompt set {name} has {len(pool) * len(SCENES)} different prompts with words "
            f"of {min_letters} to "
            f"{max_letters} letters, but count asks for {wanted}: lower count or widen the range of letters"
        )
    prompts: list[str] = []
    for turn in range(-(-wanted // len(pool))):
        for first in sorted(pool, key=partial(_mix, "order", split, seed, turn))[: wanted - len(prompts)]:
            colour, background = _scene_order(first, seed)[turn]
            text = first
            if int((len(prompts) + 1) * two_line_share) > int(len(prompts) * two_line_share):
                text = f"{first} {_partner(pool, first, seed, turn)}"
            prompts.append(sign_prompt(text, colour=colour, background=background))
    return prompts


@cache
def _scene_order(word: str, seed: int) -> tuple[tuple[str, str], ...]:
    return tuple(sorted(SCENES, key=lambda scene: _mix("scene", seed, word, *scene)))


def _partner(pool: tuple[str, ...], first: str, seed: int, turn: int) -> str:
    others = len(pool) - 1
    index = int.from_bytes(_mix("second", seed, turn, first)[:8], "big") % others
    second = pool[index]
    return second if second != first else pool[others]


def _mix(*keys: str | int) -> bytes:
    return hashlib.sha256("/".join(("gdro-signs", *map(str, keys))).encode()).digest()
