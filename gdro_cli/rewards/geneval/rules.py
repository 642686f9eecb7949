"""GenEval's rules: what was found in an image against what its prompt asks for (arXiv 2310.11513).

Three verdicts on the same detections:

    accuracy  the official one: at least ``count`` of each class; the ``count`` most confident have the colour and place
    strict    exactly ``count``, all of the colour, all in their place, nothing excluded; implies accuracy
    soft      the training reward in [0, 1]: the mean over parts, whose number the prompt alone decides

Pure functions: no detector, no image.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from gdro_cli.core.geneval import Clause, Task

if TYPE_CHECKING:
    from gdro_cli.rewards.geneval.detection import Box, Detection

RULE = "geneval-1"
"""Name of the rules in the provenance; it changes whenever the same detections would be judged differently."""
THRESHOLD = 0.3
"""A detection counts above this confidence."""
COUNTING_THRESHOLD = 0.9
"""The same for the tag ``counting``."""
MAX_OBJECTS = 16
"""Detections kept per class; a count above this cannot be met."""
_SHRINK = 0.1
"""Share of both boxes' sizes by which their offset is shortened: nearly aligned objects have no relation."""
_ALIGNED = 1e-3
"""Shortened offsets below this, in pixels, are none."""
_CLEARLY = 0.5
"""Share of the distance between the centres that an axis must exceed for a relation on it."""


@dataclass(frozen=True, slots=True)
class Verdict:
    """What the rules say of one image."""

    accuracy: bool
    """The official verdict; more objects than asked for are allowed unless an ``exclude`` clause forbids them."""
    strict: bool
    soft: float
    """Mean of ``parts``, in [0, 1]."""
    parts: tuple[float, ...]
    """Per include clause: count, then colour and position if asked for; each in [0, 1]."""
    reasons: tuple[str, ...]
    """Why ``strict`` is False, for a person to read; empty when it is True."""


def threshold(tag: str) -> float:
    """The confidence above which a detection counts for prompts of this tag."""
    return COUNTING_THRESHOLD if tag == "counting" else THRESHOLD


def select(objects: Sequence[Detection], *, tag: str) -> dict[str, list[Detection]]:
    """The detections that count for a prompt of this tag, by class, the most confident first.

    Strictly above the threshold and at most ``MAX_OBJECTS`` of a class; overlap does not matter.
    """
    confident = [item for item in objects if item.confidence > threshold(tag)]
    found: dict[str, list[Detection]] = {}
    for item in sorted(confident, key=lambda item: -item.confidence):
        same = found.setdefault(item.label, [])
        if len(same) < MAX_OBJECTS:
            same.append(item)
    return found


def relations(a: Box, b: Box) -> frozenset[str]:
    """How ``a`` lies relative to ``b``: none, one or two of ``core.geneval.RELATIONS``.

    The offset between the centres is shortened on each axis by a tenth of both sizes, but not beyond 0, and divided
    by the distance between the centres, which is not shortened. An axis counts beyond half of that.
    """
    offset = [(a[axis] + a[axis + 2] - b[axis] - b[axis + 2]) / 2 for axis in (0, 1)]
    sizes = [a[axis + 2] - a[axis] + b[axis + 2] - b[axis] for axis in (0, 1)]
    left = [max(abs(way) - _SHRINK * size, 0.0) for way, size in zip(offset, sizes, strict=True)]
    if max(left) < _ALIGNED:
        return frozenset()
    distance = math.hypot(*offset)
    dx, dy = (math.copysign(rest, way) / distance for rest, way in zip(left, offset, strict=True))
    holds = {"left of": dx < -_CLEARLY, "right of": dx > _CLEARLY, "above": dy < -_CLEARLY, "below": dy > _CLEARLY}
    return frozenset(name for name, true in holds.items() if true)


def wants_colours(task: Task) -> frozenset[str]:
    """The classes of which some clause asks for a colour."""
    return frozenset(clause.label for clause in task.include if clause.colour is not None)


def judge(task: Task, found: Mapping[str, Sequence[Detection]], colours: Mapping[str, Sequence[str]]) -> Verdict:
    """Judge one image.

    Args:
        task: what the prompt asks for.
        found: what ``select`` kept, by class, the most confident first.
        colours: ``colours[label][i]`` is the colour of ``found[label][i]``, for the classes of ``wants_colours``.

    Raises:
        ValueError: a class that needs them has not one colour for each object.
    """
    outcomes = [_judge_clause(clause, task, found=found, colours=colours) for clause in task.include]
    intruders = [
        f"{clause.label}: {len(found.get(clause.label, ()))} found, fewer than {clause.count} allowed"
        for clause in task.exclude
        if len(found.get(clause.label, ())) >= clause.count
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
    """One include clause in one image."""

    matched: bool
    """It holds in the official sense, apart from whether the target of its position does: that is another clause, which
    must hold anyway."""
    exact: bool
    """It holds in the strict sense; implies ``matched``."""
    parts: tuple[float, ...]
    reasons: tuple[str, ...]
    """Empty when it is exact."""


def _judge_clause(
    clause: Clause,
    task: Task,
    *,
    found: Mapping[str, Sequence[Detection]],
    colours: Mapping[str, Sequence[str]],
) -> _Outcome:
    objects = found.get(clause.label, ())
    matched, exact = len(objects) >= clause.count, len(objects) == clause.count
    parts = [_nearness(len(objects), clause.count)]
    reasons = [] if exact else [f"{clause.label}: {len(objects)} found, {clause.count} asked for"]
    if clause.colour is not None:
        names = colours.get(clause.label, ())
        if len(names) != len(objects):
            raise ValueError(f"{len(names)} colours for {len(objects)} objects of the class {clause.label!r}")
        best, all_found = names[: clause.count].count(clause.colour), names.count(clause.colour)
        matched, exact = matched and best == clause.count, exact and all_found == clause.count
        parts.append(_nearness(all_found, clause.count))
        if all_found != clause.count:
            reasons.append(f"{clause.label}: {all_found} found {clause.colour}, {clause.count} asked for")
        elif best < clause.count:
            reasons.append(f"{clause.label}: only {best} of the {clause.count} most confident {clause.colour}")
    if clause.position is not None:
        relation, number = clause.position
        target = task.include[number]
        problem = _misplaced(relation, clause, target, found=found)
        matched, exact = matched and problem is None, exact and problem is None
        parts.append(1.0 if problem is None else 0.0)
        if problem is not None:
            reasons.append(f"{clause.label} {relation} {target.label} asked for: {problem}")
    return _Outcome(matched, exact, tuple(parts), tuple(reasons))


def _nearness(got: int, wanted: int) -> float:
    """``1 - |wanted - got| / wanted``, not below 0."""
    return max(1.0 - abs(wanted - got) / wanted, 0.0)


def _misplaced(
    relation: str, clause: Clause, target: Clause, *, found: Mapping[str, Sequence[Detection]]
) -> str | None:
    """Why not each of the clause's objects is in its place relative to each of the target's; None if they are."""
    objects, others = (found.get(each.label, ())[: each.count] for each in (clause, target))
    if len(objects) < clause.count or len(others) < target.count:
        return "not enough found"
    for item in objects:
        for other in others:
            seen = relations(item.box, other.box)
            if relation not in seen:
                return f"found {' and '.join(sorted(seen)) or 'no relation'}"
    return None
