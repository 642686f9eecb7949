"""UnifiedReward's prompt and answers, checked by hand."""

from __future__ import annotations

import pytest

from gdro_cli.rewards.judge.base import AXES
from gdro_cli.rewards.judge.unified_prompt import TEMPLATE, provenance, read_answer, request_text
from tests.support.judge_server import lines


def read(answer: str, *, complete: bool = True) -> tuple[float | None, ...]:
    judgement = read_answer(answer, complete=complete)
    return tuple(judgement.axes[axis] for axis in AXES)


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        # the authors' example
        (
            lines("2.694700002670288", "2.371500015258789", "2.802500009536743"),
            (2.694700002670288, 2.371500015258789, 2.802500009536743),
        ),
        (lines(1, 5, 3), (1.0, 5.0, 3.0)),
        ("\n\n  alignment score (1-5):4\r\n\tCOHERENCE SCORE ( 1 - 5 ) : 3.0 \n\nStyle Score: 2.\n", (4.0, 3.0, 2.0)),
        (
            "**Alignment Score (1-5):** 4.5\n- **Coherence Score** (1\u20135): `3`\n### Style Score (1-5): *2*",
            (4.5, 3.0, 2.0),
        ),
        (
            "1. Alignment Score (1-5): 4/5\n2) Coherence Score (1-5): 3 / 5\n\u2022 Style Score \\(1\\-5\\): 2",
            (4.0, 3.0, 2.0),
        ),
        (
            "Style Score (1-5): 2\nI looked closely.\nAlignment Score (1-5): 4\nCoherence Score (1-5): 3",
            (4.0, 3.0, 2.0),
        ),
        # the same number twice
        (lines(4, 3, 2) + "\n\n" + lines("4.0", 3, 2), (4.0, 3.0, 2.0)),
        # the form repeated, then the answer
        (lines("X", "Y", "Z") + "\n" + lines(4, 3, 2), (4.0, 3.0, 2.0)),
        # thoughts are not an answer
        ("<think>\n" + lines(1, 1, 1) + "\n</think>\n" + lines(4, 3, 2), (4.0, 3.0, 2.0)),
        (lines(1, 1, 1) + "\n</think>\n" + lines(4, 3, 2), (4.0, 3.0, 2.0)),
    ],
)
def test_good_answers(answer: str, expected: tuple[float, ...]) -> None:
    assert read(answer) == expected
    assert read_answer(answer).reason is None


@pytest.mark.parametrize(
    ("answer", "expected", "reason"),
    [
        (lines(4, 3, 5.1), (4.0, 3.0, None), "style score of 5.1, which is not between 1 and 5"),
        (lines(0, 3, 2), (None, 3.0, 2.0), "alignment score of 0, which"),
        (lines(-4, 3, 2), (None, 3.0, 2.0), "alignment score of -4, which"),
        (lines(4, "3 to 4", 2), (4.0, None, 2.0), "has no coherence score"),
        (lines(4, "3 (a glitch at the left)", 2), (4.0, None, 2.0), "has no coherence score"),
        (lines("nan", "3,5", "four"), (None, None, None), "has no alignment score"),
        (lines(4, 3, 2) + "\nStyle Score (1-5): 3", (4.0, 3.0, None), "different style scores (2 and 3)"),
        ("Alignment Score (1-5): 4 Coherence Score (1-5): 3", (None, None, None), "has no alignment score"),
        ("Overall Alignment Score (1-5): 4", (None, None, None), "has no alignment score"),
        ("Alignment Score (1-10): 4\nCoherence Score (1-5): 3\nStyle Score (1-5): 2", (None, 3.0, 2.0), "no alignment"),
        ("<think>\n" + lines(1, 1, 1), (None, None, None), "has no alignment score"),
        ("I'm sorry, but I can't help with that.", (None, None, None), "has no alignment score, has no coherence"),
        ("", (None, None, None), "has no style score"),
    ],
)
def test_an_axis_with_no_clear_number_is_missing(answer: str, expected: tuple[float | None, ...], reason: str) -> None:
    assert read(answer) == expected
    assert reason in str(read_answer(answer).reason)


def test_the_last_line_of_an_answer_that_was_cut_off_is_not_read() -> None:
    """3.75 cut after the 3 would look like a 3."""
    judgement = read_answer("Alignment Score (1-5): 4\nCoherence Score (1-5): 3", complete=False)
    assert tuple(judgement.axes.values()) == (4.0, None, None)
    assert judgement.reason is not None and "cut off" in judgement.reason
    assert read(lines(4, 3, 2) + "\n", complete=False) == (4.0, 3.0, None)


def test_the_details_keep_the_beginning_of_the_answer() -> None:
    assert read_answer(lines(4, 3, 2)).details == {"answer": lines(4, 3, 2)}
    assert len(read_answer("word " * 1000).details["answer"]) == 500


def test_the_caption_is_inserted_unchanged() -> None:
    caption = 'a sign that says "{caption}" \\1 {0} %s'
    text = request_text(caption)
    assert text.endswith(f"Text Caption: [{caption}]")
    assert text.replace(f"[{caption}]", "[{caption}]") == TEMPLATE


def test_an_answer_in_the_form_of_the_prompt_can_be_read() -> None:
    answer = request_text("a cat").replace(": X", ": 4").replace(": Y", ": 3").replace(": Z", ": 2")
    assert read(answer) == (4.0, 3.0, 2.0)
    assert read(request_text("a cat")) == (None, None, None)


def test_own_words_have_their_own_provenance() -> None:
    """The caption's place has two names, as in the authors' code and here."""
    assert request_text("a {cat}", template="Judge [{prompt}].") == "Judge [a {cat}]."
    assert request_text("a {cat}", template="Judge [{caption}].") == "Judge [a {cat}]."
    own = provenance()
    assert own == provenance(TEMPLATE) and provenance("Judge [{prompt}].") != own


@pytest.mark.parametrize("token", ["<|im_end|>", "</s>", " <|endoftext|>\n", "<|im_end|><|endoftext|>"])
def test_end_tokens_behind_the_answer_are_no_part_of_it(token: str) -> None:
    assert read(lines(4, 3, 2.01) + token) == (4.0, 3.0, 2.01)


def test_a_hair_beyond_the_scale_is_its_end() -> None:
    assert read(lines(5.0003, 0.98, 5.05)) == (5.0, 1.0, 5.0)
    assert read(lines(5.06, 0.9, 4)) == (None, None, 4.0)
