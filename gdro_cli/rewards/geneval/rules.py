"""GenEval's rules: they compare the objects of an image with the clauses of its prompt (arXiv 2310.11513).

Three verdicts on the same detections:

    accuracy  the official one: at least ``count`` of each class; the ``count`` most confident have colour and position
    strict    exactly ``count``, all with the colour, all in their position, nothing excluded; implies accuracy
    soft      the training reward in [0, 1]: the mean over parts, whose number depends only on the prompt

Pure functions: no detector, no image.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from gdro_cli.core.geneval import Clause, Task

if TYPE_CHECKING:
    from gdro_cli.rewards.geneval.detection import Box, Detection

RULE = "geneval-1"
"""Name of the rules in the provenance; it changes whenever the same detections would be judged differently.

It was kept when thresholds became those of float32, which concerns confidences of exactly float32(0.3) alone.
"""
THRESHOLD = 0.3
"""A detection counts above this confidence."""
COUNTING_THRESHOLD = 0.9
"""The same for the tag ``counting``."""
MAX_OBJECTS = 16
"""The most detections that count per class; a prompt cannot reach a higher count."""
_SHRINK = 0.1
"""Share of both boxes' sizes by which their offset is shortened, so that nearly aligned objects have no relation."""
_ALIGNED = 1e-3
"""Pixels; a shortened offset below this is 0."""
_CLEARLY = 0.5
"""Share of the distance between the centres that the offset on an axis must exceed for a relation on that axis."""


@dataclass(frozen=True, slots=True)
class Verdict:
    """The result of the rules for one image."""

    accuracy: bool
    """The official verdict; surplus objects are allowed unless an ``exclude`` clause forbids them."""
    strict: bool
    soft: float
    """Mean of ``parts``, in [0, 1]."""
    parts: tuple[float, ...]
    """Per include clause: count, then colour and position if the clause has them; each in [0, 1]."""
    reasons: tuple[str, ...]
    """Why ``strict`` is False, for a person to read; empty if it is True."""


def threshold(tag: str) -> float:
    """The confidence above which a detection counts for prompts of this tag."""
    return COUNTING_THRESHOLD if tag == "counting" else THRESHOLD


def select(objects: Sequence[Detection], *, tag: str) -> dict[str, list[Detection]]:
    """The detections that count for a prompt of this tag, by class, the most confident first.

    They are strictly above the threshold in float32, as in the official code, and at most ``MAX_OBJECTS`` of a class;
    overlap does not matter. Equal confidences keep the detector's order.
    """
    limit = _float32(threshold(tag))
    confident = [item for item in objects if _float32(item.confidence) > limit]
    by_class: dict[str, list[Detection]] = {}
    for item in sorted(confident, key=lambda item: -item.confidence):
        by_class.setdefault(item.label, []).append(item)
    return {label: items[:MAX_OBJECTS] for label, items in by_class.items()}


def _float32(value: float) -> float:
    rounded: float = struct.unpack("f", struct.pack("f", value))[0]
    return rounded


def relations(a: Box, b: Box) -> frozenset[str]:
    """The position of ``a`` relative to ``b``: none, one or two of ``core.geneval.RELATIONS``.

    The offset between the centres is shortened on each axis by a tenth of both sizes, but not below 0, and divided by
    the full distance between the centres. A relation on an axis holds if the result exceeds one half.
    """
    offset = [(a[axis] + a[axis + 2] - b[axis] - b[axis + 2]) / 2 for axis in (0, 1)]
    sizes = [a[axis + 2] - a[axis] + b[axis + 2] - b[axis] for axis in (0, 1)]
    shortened = [max(abs(way) - _SHRINK * size, 0.0) for way, size in zip(offset, sizes, strict=True)]
    if max(shortened) < _ALIGNED:
        return frozenset()
    distance = math.hypot(*offset)
    dx, dy = (math.copysign(rest, way) / distance for rest, way in zip(shortened, offset, strict=True))
    holds = {"left of": dx < -_CLEARLY, "right of": dx > _CLEARLY, "above": dy < -_CLEARLY, "below": dy > _CLEARLY}
    return frozenset(name for name, true in holds.items() if true)


