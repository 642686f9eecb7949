"""A judge's answers are read or missing with a reason; and which addresses an endpoint may have."""

from __future__ import annotations

import json

from hypothesis import given, settings
from hypothesis import strategies as st

from gdro_cli.rewards.endpoint import check_base_url
from gdro_cli.rewards.judge.base import AXES, Judgement
from gdro_cli.rewards.judge.unified_prompt import read_answer
from tests.support.faulty import Case, check, never_unexpected, rows
from tests.support.judge_server import lines

GOOD = lines(3, 4, 2)
# Code 0: all axes are read; 1: the judgement is missing, or an axis of it is, with this reason.
TEXTS = [
    Case("good", GOOD, 0),
    Case("of 5", lines("3/5", "4 / 5", "2"), 0),
    Case("bold", "**Alignment Score (1-5):** 3\n**Coherence Score (1-5):** 4\n**Style Score (1-5):** 2", 0),
    Case("bullets", "- Alignment Score: 3\n- Coherence Score: 4\n- Style Score: 2", 0),
    Case("CRLF", GOOD.replace("\n", "\r\n"), 0),
    Case("after a thought", f"<think>Style Score (1-5): 5</think>{GOOD}", 0),
    Case("given twice", f"{GOOD}\n{GOOD}", 0),
    Case("nothing", "", 1, "has no alignment score, has no coherence score"),
    Case("garbage", "lorem ipsum \x00\ufffd", 1, "has no style score"),
    Case("no style", "Alignment Score: 3\nCoherence Score: 4", 1, "has no style score"),
    Case("zero", lines(0, 4, 2), 1, "has a alignment score of 0, which is not between 1 and 5"),
    Case("below zero", lines(3, 4, -2), 1, "style score of -2"),
    Case("of ten", lines("8/10", 4, 2), 1, "has no alignment score"),
    Case("nan", lines("nan", 4, 2), 1, "has no alignment score"),
    Case("a word", lines("three", 4, 2), 1, "has no alignment score"),
    Case("two numbers", f"{GOOD}\nStyle Score (1-5): 4", 1, "has different style scores (2 and 4)"),
    Case("400 digits", lines("9" * 400, 4, 2), 1, "alignment score of inf"),
    Case("only a thought", f"<think>{GOOD}", 1, "has no alignment score"),
    Case("in one line", GOOD.replace("\n", ", "), 1, "has no"),
    Case("JSON", json.dumps({"alignment": 3}), 1, "has no alignment score"),
]


@rows(TEXTS)
def test_an_answer(case: Case) -> None:
    judged = read_answer(case.given)
    check_judgement(judged, case)
    assert len(judged.details["answer"]) <= 500


def check_judgement(judged: Judgement, case: Case) -> None:
    assert (judged.reason is None) == (case.code == 0), judged
    if judged.reason is not None:
        assert case.words in judged.reason and "\n" not in judged.reason and len(judged.reason) < 1000


@settings(max_examples=150, deadline=None, derandomize=True)
@given(text=st.text(max_size=80) | st.lists(st.sampled_from([*GOOD.splitlines(), "*", "<think>", "</think>", "9"])))
def test_any_answer_is_read_or_missing(text: str | list[str]) -> None:
    judged = read_answer(text if isinstance(text, str) else "\n".join(text))
    assert (judged.reason is None) == all(judged.axes[axis] is not None for axis in AXES)


ADDRESSES = [
    Case("nothing", "", 2),
    Case("no scheme", "localhost:8000/v1", 2, "must be an address like"),
    Case("a file", "file:///etc/passwd", 2, "must be an address like"),
    Case("no host", "http:///v1", 2, "must be an address like"),
    Case("a fragment", "http://h/v1#x", 2, "must be an address like"),
    Case("a password", "http://user:secret@h/v1", 2, "contains a user name"),
    Case("a query", "http://h/v1?key=secret", 2, "contains a user name"),
    Case("NUL", "http://h\0/v1", 2, "must be an address like"),
    Case("line end", "http://h/v1\nHost: x", 2, "must be an address like"),
    Case("5,000 letters", "http://" + "h" * 5000 + "/v1", 0),
]


@rows(ADDRESSES)
def test_an_address(case: Case) -> None:
    result = never_unexpected(lambda: check_base_url(case.given), 2)
    if case.words:
        check(result, 2, case.words)
    assert "secret" not in result.message
