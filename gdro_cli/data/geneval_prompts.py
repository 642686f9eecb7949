"""Built-in GenEval prompt sets (arXiv 2310.11513): generated from names, seeded, with the official metadata.

    a photo of a heart left of a ring on a sandy background      the embedded world's shapes
    a photo of three benchs                                      COCO's 80 classes, the official wording

What a prompt asks for, whichever way round it says it, is its content: "a circle and a square" and "a square
and a circle" are one, "a heart left of a ring" and "a ring right of a heart" are one. A content belongs to the
training, the validation or the test sets for good: all contents of a vocabulary and tag, ranked by a digest, are
cut at 1/2 and 2/3. A set holds each of its contents at most once, one way round. It is a function of its options
alone, and a longer set begins with the shorter one.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import cache
from itertools import chain, combinations, permutations, product
from math import inf, lcm
from typing import Any, Literal

from gdro_cli.core.geneval import COCO_CLASSES, OFFICIAL_SIZES, RELATIONS, SHAPES, TAGS
from gdro_cli.core.geneval import COLOURS as COCO_COLOURS
from gdro_cli.data.builtin import BACKGROUNDS, COLOURS, Split
from gdro_cli.data.records import PromptRecord
from gdro_cli.errors import UserError

Plurals = Literal["naive", "correct"]
Content = tuple[str, ...]
"""What a prompt asks for, the same whichever way round it is said; the background, "" for none, comes last."""


@dataclass(frozen=True, slots=True)
class Vocabulary:
    """The words that prompts are made of."""

    name: str
    classes: tuple[str, ...]
    coloured: tuple[str, ...]
    """The classes that may be asked for in a colour."""
    colours: tuple[str, ...]
    backgrounds: tuple[str, ...]
    an_before_vowels: bool
    """Whether it is "an orange cup"; the embedded model was taught "a orange ring"."""
    single_for_test: bool
    """Whether all single objects belong to the test set, as officially: each class once."""


@dataclass(frozen=True, slots=True)
class GenevalSet:
    """A built-in set: the vocabulary's name, and which share of the contents it draws from."""

    vocabulary: str
    split: Split


VOCABULARIES: dict[str, Vocabulary] = {
    "shapes": Vocabulary("shapes", SHAPES, SHAPES, COLOURS, BACKGROUNDS, an_before_vowels=False, single_for_test=False),
    "coco": Vocabulary(
        "coco",
        COCO_CLASSES,
        tuple(name for name in COCO_CLASSES if name != "person"),  # officially no person is asked for in a colour
        COCO_COLOURS,
        ("",),
        an_before_vowels=True,
        single_for_test=True,
    ),
}

GENEVAL_SETS: dict[str, GenevalSet] = {
    "geneval-train": GenevalSet("shapes", "train"),
    "geneval-validation": GenevalSet("shapes", "validation"),
    "geneval-test": GenevalSet("shapes", "test"),
    "geneval-coco-train": GenevalSet("coco", "train"),
    "geneval-coco-validation": GenevalSet("coco", "validation"),
    "geneval-coco-test": GenevalSet("coco", "test"),
}
"""What each built-in GenEval set draws from."""

OFFICIAL_SET = "geneval-coco-test"
"""The set that has the official number of prompts of each tag."""

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


def vocabulary_of(name: str) -> str:
    """Name of the vocabulary of the built-in set ``name``: ``coco`` or ``shapes``."""
    return GENEVAL_SETS[name].vocabulary


@cache
def contents(name: str, tag: str) -> tuple[Content, ...]:
    """All contents of one tag that the built-in set ``name`` may ask for, in the order of their digests."""
    chosen = GENEVAL_SETS[name]
    words = VOCABULARIES[chosen.vocabulary]
    if tag == "single_object" and words.single_for_test:
        return tuple(_space(words, tag)) if chosen.split == "test" else ()
    ranked = _ranked(chosen.vocabulary, tag)
    half, two_thirds = len(ranked) // 2, len(ranked) * 2 // 3
    return ranked[
        {"train": slice(half), "validation": slice(half, two_thirds), "test": slice(two_thirds, None)}[chosen.split]
    ]


