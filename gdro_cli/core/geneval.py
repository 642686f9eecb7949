"""GenEval's words and clauses: what a prompt demands, read from its metadata (arXiv 2310.11513).

    {"tag": "position", "include": [{"class": "ring", "count": 1},
                                    {"class": "heart", "count": 1, "position": ["left of", 0]}],
     "prompt": "a photo of a heart left of a ring"}

All ``include`` clauses must hold. An ``exclude`` clause fails the image if it shows that many objects.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from reprlib import repr as shown
from typing import Any

from gdro_cli.suggest import similar

TAGS = ("single_object", "two_object", "counting", "colors", "position", "color_attr")
"""The six kinds of prompt, in the order of the official report."""

OFFICIAL_SIZES: Mapping[str, int] = {
    "single_object": 80, "two_object": 99, "counting": 80, "colors": 94, "position": 100, "color_attr": 100
}  # fmt: skip
"""Prompts of each tag in the official evaluation set, 553 in all."""

COLOURS = ("red", "orange", "yellow", "green", "blue", "purple", "pink", "brown", "black", "white")
"""The ten colours that a clause may demand."""

RELATIONS = ("left of", "right of", "above", "below")

RENAMED: Mapping[str, str] = {"mouse": "computer mouse", "remote": "tv remote", "keyboard": "computer keyboard"}
"""Names of COCO that GenEval replaces because they are ambiguous in a prompt."""

COCO_CLASSES = (
    "person", "bicycle", "car", "motorcycle", "airplane", "bus", "train", "truck", "boat", "traffic light",
    "fire hydrant", "stop sign", "parking meter", "bench", "bird", "cat", "dog", "horse", "sheep", "cow",
    "elephant", "bear", "zebra", "giraffe", "backpack", "umbrella", "handbag", "tie", "suitcase", "frisbee",
    "skis", "snowboard", "sports ball", "kite", "baseball bat", "baseball glove", "skateboard", "surfboard",
    "tennis racket", "bottle", "wine glass", "cup", "fork", "knife", "spoon", "bowl", "banana", "apple",
    "sandwich", "orange", "broccoli", "carrot", "hot dog", "pizza", "donut", "cake", "chair", "couch",
    "potted plant", "bed", "dining table", "toilet", "tv", "laptop", "computer mouse", "tv remote",
    "computer keyboard", "cell phone", "microwave", "oven", "toaster", "sink", "refrigerator", "book", "clock",
    "vase", "scissors", "teddy bear", "hair drier", "toothbrush",
)  # fmt: skip
"""The 80 classes of COCO in GenEval's spelling, in COCO's order."""

SHAPES = ("circle", "square", "triangle", "star", "heart", "ring")
"""The classes of the embedded world."""

VOCABULARIES: Mapping[str, tuple[str, ...]] = {"coco": COCO_CLASSES, "shapes": SHAPES}
"""What the detectors can detect, by the name of the vocabulary."""

DETECTORS: Mapping[str, str] = {"shapes": "shapes", "mask2former": "coco"}
"""The vocabulary of each detector that a recipe can name."""


@dataclass(frozen=True, slots=True)
class Clause:
    """One demand on the objects of one class."""

    label: str
    """The class; ``class`` in the metadata."""
    count: int
    """How many, 1 or more."""
    colour: str | None = None
    position: tuple[str, int] | None = None
    """(relation, index of an earlier include clause): where these objects are relative to those."""


@dataclass(frozen=True, slots=True)
class Task:
    """All demands of one prompt."""

    tag: str
    include: tuple[Clause, ...]
    exclude: tuple[Clause, ...] = ()


def parse_task(metadata: Mapping[str, Any], *, classes: Collection[str] | None = None) -> Task:
    """Read the metadata of one prompt.

    An unknown key beside the clauses is ignored. One inside a clause is refused, because a demand would be lost.

    Args:
        metadata: ``tag``, ``include`` and perhaps ``exclude``, as JSON values.
        classes: the classes that a clause may demand; None allows any.

    Raises:
        ValueError: something is missing or wrong; the message says what and where in the metadata.
    """
    for key in ("tag", "include"):
        if key not in metadata:
            raise ValueError(f"the key {key} is missing; GenEval needs metadata in JSON Lines with tag and include")
    tag = metadata["tag"]
    if tag not in TAGS:
        raise ValueError(f"the tag {shown(tag)} is not one of {', '.join(TAGS)}")
    include = _clauses(metadata, "include", classes)
    if not include:
        raise ValueError("include must list at least one clause")
    return Task(tag, include, _clauses(metadata, "exclude", classes))


def _clauses(metadata: Mapping[str, Any], key: str, classes: Collection[str] | None) -> tuple[Clause, ...]:
    listed = metadata.get(key)
    if listed is None:
        return ()
    if not isinstance(listed, list):
        raise ValueError(f"{key} must be a list of clauses, not {type(listed).__name__}")
    return tuple(_clause(value, f"{key}[{number}]", number, key, classes) for number, value in enumerate(listed))


def _clause(value: Any, where: str, number: int, key: str, classes: Collection[str] | None) -> Clause:
    if not isinstance(value, Mapping):
        raise ValueError(f'{where} must be an object such as {{"class": "dog", "count": 1}}, not {shown(value)}')
    unknown = sorted(set(value) - {"class", "count", "color", "position"}, key=str)
    if unknown:
        raise ValueError(f"{where} has the unknown key {shown(unknown[0])}; it may have class, count, color, position")
    for needed in ("class", "count"):
        if needed not in value:
            raise ValueError(f"{where} lacks the key {needed}")
    label, count, colour = value["class"], value["count"], value.get("color")
    if not isinstance(label, str) or not label.strip():
        raise ValueError(f"{where} has the class {shown(label)}; it must be a text and not empty")
    if classes is not None and label not in classes:
        names = ", ".join(classes) if len(classes) <= 10 else f"{len(classes)} names such as {next(iter(classes))!r}"
        hint = _known_as(label, classes) or similar(label, classes) or f": it knows {names}"
        raise ValueError(f"{where} asks for the class {shown(label)}, which the detector does not know{hint}")
    if isinstance(count, bool) or not isinstance(count, int) or count < 1:
        raise ValueError(f"{where} has the count {shown(count)}; it must be a whole number, 1 or more")
    if colour is not None and colour not in COLOURS:
        raise ValueError(f"{where} asks for the color {shown(colour)}, which is not one of {', '.join(COLOURS)}")
    position = value.get("position")
    if key == "exclude" and not (colour is None and position is None):
        what = "color" if position is None else "position"
        raise ValueError(f"{where} has a {what}, which only include clauses may have")
    return Clause(label, count, colour, None if position is None else _position(position, where, number))


def _known_as(label: str, classes: Collection[str]) -> str:
    """Where a class is known: by GenEval's name for it, or by another detector; empty if nowhere."""
    name = RENAMED.get(label, label)
    if name in classes:
        return f"; GenEval calls it `{name}`"
    for detector, vocabulary in DETECTORS.items():
        if name in VOCABULARIES[vocabulary]:
            return f", but `reward.geneval.detector: {detector}` does" + (f" as `{name}`" if name != label else "")
    return ""


def _position(value: Any, where: str, number: int) -> tuple[str, int]:
    if not isinstance(value, list | tuple) or len(value) != 2:
        raise ValueError(
            f'{where} has the position {shown(value)}; write ["left of", 0]: a relation and an earlier clause'
        )
    relation, target = value
    if relation not in RELATIONS:
        raise ValueError(f"{where} has the relation {shown(relation)}, which is not one of {', '.join(RELATIONS)}")
    if isinstance(target, bool) or not isinstance(target, int) or not 0 <= target < number:
        raise ValueError(
            f"{where} has a position relative to clause {shown(target)}; "
            + (f"it must be an earlier one, 0 to {number - 1}" if number else "the first clause can have none")
        )
    return relation, target
