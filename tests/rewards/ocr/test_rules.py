"""The reward of a recognised text, worked out by hand."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rapidfuzz.distance import Levenshtein

from gdro_cli.errors import UserError
from gdro_cli.rewards.base import Score
from gdro_cli.rewards.ocr.engine import Reading, reading_order
from gdro_cli.rewards.ocr.reward import target_text
from gdro_cli.rewards.ocr.rules import exact_match, normalise, ocr_reward, similarity
from tests.support.ocr_signs import Prompt


def test_normalise_removes_spaces_and_case() -> None:
    assert normalise(" Open 24/7! ") == "open24/7!"


@pytest.mark.parametrize(
    ("target", "recognised"),
    [
        ("HELLO\nYOU", "HELLOYOU"),  # two lines of a sign
        ("HELLO\tYOU", "HELLO YOU"),
        ("HELLO\u00a0YOU", "HELLO YOU"),  # no-break space
        ("HELLO\u200bYOU", "HELLO YOU"),  # zero-width space
        ("HELLO YOU", "HELLO\u3000YOU"),  # the recogniser's own wide space
        ("I \u2665\ufe0f YOU", "I \u2665 YOU"),  # the heart's form
        ("CAFE\u0301", "CAF\u00c9"),  # decomposed
        ("DON\u2019T", "DON'T"),
        ("DON'T", "DON\u2019T"),  # on either side
        ("\u201cHI\u201d", '"HI"'),
        ("9\u20135", "9-5"),
        ("9 \u2014 5", "9 - 5"),
        ("WAIT\u2026", "WAIT..."),
        ("WAIT...", "WAIT\u2026"),
        ("OPEN!", "OPEN\uff01"),  # full width
        ("\u00c5", "\u212b"),  # the sign of the unit
    ],
)
def test_a_perfect_image_satisfies_its_target_however_it_is_typed(target: str, recognised: str) -> None:
    assert ocr_reward(target, recognised) == similarity(target, recognised) == 1.0
    assert exact_match(target, recognised)


_LETTERS = st.text("ABCDEHLO ", min_size=1).filter(str.strip)
_READ = st.text("ABCDEHLOabcdehlo .,'\"-!0\u2019\u201c\u2013\u2026\u00b4\uff01\uff21\u00e9\u4e2d")


@given(_LETTERS, _READ)
def test_signs_of_plain_letters_have_the_numbers_of_flow_grpos_own_rule(target: str, recognised: str) -> None:
    expected, actual = (text.replace(" ", "").lower() for text in (target, recognised))
    distance = 0 if expected in actual else min(Levenshtein.distance(expected, actual), len(expected))
    assert ocr_reward(target, recognised) == 1 - distance / len(expected)
    assert similarity(target, recognised) == 1 - Levenshtein.distance(expected, actual) / max(
        len(expected), len(actual)
    )
    assert exact_match(target, recognised) == (expected == actual)


@pytest.mark.parametrize(
    ("target", "recognised", "expected"),
    [
        ("HELLO", "hello", 1.0),  # case
        ("NEW SHOP", "newshop", 1.0),  # spaces, on either side
        ("NEWSHOP", "new shop", 1.0),
        ("HELLO", "HALLO", 1 - 1 / 5),  # one letter replaced
        ("HELLO", "HELO", 1 - 1 / 5),  # one letter missing
        ("FRESH", "FRESHH", 1.0),  # the target is a part: extra text is free
        ("HELLO", "xxHELLOyy", 1.0),
        ("HELLO", "", 0.0),  # five insertions = len(target)
        ("ABC", "UVWXYZ", 0.0),  # distance 6, capped at 3
        ("A", "B", 0.0),
        ("CAFÉ", "cafe", 1 - 1 / 4),  # accents count
        ("OPEN!", "OPEN", 1 - 1 / 5),  # so does punctuation
    ],
)
def test_reward(target: str, recognised: str, expected: float) -> None:
    assert ocr_reward(target, recognised) == pytest.approx(expected, abs=1e-12)


def test_similarity_has_no_exemption_for_parts() -> None:
    # FRESH against FRESHH: distance 1, longer side 6. Against nothing: distance 5 of 5.
    assert similarity("FRESH", "FRESHH") == pytest.approx(1 - 1 / 6)
    assert similarity("FRESH", "fresh") == 1.0
    assert similarity("FRESH", "") == 0.0
    # ABC against UVWXYZ: distance 6 of 6, not negative.
    assert similarity("ABC", "UVWXYZ") == 0.0


def test_exact_match() -> None:
    assert exact_match("New Shop", "NEWSHOP")
    assert not exact_match("FRESH", "FRESHH")
    assert not exact_match("FRESH", "")


@pytest.mark.parametrize("rule", [ocr_reward, similarity, exact_match])
def test_an_empty_target_is_refused(rule: object) -> None:
    assert callable(rule)
    for target in ("  ", "\u200b\n"):
        with pytest.raises(ValueError, match="empty"):
            rule(target, "text")


def test_target_text() -> None:
    assert target_text(Prompt("p", "HELLO")) == "HELLO"
    for target in (None, "", "  "):
        with pytest.raises(UserError, match="a cat in a hat"):
            target_text(Prompt("a cat in a hat", target))


def test_reading_order_goes_row_by_row() -> None:
    # Two rows of two words; the right word of each row is a little higher than the left one.
    left_top, right_top = (0, 4, 20, 14), (30, 1, 50, 11)
    left_low, right_low = (0, 24, 20, 34), (30, 21, 50, 31)
    boxes = [right_low, left_low, right_top, left_top]
    assert [boxes[i] for i in reading_order(boxes)] == [left_top, right_top, left_low, right_low]


def test_reading_order_of_small_lines_close_together() -> None:
    # Lines 8 pixels apart, the lower one further left: a fixed limit of 10 pixels would swap them.
    upper, lower = (20, 10, 50, 17), (4, 18, 40, 25)
    assert reading_order([lower, upper]) == [1, 0]


def test_reading_order_of_a_tall_and_a_small_word() -> None:
    # The small word is within the height of the tall one: one row, left to right.
    tall, small = (30, 0, 60, 40), (0, 22, 20, 32)
    assert reading_order([tall, small]) == [1, 0]


def test_reading_order_of_nothing() -> None:
    assert reading_order([]) == []


def test_reading_joins_lines_and_averages_confidence() -> None:
    reading = Reading(("NEW", "SHOP"), (0.5, 1.0), 0.25)
    assert reading.text == "NEWSHOP"
    assert reading.confidence == pytest.approx(0.75)
    assert Reading((), (), 0.0).confidence is None


def test_a_score_has_a_value_or_a_reason() -> None:
    with pytest.raises(ValueError, match="reason"):
        Score(None)
    with pytest.raises(ValueError, match="reason"):
        Score(0.0, "failed")
