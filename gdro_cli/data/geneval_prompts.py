"""Built-in GenEval prompt sets (arXiv 2310.11513): generated from names, seeded, with the official metadata.

    a photo of a heart left of a ring on a sandy background      the embedded world's shapes
    a photo of three benchs                                      COCO's 80 classes, the official wording

The content of a prompt is its meaning, regardless of the order of its words: "a circle and a square" and "a square and
a circle" have the same content, and so do "a heart left of a ring" and "a ring right of a heart". Each content belongs
permanently to the training, the validation or the test sets: all contents of a vocabulary and tag are ranked by a
digest and split at 1/2 and 2/3. A set has each of its contents at most once, in one order. A set depends only on its
options, and a longer set begins with the shorter one.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import cache
from itertools import chain, combinations, permutations, product
from math import lcm
from typing import Any, Literal, get_args

from gdro_cli.core.geneval import COCO_CLASSES, OFFICIAL_SIZES, RELATIONS, SHAPES, TAGS
from gdro_cli.core.geneval import COLOURS as COCO_COLOURS
from gdro_cli.data.builtin import BACKGROUNDS, COLOURS, Split
from gdro_cli.data.records import PromptRecord
from gdro_cli.errors import UserError

Plurals = Literal["naive", "correct"]
Content = tuple[str, ...]
"""The meaning of a prompt, regardless of the order of its words; the background, "" for none, comes last."""


@dataclass(frozen=True, slots=True)
class Vocabulary:
    """The words that prompts are made of."""

    name: str
    classes: tuple[str, ...]
    coloured: tuple[str, ...]
    """The classes that prompts name with a colour."""
    colours: tuple[str, ...]
    backgrounds: tuple[str, ...]
    an_before_vowels: bool
    """Whether prompts say "an orange cup"; the embedded model learnt "a orange ring"."""
    single_for_test: bool
    """Whether all single objects belong to the test set, as in the official set: each class once."""


@dataclass(frozen=True, slots=True)
class GenevalSet:
    """A built-in set: the name of its vocabulary, and the split that it draws contents from."""

    vocabulary: str
    split: Split


VOCABULARIES: dict[str, Vocabulary] = {
    "shapes": Vocabulary("shapes", SHAPES, SHAPES, COLOURS, BACKGROUNDS, an_before_vowels=False, single_for_test=False),
    "coco": Vocabulary(
        "coco",
        COCO_CLASSES,
        tuple(name for name in COCO_CLASSES if name != "person"),  # official prompts name no person with a colour
        COCO_COLOURS,
        ("",),
        an_before_vowels=True,
        single_for_test=True,
    ),
}

GENEVAL_SETS: dict[str, GenevalSet] = {
    f"{family}-{split}": GenevalSet(vocabulary, split)
    for family, vocabulary in (("geneval", "shapes"), ("geneval-coco", "coco"))
    for split in get_args(Split)
}
"""Every built-in GenEval set by its name."""

OFFICIAL_SET = "geneval-coco-test"
"""The set with the official number of prompts of each tag."""

_NUMBERS = {2: "two", 3: "three", 4: "four"}
_OPPOSITE = dict(zip(RELATIONS, ("right of", "left of", "below", "above"), strict=True))

_IRREGULAR = {
    "person": "people",
    "sheep": "sheep",
    "skis": "pairs of skis",
    "knife": "knives",
    "broccoli": "heads of broccoli",
    "computer mouse": "computer mice",
    "scissors": "pairs of scissors",
}


@cache
def contents(name: str, tag: str) -> tuple[Content, ...]:
    """All contents of one tag that the built-in set ``name`` draws from, in the order of their digests."""
    own = GENEVAL_SETS[name]
    words = VOCABULARIES[own.vocabulary]
    if tag == "single_object" and words.single_for_test:
        return tuple(_space(words, tag)) if own.split == "test" else ()
    ranked = _ranked(own.vocabulary, tag)
    half, two_thirds = len(ranked) // 2, len(ranked) * 2 // 3
    splits = {"train": slice(half), "validation": slice(half, two_thirds), "test": slice(two_thirds, None)}
    return ranked[splits[own.split]]


def geneval_prompts(
    name: str,
    *,
    count: int | None = None,
    seed: int = 0,
    tags: Mapping[str, float] | None = None,
    plurals: Plurals = "naive",
) -> list[PromptRecord]:
    """``count`` different prompts of the built-in set ``name`` (a key of ``GENEVAL_SETS``), the tags mixed.

    Args:
        name: the set.
        count: number of prompts. None: as many as possible with every tag in full proportion to its weight.
        seed: selects the prompts, their order, and the order of their words.
        tags: weights of tags, 0 or more and not all 0; other tags have no prompts. Each prefix of the set has its tags
            in these proportions, as closely as whole prompts allow. A tag that runs out of prompts leaves the rest to
            the others. None: the official sizes for ``geneval-coco-test``, otherwise the same weight for every tag.
        plurals: ``naive`` always adds an s (es after s), as in the official prompts ("three knifes").

    Raises:
        UserError: a tag with a weight has no prompts, or there are fewer prompts than ``count``.
    """
    words = VOCABULARIES[GENEVAL_SETS[name].vocabulary]
    weights = _weights(name, tags)
    sizes = {tag: len(contents(name, tag)) for tag in weights}
    if count is None:
        count = min(sizes[tag] * sum(weights.values()) // weight for tag, weight in weights.items())
    elif count > sum(sizes.values()):
        raise UserError(
            f"the built-in prompt set {name} has {sum(sizes.values())} different prompts of the tags "
            f"{', '.join(weights)}, fewer than the count {count}: lower count or give other tags a weight"
        )
    order = _tag_order(weights, sizes, count)
    drawn = {tag: _drawn(name, tag, seed) for tag in weights}
    return [_record(words, tag, *next(drawn[tag]), plurals=plurals) for tag in order]


def wording(
    tag: str,
    include: Sequence[Mapping[str, Any]],
    *,
    vocabulary: str,
    background: str = "",
    plurals: Plurals = "naive",
) -> str:
    """The prompt for the ``include`` clauses of GenEval's metadata."""
    words = VOCABULARIES[vocabulary]
    if tag == "counting":
        phrase = f"{_NUMBERS[include[0]['count']]} {plural(include[0]['class'], plurals)}"
    else:
        things = [_thing(words, clause) for clause in include]
        # The second clause has the position, which is relative to the first.
        phrase = f"{things[1]} {include[1]['position'][0]} {things[0]}" if tag == "position" else " and ".join(things)
    return f"a photo of {phrase} on a {background} background" if background else f"a photo of {phrase}"