def geneval_prompts(
    name: str,
    *,
    count: int | None = None,
    seed: int = 0,
    tags: Mapping[str, float] | None = None,
    plurals: Plurals = "naive",
) -> list[PromptRecord]:
    """``count`` prompts of the built-in set ``name`` (a key of ``GENEVAL_SETS``), the tags mixed, none twice.

    Args:
        name: the set.
        count: how many. None: as many as there can be with every tag in full proportion to its weight.
        seed: which prompts of the set's share, in which order and which way round.
        tags: weights of the tags, 0 or more; a tag that is not named has none. Each prefix of the set has its
            tags in these proportions, as nearly as whole prompts can. A tag that has no more prompts leaves the
            rest to the others. None: the official sizes for ``geneval-coco-test``, else the same for every tag.
        plurals: ``naive`` adds an s (es after s) whatever the word, as the official prompts do ("three knifes").

    Raises:
        UserError: weights that cannot be, or fewer prompts than ``count``.
    """
    words = VOCABULARIES[vocabulary_of(name)]
    weights = _weights(name, tags)
    sizes = {tag: len(contents(name, tag)) for tag in weights}
    if count is None:
        count = min(sizes[tag] * sum(weights.values()) // weight for tag, weight in weights.items())
    elif count > sum(sizes.values()):
        raise UserError(
            f"the built-in prompt set {name} has {sum(sizes.values())} different prompts of the tags "
            f"{', '.join(weights)}, but count asks for {count}: lower count or give other tags a weight"
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
    """The prompt for ``include`` clauses as GenEval's metadata has them."""
    words = VOCABULARIES[vocabulary]
    if tag == "counting":
        phrase = f"{_NUMBERS[include[0]['count']]} {plural(include[0]['class'], plurals)}"
    else:
        things = [_thing(words, clause) for clause in include]
        # The clause that comes second is the one with the position: it lies so relative to the first.
        phrase = f"{things[1]} {include[1]['position'][0]} {things[0]}" if tag == "position" else " and ".join(things)
    return f"a photo of {phrase} on a {background} background" if background else f"a photo of {phrase}"


def plural(name: str, plurals: Plurals = "naive") -> str:
    """The plural of a class name: officially an s whatever the word (es after s), or as English has it."""
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
    """Every content of one tag, each once: pairs in the order of the classes, relations left of and above."""
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
    return tuple(sorted(_space(VOCABULARIES[vocabulary], tag), key=lambda made: _mix("split", vocabulary, tag, *made)))


def _drawn(name: str, tag: str, seed: int) -> Iterator[tuple[Content, bool]]:
    """The contents of one tag, shuffled by the seed as far as they are read, and whether to say each the other way."""
    pool = contents(name, tag)
    moved: dict[int, int] = {}  # Fisher-Yates on the indices, of which only those that changed places are kept
    for place in range(len(pool)):
        key = _mix("order", seed, name, tag, place)
        taken = place + int.from_bytes(key[:8], "big") % (len(pool) - place)
        index = moved.get(taken, taken)
        moved[taken] = moved.pop(place, place)
        yield pool[index], key[-1] % 2 == 1


def _weights(name: str, tags: Mapping[str, float] | None) -> dict[str, int]:
    """The weights above 0 as whole numbers in the same proportions, in the order of ``TAGS``."""
    if tags is None:
        tags = OFFICIAL_SIZES if name == OFFICIAL_SET else {tag: 1 for tag in TAGS if contents(name, tag)}
    for tag, weight in tags.items():
        if tag not in TAGS or not 0 <= weight < inf:
            raise UserError(
                f"the tags of the built-in prompt set {name} give {tag!r} the weight {weight!r}: "
                f"weights are 0 or more, and the tags are {', '.join(TAGS)}"
            )
    # A number's decimal digits are what was meant: 0.3 is three times 0.1.
    exact = {tag: Fraction(str(tags[tag])) for tag in TAGS if tags.get(tag)}
    if not exact:
        raise UserError(f"the tags of the built-in prompt set {name} all have the weight 0: give one of them a weight")
    for tag in exact:
        if not contents(name, tag):
            raise UserError(
                f"the built-in prompt set {name} has no prompts of the tag {tag}: "
                "all of them are in the test set; give it no weight"
            )
    whole = lcm(*(weight.denominator for weight in exact.values()))
    return {tag: int(weight * whole) for tag, weight in exact.items()}


def _tag_order(weights: Mapping[str, int], sizes: Mapping[str, int], count: int) -> list[str]:
    """The tag of each prompt: in turn the one that is furthest behind its share, of those that have prompts left.

    After as many prompts as the sum of the weights, each tag has had exactly its weight.
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


def _record(words: Vocabulary, tag: str, content: Content, turned: bool, *, plurals: Plurals) -> PromptRecord:
    *parts, background = content
    exclude: list[dict[str, Any]] = []
    if tag == "counting":
        number, label = int(parts[0]), parts[1]
        include = [_clause(label, count=number)]
        exclude = [_clause(label, count=number + 1)]
    elif tag == "colors":
        include = [_clause(parts[1], colour=parts[0])]
    elif tag == "position":
        first, relation, second = (parts[2], _OPPOSITE[parts[1]], parts[0]) if turned else parts
        include = [_clause(second), _clause(first) | {"position": [relation, 0]}]
    else:
        if tag == "color_attr":
            include = [_clause(parts[1], colour=parts[0]), _clause(parts[3], colour=parts[2])]
        else:
            include = [_clause(label) for label in parts]
        if turned:
            include.reverse()
    metadata = {"tag": tag, "include": include} | ({"exclude": exclude} if exclude else {})
    text = wording(tag, include, vocabulary=words.name, background=background, plurals=plurals)
    return PromptRecord.of(text, metadata=metadata)


def _clause(label: str, *, count: int = 1, colour: str | None = None) -> dict[str, Any]:
    return {"class": label, "count": count} | ({"color": colour} if colour else {})


def _mix(*keys: str | int) -> bytes:
    return hashlib.sha256("/".join(("gdro-geneval", *map(str, keys))).encode()).digest()
