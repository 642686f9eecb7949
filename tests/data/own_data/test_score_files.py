"""Scores that another program computed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from gdro_cli.data.own_data import read_score_file
from gdro_cli.errors import UserError
from tests.support.own_data import write_table


def test_scores_and_reasons(tmp_path: Path) -> None:
    lines = [{"id": "a/0", "score": 1}, {"id": "a/1", "error": " no face found "}, {"id": "b/0", "score": -0.5, "x": 1}]
    path = write_table(tmp_path / "scores.jsonl", *lines)
    assert read_score_file(path) == {"a/0": 1.0, "a/1": "no face found", "b/0": -0.5}


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ({"id": "a", "score": 2}, "the id a appeared before; give each image one score"),
        ({"id": "b", "value": 1}, "either score, or error with the reason why there is none; its keys are id, value"),
        ({"id": "b", "score": 1, "error": "x"}, "it must have either score, or error"),
        ({"id": "b", "score": None}, "score must be a finite number, not None"),
        ({"id": "b", "score": True}, "score must be a finite number, not True"),
        ({"id": "b", "error": ""}, "error must say why there is no score, not ''"),
        ({"id": 3, "score": 1}, "id must be a text, not 3"),
        ({"score": 1}, "id must be a text, not None"),
        ('{"id": "b", "score": NaN}', "NaN is not a JSON number"),
        ('{"id": "b", "score": 1e999}', "score must be a finite number, not inf"),
    ],
)
def test_a_bad_line(tmp_path: Path, line: dict[str, Any] | str, said: str) -> None:
    path = write_table(tmp_path / "scores.jsonl", {"id": "a", "score": 1}, line)
    with pytest.raises(UserError) as caught:
        read_score_file(path)
    message = str(caught.value)
    assert f"{path} line 2" in message and said in message and "\n" not in message


def test_files_without_scores(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="has no scores"):
        read_score_file(write_table(tmp_path / "scores.jsonl"))
    with pytest.raises(UserError, match="cannot be read"):
        read_score_file(tmp_path / "none.jsonl")