def plural(name: str, plurals: Plurals = "naive") -> str:
    """The plural of a class name: always with an s (es after s) as in the official prompts, or correct English."""
    if plurals == "correct":
        if name in _IRREGULAR:
            return _IRREGULAR[name]
        if name.endswith(("ch", "sh")):
            return f"{name}es"
    return f"{name}es" if name.endswith("s") else f"{name}s"


def _thing(words: Vocabulary, clause: Mapping[str, Any]) -> str:
    text = f"{clause['color']} {clause['class']}" if "color" in clause else clause["class"]
    return f"an {text}" if words.an_before_vowels and text[0] in "aeiou" else f"a {text}"


def _space(words: Vocabulary, tag: str) -> list[Content]:
    """Every content of one tag once: pairs in the order of the classes, only the relations left of and above."""
    space: Iterable[Content]
    if tag == "single_object":
        space = ((label,) for label in words.classes)
    elif tag == "two_object":
        space = combinations(words.classes, 2)
    elif tag == "counting":
        space = product(map(str, _NUMBERS), words.classes)
    elif tag == "colors":
        space = product(words.colours, words.coloured)
    elif tag == "position":
        sides = ("left of", "above")
        space = ((first, side, second) for first, second in permutations(words.classes, 2) for side in sides)
    else:
        pairs = combinations(words.coloured, 2)
        space = chain.from_iterable(
            ((colour, first, other, second) for colour, other in permutations(words.colours, 2))
            for first, second in pairs
        )
    return [(*parts, background) for parts in space for background in words.backgrounds]


