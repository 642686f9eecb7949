"""Scores that another program computed for images of a store."""

from __future__ import annotations

from pathlib import Path
from reprlib import repr as shown
from typing import Any

from gdro_cli.data.own_data.jsonl import finite_number, read_json_rows
from gdro_cli.errors import UserError


def read_score_file(path: Path) -> dict[str, float | str]:
    """Read scores by image id; a text is the reason why the image has none.

    Args:
        path: JSON Lines, ``{"id": "...", "score": 0.3}`` or ``{"id": "...", "error": "why"}``. Other keys are ignored.

    Raises:
        UserError: the file cannot be read, or a line is wrong; the message names the line.
    """
    scores: dict[str, float | str] = {}
    for where, line in read_json_rows(path):
        try:
            name, value = _score(line)
            if name in scores:
                raise ValueError(f"the id {name} appeared before; give each image one score")
        except ValueError as error:
            raise UserError(f"{path.parent / where}: {error}") from error
        scores[name] = value
    if not scores:
        raise UserError(f'{path} has no scores: write one {{"id": ..., "score": ...}} per line')
    return scores


def _score(line: dict[str, Any]) -> tuple[str, float | str]:
    name = line.get("id")
    if not isinstance(name, str) or not name:
        raise ValueError(f"id must be a text, not {shown(name)}")
    if ("score" in line) == ("error" in line):
        keys = ", ".join(line)
        raise ValueError(f"it must have either score, or error with the reason why there is none; its keys are {keys}")
    if "error" in line:
        if not isinstance(line["error"], str) or not line["error"].strip():
            raise ValueError(f"error must say why there is no score, not {shown(line['error'])}")
        return name, line["error"].strip()
    return name, finite_number(line["score"], "score")
