"""Prompt records and sets, and the text in quotes."""

from __future__ import annotations

import hashlib
import pickle

import pytest

from gdro_cli.core.quotes import quoted_text
from gdro_cli.data.prompts import PromptRecord, PromptSet


def test_id_is_the_digest_of_the_content() -> None:
    expected = hashlib.sha256(b'["a \\"B\\"","B",{"x":1}]').hexdigest()[:12]
    assert PromptRecord.of('a "B"', target="B", metadata={"x": 1}).id == expected


def test_the_id_depends_on_every_part_but_not_on_the_order_of_keys() -> None:
    base = PromptRecord.of("p", target="t", metadata={"a": 1, "b": 2})
    assert PromptRecord.of("p", target="t", metadata={"b": 2, "a": 1}).id == base.id
    others = [
        PromptRecord.of("q", target="t", metadata={"a": 1, "b": 2}),
        PromptRecord.of("p", target=None, metadata={"a": 1, "b": 2}),
        PromptRecord.of("p", target="t", metadata={"a": 1, "b": 3}),
    ]
    assert len({base.id, *(other.id for other in others)}) == 4


def test_json_round_trip_and_changed_content() -> None:
    record = PromptRecord.of("ein Schild „STRASSE“ 看板", target="STRASSE", metadata={"tag": "x"})
    assert PromptRecord.from_json(record.to_json()) == record
    with pytest.raises(ValueError, match="was changed"):
        PromptRecord.from_json(record.to_json() | {"prompt": "another"})
    wrong: list[object] = [[], {}, record.to_json() | {"prompt": 3}, record.to_json() | {"more": 1}]
    for value in wrong:
        with pytest.raises(ValueError):
            PromptRecord.from_json(value)


def test_records_can_be_pickled_and_hashed() -> None:
    record = PromptRecord.of("p", metadata={"include": [{"class": "dog"}]})
    assert pickle.loads(pickle.dumps(record)) == record
    assert len({record, PromptRecord.of("p", metadata={"include": [{"class": "dog"}]})}) == 1


def test_a_set_keeps_the_first_of_equal_records_and_counts_the_others() -> None:
    a, b, c = (PromptRecord.of(text) for text in "abc")
    prompts = PromptSet.of([a, b, a, c, b, a])
    assert prompts.records == (a, b, c)
    assert prompts.dropped_duplicates == 3
    assert prompts.digest == PromptSet.of([a, b, c]).digest
    assert prompts.digest != PromptSet.of([b, a, c]).digest
    assert prompts.first(2).records == (a, b)
    assert prompts.first(2).digest == PromptSet.of([a, b]).digest


@pytest.mark.parametrize(
    ("prompt", "expected"),
    [
        ('a sign that says "HELLO" here', "HELLO"),
        ("a sign that says “HELLO” here", "HELLO"),
        ("ein Schild mit „HALLO“", "HALLO"),
        ('"A" and "B"', "A"),
        ('“A” and "B"', "A"),
        ('“say "HI" now”', 'say "HI" now'),
        ('two "BIG WORDS"', "BIG WORDS"),
        ('empty ""', ""),
        ("it's a dog's life", None),
        ('one " only', None),
        ("看板に「こんにちは」と『店』", "こんにちは"),
        ("『こんにちは』", "こんにちは"),
        ("un panneau « SALUT »", " SALUT "),
        ("ein Schild »HALLO«", "HALLO"),
        ("\u2039SALUT\u203a", "SALUT"),
        ('«Café» with a sign "OPEN"', "OPEN"),  # double quotes come first
        ("rock 'n' roll", None),
        ("", None),
    ],
)
def test_quoted_text(prompt: str, expected: str | None) -> None:
    assert quoted_text(prompt) == expected
