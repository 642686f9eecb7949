"""GenEval's rules on hand-made detections. Comments work out the values; defects are those of public code."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gdro_cli.core.geneval import COLOURS, RELATIONS, TAGS, Task, parse_task
from gdro_cli.rewards.geneval.detection import Box, Detection
from gdro_cli.rewards.geneval.rules import MAX_OBJECTS, Verdict, judge, relations, select, threshold, wants_colours

NOWHERE = np.zeros((1, 1), dtype=np.bool_)


def at(label: str, x: float, y: float, *, size: float = 2.0, confidence: float = 0.95) -> Detection:
    """A square object with its centre at (x, y)."""
    half = size / 2
    return Detection(label, confidence, (x - half, y - half, x + half, y + half), NOWHERE)


def some(label: str, count: int) -> list[Detection]:
    return [at(label, 10.0 * number, 0) for number in range(count)]


def want(
    label: str, count: int = 1, *, color: str | None = None, position: tuple[str, int] | None = None
) -> dict[str, Any]:
    clause = {"class": label, "count": count, "color": color, "position": list(position) if position else None}
    return {key: value for key, value in clause.items() if value is not None}


def ask(*include: dict[str, Any], exclude: Sequence[dict[str, Any]] = (), tag: str = "two_object") -> Task:
    return parse_task({"tag": tag, "include": list(include), "exclude": list(exclude)})


def verdict(task: Task, objects: Sequence[Detection]) -> tuple[Any, ...]:
    """Accuracy, strict and soft for a task without colours."""
    result = judge(task, select(objects, tag=task.tag), {})
    return result.accuracy, result.strict, result.soft


# Which detections count


def test_thresholds_by_tag() -> None:
    assert {tag: threshold(tag) for tag in TAGS} == {tag: 0.9 if tag == "counting" else 0.3 for tag in TAGS}


@pytest.mark.parametrize(("tag", "limit"), [("single_object", 0.3), ("counting", 0.9)])
def test_a_confidence_equal_to_the_threshold_does_not_count(tag: str, limit: float) -> None:
    """The official code has confidences in float32 and compares in float32, where 0.3 is a little more than 0.3."""
    equal = np.float32(limit)
    just_above = float(np.nextafter(equal, np.float32(1)))
    objects = [at("dog", 0, 0, confidence=value) for value in (limit, float(equal), just_above)]
    assert [item.confidence for item in select(objects, tag=tag)["dog"]] == [just_above]


def test_one_object_at_the_threshold_is_not_found() -> None:
    dog = at("dog", 0, 0, confidence=float(np.float32(0.3)))
    assert verdict(ask(want("dog"), tag="single_object"), [dog]) == (False, False, 0.0)


def test_a_class_without_a_confident_object_is_absent() -> None:
    assert select([at("dog", 0, 0, confidence=0.3)], tag="colors") == {}


def test_the_most_confident_come_first_and_equal_ones_in_the_given_order() -> None:
    objects = [at("dog", x, 0, confidence=value) for x, value in enumerate([0.4, 0.8, 0.8, 0.6])]
    assert [item.box[0] + 1 for item in select(objects, tag="position")["dog"]] == [1, 2, 3, 0]


def test_the_sixteen_most_confident_of_a_class_count() -> None:
    dogs = [at("dog", 0, 0, confidence=0.31 + 0.02 * number) for number in range(20)]
    selected = select([*dogs, at("cat", 0, 0, confidence=0.305)], tag="colors")
    assert selected["dog"] == dogs[:3:-1] and len(selected["dog"]) == MAX_OBJECTS == 16
    assert len(selected["cat"]) == 1
    # So an image never has 17, and 16 are exact even if it shows more.
    assert verdict(ask(want("dog", 17)), some("dog", 20)) == (False, False, pytest.approx(16 / 17))
    assert verdict(ask(want("dog", 16)), some("dog", 20)) == (True, True, 1.0)


def test_overlapping_objects_all_count() -> None:
    assert len(select([at("dog", 0, 0), at("dog", 0, 0)], tag="counting")["dog"]) == 2


# Relations of boxes


def box(x: float, y: float, width: float, height: float) -> Box:
    return x - width / 2, y - height / 2, x + width / 2, y + height / 2


ORIGIN = box(0, 0, 0, 0)


@pytest.mark.parametrize(
    ("x", "y", "expected"), [(-9, 0, "left of"), (9, 0, "right of"), (0, -9, "above"), (0, 9, "below")]
)
def test_the_four_relations_with_y_pointing_down(x: float, y: float, expected: str) -> None:
    assert relations(box(x, y, 2, 2), box(0, 0, 2, 2)) == {expected}


def test_two_relations_at_once() -> None:
    # Offset (10, 10), sizes 1 + 1: shortened to 9.8 each, distance 14.14, share 0.693.
    assert relations(box(10, 10, 1, 1), box(0, 0, 1, 1)) == {"right of", "below"}
    assert relations(box(-10, -10, 1, 1), box(0, 0, 1, 1)) == {"left of", "above"}


def test_the_distance_is_not_shortened() -> None:
    # Offset (6, 8), distance 10. Widths 10 + 10 shorten it to 4, heights 10 + 10 to 6: shares 0.4 and 0.6.
    # Divided by the shortened distance sqrt(16 + 36) = 7.21 they would be 0.55 and 0.83, and both would hold.
    assert relations(box(6, 8, 10, 10), box(0, 0, 10, 10)) == {"below"}


def test_each_axis_is_shortened_by_the_sizes_on_that_axis() -> None:
    # Offset (8, 8), distance 11.31. Widths 1 + 1 shorten it to 7.8 (0.69), heights 20 + 20 to 4 (0.35).
    assert relations(box(8, 8, 1, 20), box(0, 0, 1, 20)) == {"right of"}


def test_an_offset_shortened_to_zero_is_no_relation() -> None:
    # Offset 2, widths 10 + 10: 0. Offset 1, widths 30 + 30: 1 - 6 becomes 0, not "left of".
    assert relations(box(2, 0, 10, 10), box(0, 0, 10, 10)) == frozenset()
    assert relations(box(1, 0, 30, 30), box(0, 0, 30, 30)) == frozenset()
    assert relations(ORIGIN, ORIGIN) == frozenset()


def test_shortened_offsets_that_are_too_small_on_both_axes() -> None:
    # Offset (3, 3), distance 4.24, sizes 10 + 10: shortened to 1 each, share 0.24.
    assert relations(box(3, 3, 10, 10), box(0, 0, 10, 10)) == frozenset()


def test_exactly_half_is_not_enough() -> None:
    # Offset 4, sizes 10 + 10: shortened to 2, share 0.5. With one size of 9.9: shortened to 2.01, share 0.5025.
    for x, y, expected in [(-4, 0, "left of"), (4, 0, "right of"), (0, -4, "above"), (0, 4, "below")]:
        assert relations(box(x, y, 10, 10), box(0, 0, 10, 10)) == frozenset()
        assert relations(box(x, y, 9.9, 9.9), box(0, 0, 10, 10)) == {expected}


def test_an_offset_below_a_thousandth_of_a_pixel_is_no_relation() -> None:
    # The share would be 1 in both cases.
    assert relations(box(0.0009, 0, 0, 0), ORIGIN) == frozenset()
    assert relations(box(0.0011, 0, 0, 0), ORIGIN) == {"right of"}


# Counts


@pytest.mark.parametrize(
    ("found", "accuracy", "strict", "soft"),
    [
        (0, False, False, 0.0),
        (1, False, False, 0.5),
        (2, True, True, 1.0),
        (3, True, False, 0.5),
        (4, True, False, 0.0),
    ],
)
def test_count_of_one_class(found: int, accuracy: bool, strict: bool, soft: float) -> None:
    # 2 expected: only accuracy allows surplus objects; soft is 1 - |2 - found| / 2.
    assert verdict(ask(want("dog", 2)), some("dog", found)) == (accuracy, strict, soft)


def test_objects_of_other_classes_do_not_matter() -> None:
    assert verdict(ask(want("dog")), [*some("dog", 1), *some("cat", 5)]) == (True, True, 1.0)


def test_all_include_clauses_must_hold() -> None:
    task = ask(want("dog"), want("cat"))
    assert verdict(task, [*some("dog", 1), *some("cat", 1)]) == (True, True, 1.0)
    assert verdict(task, some("dog", 1)) == (False, False, 0.5)
    assert verdict(task, []) == (False, False, 0.0)


def test_exclude_fails_from_its_count_on() -> None:
    counting = ask(want("dog", 2), exclude=[want("dog", 3)], tag="counting")
    assert verdict(counting, some("dog", 2)) == (True, True, 1.0)
    # The soft reward has no part for exclude clauses: the count part already falls.
    assert verdict(counting, some("dog", 3)) == (False, False, 0.5)
    assert verdict(counting, some("dog", 1)) == (False, False, 0.5)


def test_any_exclude_clause_fails_the_image_on_its_own() -> None:
    task = ask(want("dog"), exclude=[want("cat", 2), want("bird", 1)])
    assert verdict(task, [*some("dog", 1), *some("cat", 1)]) == (True, True, 1.0)
    assert verdict(task, [*some("dog", 1), *some("cat", 2)]) == (False, False, 1.0)
    assert verdict(task, [*some("dog", 1), *some("bird", 1)]) == (False, False, 1.0)


def test_two_clauses_of_one_class_share_the_objects() -> None:
    # One dog satisfies both clauses of count 1; with counts 1 and 2 no number is exact for both.
    assert verdict(ask(want("dog"), want("dog")), some("dog", 1)) == (True, True, 1.0)
    assert verdict(ask(want("dog"), want("dog", 2)), some("dog", 2)) == (True, False, 0.5)
    # A red and a blue dog: each clause checks only the most confident dog, so they exclude each other.
    task = ask(want("dog", color="red"), want("dog", color="blue"))
    result = judge(task, {"dog": some("dog", 2)}, {"dog": ["red", "blue"]})
    # Count parts 1 - |1 - 2| / 1 = 0, colour parts 1.
    assert (result.accuracy, result.strict, result.parts) == (False, False, (0.0, 1.0, 0.0, 1.0))


# Colours


@pytest.mark.parametrize(
    ("colours", "accuracy", "strict", "parts"),
    [
        (["red", "red"], True, True, (1.0, 1.0)),
        (["red", "blue"], False, False, (1.0, 0.5)),
        (["blue", "blue"], False, False, (1.0, 0.0)),
        # Accuracy checks the two most confident; soft counts all objects.
        (["red", "red", "blue"], True, False, (0.5, 1.0)),
        (["red", "blue", "red"], False, False, (0.5, 1.0)),
        (["red", "red", "red"], True, False, (0.5, 0.5)),
        (["red"], False, False, (0.5, 0.5)),
        ([], False, False, (0.0, 0.0)),
    ],
)
def test_two_red_dogs(colours: list[str], accuracy: bool, strict: bool, parts: tuple[float, ...]) -> None:
    task = ask(want("dog", 2, color="red"), tag="colors")
    result = judge(task, {"dog": some("dog", len(colours))} if colours else {}, {"dog": colours} if colours else {})
    assert (result.accuracy, result.strict, result.parts) == (accuracy, strict, parts)
    assert result.soft == pytest.approx(sum(parts) / 2)


def test_the_classes_whose_colour_a_clause_demands() -> None:
    assert wants_colours(ask(want("dog", color="red"), want("cat"), want("bird", color="red"))) == {"dog", "bird"}
    assert wants_colours(ask(want("dog"))) == frozenset()


@pytest.mark.parametrize("colours", [{}, {"dog": ["red"]}, {"dog": ["red"] * 3}])
def test_each_object_needs_a_colour(colours: dict[str, list[str]]) -> None:
    with pytest.raises(ValueError, match="colours for 2 objects of the class 'dog'"):
        judge(ask(want("dog", color="red")), {"dog": some("dog", 2)}, colours)


# Positions


def test_position_of_the_second_object_relative_to_the_first() -> None:
    task = ask(want("dog"), want("cat", position=("left of", 0)), tag="position")
    assert verdict(task, [at("dog", 10, 0), at("cat", 0, 0)]) == (True, True, 1.0)
    # Parts: dog 1, cat 1, position 0.
    assert verdict(task, [at("dog", 0, 0), at("cat", 10, 0)]) == (False, False, pytest.approx(2 / 3))


@pytest.mark.parametrize("dogs", [[20, 30], [30, 20]])
@pytest.mark.parametrize(("cats", "expected"), [([0, 5], True), ([0, 25], False), ([25, 0], False)])
def test_every_object_has_the_relation_to_every_target(dogs: list[float], cats: list[float], expected: bool) -> None:
    # A cat at 25 is left of only one dog.
    task = ask(want("dog", 2), want("cat", 2, position=("left of", 0)), tag="position")
    result = verdict(task, [*(at("dog", x, 0) for x in dogs), *(at("cat", x, 0) for x in cats)])
    assert result == (expected, expected, 1.0 if expected else pytest.approx(2 / 3))


def test_the_position_concerns_only_the_most_confident_objects() -> None:
    task = ask(want("dog"), want("cat", position=("left of", 0)), tag="position")
    left_first = [at("dog", 10, 0), at("cat", 0, 0, confidence=0.9), at("cat", 20, 0, confidence=0.8)]
    # Parts: dog 1, cat 1 - |1 - 2| = 0, position 1.
    assert verdict(task, left_first) == (True, False, pytest.approx(2 / 3))
    right_first = [at("dog", 10, 0), at("cat", 0, 0, confidence=0.8), at("cat", 20, 0, confidence=0.9)]
    assert verdict(task, right_first) == (False, False, pytest.approx(1 / 3))


def test_a_target_clause_that_is_not_matched_fails_the_position() -> None:
    task = ask(want("dog", color="red"), want("cat", position=("left of", 0)), tag="position")
    objects = {"dog": [at("dog", 10, 0)], "cat": [at("cat", 0, 0)]}
    assert judge(task, objects, {"dog": ["red"]}).accuracy
    result = judge(task, objects, {"dog": ["blue"]})
    # The boxes have the relation, and the soft part needs no more: 1, colour 0, 1, 1.
    assert (result.accuracy, result.parts) == (False, (1.0, 0.0, 1.0, 1.0))


@pytest.mark.parametrize("objects", [[at("dog", 10, 0)], [at("cat", 0, 0)], []])
def test_a_position_without_enough_objects_fails(objects: list[Detection]) -> None:
    task = ask(want("dog"), want("cat", position=("left of", 0)), tag="position")
    # Of the three parts, only the count of a class that is present can be 1.
    assert verdict(task, objects) == (False, False, pytest.approx(len(objects) / 3))


def test_a_failed_position_also_fails_clauses_that_refer_to_it() -> None:
    # The bird is above the cat, but the cat is not left of the dog: accuracy fails, although the bird's parts are 1.
    task = ask(want("dog"), want("cat", position=("left of", 0)), want("bird", position=("above", 1)))
    result = judge(task, select([at("dog", 0, 0), at("cat", 10, 0), at("bird", 10, -10)], tag="position"), {})
    assert (result.accuracy, result.parts) == (False, (1.0, 1.0, 0.0, 1.0, 1.0))


# Reasons


def test_reasons_say_what_is_wrong() -> None:
    task = ask(
        want("dog", 2, color="red"), want("cat", position=("above", 0)), exclude=[want("bird", 1)], tag="position"
    )
    objects = {"dog": [at("dog", 0, 0)], "cat": [at("cat", 9, 0)], "bird": some("bird", 2)}
    assert judge(task, objects, {"dog": ["blue"]}).reasons == (
        "dog: 1 found, 2 expected",
        "dog: 0 found red, 2 expected",
        "cat above dog expected: not enough found",
        "bird: 2 found, at most 0 allowed",
    )
    objects |= {"dog": [at("dog", 0, 0), at("dog", 0, 0), at("dog", 0, 0)], "bird": []}
    assert judge(task, objects, {"dog": ["red", "blue", "red"]}).reasons == (
        "dog: 3 found, 2 expected",
        "dog: only 1 of the 2 most confident red",
        "cat above dog expected: found right of",
    )


# Defects of public training rewards, absent here


def test_defect_absent_the_count_part_is_never_negative() -> None:
    # 1 - |1 - 4| / 1 = -2 unclipped, which would take the mean below that of an empty image.
    result = judge(ask(want("dog"), want("cat")), {"dog": some("dog", 4), "cat": some("cat", 1)}, {})
    assert result.parts == (0.0, 1.0)


def test_defect_absent_the_colour_part_is_never_negative() -> None:
    result = judge(ask(want("dog", color="red")), {"dog": some("dog", 3)}, {"dog": ["red"] * 3})
    assert result.parts == (0.0, 0.0)


def test_defect_absent_a_failed_position_is_one_part_of_zero() -> None:
    # Not a 0 and a 1, with a mean of one half.
    task = ask(want("dog"), want("cat", position=("left of", 0)))
    assert judge(task, {"dog": [at("dog", 0, 0)], "cat": [at("cat", 9, 0)]}, {}).parts == (1.0, 1.0, 0.0)


def test_defect_absent_the_number_of_parts_does_not_depend_on_the_image() -> None:
    task = ask(want("dog", color="red"), want("cat", color="blue", position=("left of", 0)))
    lengths = {
        len(judge(task, {"dog": some("dog", a), "cat": some("cat", b)}, {"dog": ["red"] * a, "cat": ["red"] * b}).parts)
        for a in range(3)
        for b in range(3)
    }
    assert lengths == {5}


# Properties

LABELS = ["dog", "cat"]
NAMES = list(COLOURS[:2])


@st.composite
def cases(draw: st.DrawFn, *, official: bool = False) -> tuple[Task, Verdict, Verdict]:
    """A task, and the verdicts on two images; ``official`` excludes only one more of an included class."""
    include: list[dict[str, Any]] = []
    for number in range(draw(st.integers(1, 3))):
        position = st.tuples(st.sampled_from(RELATIONS), st.integers(0, number - 1)) if number else st.none()
        clause = want(
            draw(st.sampled_from(LABELS)),
            draw(st.integers(1, 3)),
            color=draw(st.none() | st.sampled_from(NAMES)),
            position=draw(st.none() | position),
        )
        include.append(clause)
    free = st.lists(st.builds(want, st.sampled_from(LABELS), st.integers(1, 3)), max_size=2)
    more = [want(clause["class"], clause["count"] + 1) for clause in include if draw(st.booleans())]
    task = ask(*include, exclude=more if official else draw(free))
    return task, draw(verdicts(task)), draw(verdicts(task))


@st.composite
def verdicts(draw: st.DrawFn, task: Task) -> Verdict:
    edge = st.integers(0, 30)
    objects = select(draw(st.lists(st.builds(at, st.sampled_from(LABELS), edge, edge), max_size=5)), tag=task.tag)
    return judge(task, objects, {label: [draw(st.sampled_from(NAMES)) for _ in own] for label, own in objects.items()})


@pytest.mark.slow
@settings(max_examples=150, deadline=None)
@given(case=cases())
def test_for_any_prompt_and_image(case: tuple[Task, Verdict, Verdict]) -> None:
    """If there are exactly ``count`` objects, they are the ``count`` most confident. So strict implies accuracy for
    each clause, including the targets of positions; the exclude clauses are the same. Strict makes each part 1. The
    reverse is not true for every prompt: the soft reward has no part for exclude clauses."""
    task, *results = case
    parts = sum(1 + (clause.colour is not None) + (clause.position is not None) for clause in task.include)
    for result in results:
        assert len(result.parts) == parts
        assert all(0.0 <= part <= 1.0 for part in result.parts) and 0.0 <= result.soft <= 1.0
        assert result.accuracy or not result.strict
        assert result.soft == 1.0 or not result.strict
        assert result.strict == (result.reasons == ())


@pytest.mark.slow
@settings(max_examples=150, deadline=None)
@given(case=cases(official=True))
def test_for_prompts_like_the_official_ones_soft_is_one_exactly_if_strict_is_true(
    case: tuple[Task, Verdict, Verdict],
) -> None:
    """If each part is 1, each count is exact, and all objects have their colour and position. An exclude clause of an
    included class with a greater count then cannot fail. (One of another class can:
    ``test_any_exclude_clause_fails_the_image_on_its_own``.)"""
    _, *results = case
    assert [result.soft == 1.0 for result in results] == [result.strict for result in results]