def wants_colours(task: Task) -> frozenset[str]:
    """The classes for which some clause demands a colour."""
    return frozenset(clause.label for clause in task.include if clause.colour is not None)


def judge(task: Task, objects: Mapping[str, Sequence[Detection]], colours: Mapping[str, Sequence[str]]) -> Verdict:
    """Judge one image.

    Args:
        task: the clauses of the prompt.
        objects: by class, as from ``select``, the most confident first.
        colours: ``colours[label][i]`` is the colour of ``objects[label][i]``, for the classes of ``wants_colours``.

    Raises:
        ValueError: a class of ``wants_colours`` does not have one colour per object.
    """
    outcomes = [_judge_clause(clause, task, objects, colours) for clause in task.include]
    intruders = [
        f"{clause.label}: {count} found, at most {clause.count - 1} allowed"
        for clause in task.exclude
        if (count := len(objects.get(clause.label, ()))) >= clause.count
    ]
    parts = tuple(part for outcome in outcomes for part in outcome.parts)
    return Verdict(
        accuracy=not intruders and all(outcome.matched for outcome in outcomes),
        strict=not intruders and all(outcome.exact for outcome in outcomes),
        soft=sum(parts) / len(parts),
        parts=parts,
        reasons=(*(reason for outcome in outcomes for reason in outcome.reasons), *intruders),
    )


@dataclass(frozen=True, slots=True)
class _Outcome:
    """The result of one include clause."""

    matched: bool
    """The clause holds officially. The target of its position need not match here: it has a clause of its own."""
    exact: bool
    """The clause holds strictly; implies ``matched``."""
    parts: tuple[float, ...]
    reasons: tuple[str, ...]
    """Empty if ``exact``."""


def _judge_clause(
    clause: Clause, task: Task, objects: Mapping[str, Sequence[Detection]], colours: Mapping[str, Sequence[str]]
) -> _Outcome:
    label, count, found = clause.label, clause.count, len(objects.get(clause.label, ()))
    matched, exact = found >= count, found == count
    parts = [_nearness(found, count)]
    reasons = [] if exact else [f"{label}: {found} found, {count} expected"]
    if clause.colour is not None:
        names = colours.get(label, ())
        if len(names) != found:
            raise ValueError(f"{len(names)} colours for {found} objects of the class {label!r}")
        best, total = names[:count].count(clause.colour), names.count(clause.colour)
        matched, exact = matched and best == count, exact and total == count
        parts.append(_nearness(total, count))
        if total != count:
            reasons.append(f"{label}: {total} found {clause.colour}, {count} expected")
        elif best < count:
            reasons.append(f"{label}: only {best} of the {count} most confident {clause.colour}")
    if clause.position is not None:
        relation, number = clause.position
        target = task.include[number]
        problem = _misplaced(relation, clause, target, objects)
        matched, exact = matched and problem is None, exact and problem is None
        parts.append(1.0 if problem is None else 0.0)
        if problem is not None:
            reasons.append(f"{label} {relation} {target.label} expected: {problem}")
    return _Outcome(matched, exact, tuple(parts), tuple(reasons))


def _nearness(found: int, expected: int) -> float:
    """``1 - |expected - found| / expected``, not below 0."""
    return max(1.0 - abs(expected - found) / expected, 0.0)


def _misplaced(relation: str, clause: Clause, target: Clause, objects: Mapping[str, Sequence[Detection]]) -> str | None:
    """What is wrong with the clause's objects relative to the target's; None if all of them have the relation."""
    own, others = (objects.get(side.label, ())[: side.count] for side in (clause, target))
    if len(own) < clause.count or len(others) < target.count:
        return "not enough found"
    for item in own:
        for other in others:
            actual = relations(item.box, other.box)
            if relation not in actual:
                return f"found {' and '.join(sorted(actual)) or 'no relation'}"
    return None