@cache
def _ranked(vocabulary: str, tag: str) -> tuple[Content, ...]:
    space = _space(VOCABULARIES[vocabulary], tag)
    return tuple(sorted(space, key=lambda content: _mix("split", vocabulary, tag, *content)))


def _drawn(name: str, tag: str, seed: int) -> Iterator[tuple[Content, bool]]:
    """The contents of one tag in random order, and whether to reverse the order of the words; shuffled lazily."""
    pool = contents(name, tag)
    moved: dict[int, int] = {}  # Fisher-Yates on the indices; holds only those that have changed places
    for position in range(len(pool)):
        key = _mix("order", seed, name, tag, position)
        taken = position + int.from_bytes(key[:8], "big") % (len(pool) - position)
        index = moved.get(taken, taken)
        moved[taken] = moved.pop(position, position)
        yield pool[index], key[-1] % 2 == 1


def _weights(name: str, tags: Mapping[str, float] | None) -> dict[str, int]:
    """The weights above 0 as whole numbers in the same proportions, in the order of ``TAGS``."""
    if tags is None:
        tags = OFFICIAL_SIZES if name == OFFICIAL_SET else {tag: 1 for tag in TAGS if contents(name, tag)}
    # The decimal digits are what the user means: 0.3 is three times 0.1.
    exact = {tag: Fraction(str(tags[tag])) for tag in TAGS if tags.get(tag)}
    for tag in exact:
        if not contents(name, tag):
            raise UserError(
                f"the built-in prompt set {name} has no prompts of the tag {tag} (all of them are in the test set): "
                "give it no weight"
            )
    whole = lcm(*(weight.denominator for weight in exact.values()))
    return {tag: int(weight * whole) for tag, weight in exact.items()}


def _tag_order(weights: Mapping[str, int], sizes: Mapping[str, int], count: int) -> list[str]:
    """The tag of each prompt: of the tags with prompts left, the one that is furthest behind its share.

    After as many prompts as the sum of the weights, each tag has appeared exactly as often as its weight.
    """
    left = {tag: sizes[tag] for tag in weights if sizes[tag]}
    behind = dict.fromkeys(left, 0)
    order: list[str] = []
    while len(order) < count:
        for tag in left:
            behind[tag] += weights[tag]
        chosen = max(left, key=behind.__getitem__)
        behind[chosen] -= sum(weights[tag] for tag in left)
        left[chosen] -= 1
        if not left[chosen]:
            del left[chosen]
        order.append(chosen)
    return order


def _record(words: Vocabulary, tag: str, content: Content, reverse: bool, *, plurals: Plurals) -> PromptRecord:
    *parts, background = content
    exclude: list[dict[str, Any]] = []
    if tag == "counting":
        number, label = int(parts[0]), parts[1]
        include = [_clause(label, count=number)]
        exclude = [_clause(label, count=number + 1)]
    elif tag == "colors":
        include = [_clause(parts[1], colour=parts[0])]
    elif tag == "position":
        first, relation, second = (parts[2], _OPPOSITE[parts[1]], parts[0]) if reverse else parts
        include = [_clause(second), _clause(first) | {"position": [relation, 0]}]
    else:
        if tag == "color_attr":
            include = [_clause(parts[1], colour=parts[0]), _clause(parts[3], colour=parts[2])]
        else:
            include = [_clause(label) for label in parts]
        if reverse:
            include.reverse()
    metadata = {"tag": tag, "include": include} | ({"exclude": exclude} if exclude else {})
    text = wording(tag, include, vocabulary=words.name, background=background, plurals=plurals)
    return PromptRecord.of(text, metadata=metadata)


def _clause(label: str, *, count: int = 1, colour: str | None = None) -> dict[str, Any]:
    return {"class": label, "count": count} | ({"color": colour} if colour else {})


def _mix(*keys: str | int) -> bytes:
    return hashlib.sha256("/".join(("gdro-geneval", *map(str, keys))).encode()).digest()
