"""What a judge may answer: read, or missing with a reason; a refusal is one sentence; nothing waits for ever."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from gdro_cli.rewards.judge import endpoint
from gdro_cli.rewards.judge.base import AXES, Judgement
from gdro_cli.rewards.judge.unified_prompt import read_answer
from gdro_cli.rewards.judge.unified_reward import UnifiedRewardJudge
from tests.support.faulty import Case, check, never_unexpected, outcome, rows
from tests.support.judge_server import MODEL, JudgeServer, Reply, fails, lines, says

GOOD = lines(3, 4, 2)
# Code 0: all axes are read; 1: the judgement is missing, or an axis of it is, with this reason.
TEXTS = [
    Case("good", GOOD, 0),
    Case("of 5", lines("3/5", "4 / 5", "2"), 0),
    Case("bold", "**Alignment Score (1-5):** 3\n**Coherence Score (1-5):** 4\n**Style Score (1-5):** 2", 0),
    Case("bullets", "- Alignment Score: 3\n- Coherence Score: 4\n- Style Score: 2", 0),
    Case("CRLF", GOOD.replace("\n", "\r\n"), 0),
    Case("thought before", f"<think>Style Score (1-5): 5</think>{GOOD}", 0),
    Case("said twice", f"{GOOD}\n{GOOD}", 0),
    Case("nothing", "", 1, "has no alignment score, has no coherence score"),
    Case("garbage", "lorem ipsum \x00\ufffd", 1, "has no style score"),
    Case("no style", "Alignment Score: 3\nCoherence Score: 4", 1, "has no style score"),
    Case("zero", lines(0, 4, 2), 1, "has a alignment score of 0, which is not between 1 and 5"),
    Case("below zero", lines(3, 4, -2), 1, "style score of -2"),
    Case("of ten", lines("8/10", 4, 2), 1, "has no alignment score"),
    Case("nan", lines("nan", 4, 2), 1, "has no alignment score"),
    Case("a word", lines("three", 4, 2), 1, "has no alignment score"),
    Case("two numbers", f"{GOOD}\nStyle Score (1-5): 4", 1, "has different style scores (2 and 4)"),
    Case("100,000 digits", lines("1" * 100_000, 4, 2), 1, "has no alignment score"),
    Case("a megabyte", "x" * 1_000_000, 1, "has no alignment score"),
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


ENDLESS = json.dumps({"choices": [{"message": {"content": "x" * 5_000_000}}]}).encode()
REPLIES = [
    Case("good", says(GOOD), 0),
    Case("no JSON", Reply(b"<html>"), 1, "is not JSON"),
    Case("nothing", Reply(b""), 1, "is not JSON"),
    Case("NUL", Reply(b"\x00" * 100), 1, "is not JSON"),
    Case("no UTF-8", Reply(b'{"choices": "\xff\xfe"}'), 1, "is not JSON"),
    Case("50,000 brackets", Reply(b"[" * 50_000), 1, "is not JSON"),
    Case("two halves", says(f"{GOOD}\n\U0001f600"), 0),
    Case("a list", Reply(b"[]"), 1, "is not that of a chat"),
    Case("a number", Reply(b"3"), 1, "is not that of a chat"),
    Case("no choices", Reply(b'{"choices": []}'), 1, "holds no choices"),
    Case("choices are text", Reply(b'{"choices": "abc"}'), 1, "is not that of a chat"),
    Case("choice is null", Reply(b'{"choices": [null]}'), 1, "is not that of a chat"),
    Case("no message", Reply(b'{"choices": [{}]}'), 1, "is not that of a chat"),
    Case("content is null", says(None), 1, "is not text"),
    Case("content is a list", says([{"type": "text", "text": GOOD}]), 1, "is not text"),
    Case("cut off", says(GOOD[:-1], finish="length"), 1, "was cut off"),
    Case("5 MB", Reply(ENDLESS), 1, "has more than 4 MiB"),
    Case("says it is gzip", Reply(b"nonsense", headers={"Content-Encoding": "gzip"}), 1, "cannot be decoded"),
    Case("400", fails(400, message="too large\nreally"), 1, "400 Bad Request (too large really)"),
    Case("400 with a deep body", Reply(b"[" * 50_000, 400), 1, "400 Bad Request"),
    Case("500", fails(500), 1, "HTTP 500"),
    Case("599 with a huge body", Reply(b"x" * 5_000_000, 599), 1, "HTTP 599"),
    Case("hangs up", Reply(b"", hang_up=True), 1, "no answer in 1 attempts"),
    Case("401", fails(401, message="bad key"), 3, "401 Unauthorized (bad key)"),
    Case("404", fails(404), 3, "404 Not Found"),
    Case("redirect", Reply(b"", 302, {"Location": "http://127.0.0.1:1/"}), 3, "302 Found"),
]


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[JudgeServer]:
    for name in ("NO_PROXY", "no_proxy"):
        monkeypatch.setenv(name, "127.0.0.1")
    monkeypatch.setattr(endpoint, "FIRST_PAUSE", 0.01)
    running = JudgeServer()
    yield running
    running.close()


@rows(REPLIES)
def test_a_reply(case: Case, server: JudgeServer) -> None:
    server.otherwise = lambda text: case.given
    judge = UnifiedRewardJudge(server.url, MODEL, timeout=20.0, retries=0)
    if case.code == 3:
        check(outcome(lambda: judge.judge([Image.new("RGB", (8, 8))], ["a card"])), 3, case.words)
        return
    (judged,) = judge.judge([Image.new("RGB", (8, 8))], ["a card"])
    check_judgement(judged, case)


MODELS = [
    Case("no JSON", Reply(b"x"), 0),
    Case("50,000 brackets", Reply(b"[" * 50_000), 0),
    Case("a list", Reply(b"[1]"), 0),
    Case("names are numbers", Reply(b'{"data": [{"id": 3}]}'), 3, "serves 3, not"),
    Case("a name of 100 kB", Reply(b'{"data": [{"id": "' + b"m" * 100_000 + b'"}]}'), 3, "not"),
    Case("data is null", Reply(b'{"data": null}'), 0),
    Case("hangs up", Reply(b"", hang_up=True), 3, "cannot be reached"),
    Case("403", fails(403), 3, "403 Forbidden"),
]


@rows(MODELS)
def test_a_list_of_models(case: Case, server: JudgeServer) -> None:
    server.models = case.given
    check(outcome(UnifiedRewardJudge(server.url, MODEL, timeout=20.0, retries=0).load), case.code, case.words)


ADDRESSES = [
    Case("nothing", "", 2),
    Case("no scheme", "localhost:8000/v1", 2, "must be an address like"),
    Case("a file", "file:///etc/passwd", 2, "must be an address like"),
    Case("no host", "http:///v1", 2, "must be an address like"),
    Case("a fragment", "http://h/v1#x", 2, "must be an address like"),
    Case("a password", "http://user:secret@h/v1", 2, "holds a user name"),
    Case("a query", "http://h/v1?key=secret", 2, "holds a user name"),
    Case("NUL", "http://h\0/v1", 2, "must be an address like"),
    Case("line end", "http://h/v1\nHost: x", 2, "must be an address like"),
    Case("port 99999", "http://h:99999/v1", 2, "must be an address like"),
    Case("5,000 letters", "http://" + "h" * 5000 + "/v1", 0),
]


@rows(ADDRESSES)
def test_an_address(case: Case) -> None:
    found = never_unexpected(lambda: endpoint.check_url(case.given), 2)
    if case.words:
        check(found, 2, case.words)
    assert "secret" not in found.message


def test_a_judge_s_picture_that_is_none(server: JudgeServer, tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(b"none")
    judge = UnifiedRewardJudge(server.url, MODEL, timeout=20.0, retries=0)
    (judged,) = judge.judge([tmp_path / "a.png"], ["a card"])
    assert judged.reason is not None and "cannot be decoded" in judged.reason and not server.seen
