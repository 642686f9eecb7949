"""docs/own-data.md: each example line is read, as the form that the page says."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from gdro_cli.data.own_data import read_own_data
from gdro_cli.data.own_data.lines import KEYS
from tests.support.own_data import save_images, write_table

PAGE = (Path(__file__).parents[3] / "docs" / "own-data.md").read_text(encoding="utf-8")
EXAMPLES = re.findall(r"^\| ([\w ]+) \| `(\{.*?\})` \| \S", PAGE, flags=re.MULTILINE)


@pytest.mark.parametrize(("form", "line"), EXAMPLES)
def test_an_example_is_read(tmp_path: Path, form: str, line: str) -> None:
    save_images(tmp_path, "a.png", "b.png", "c.png", "a.jpg", "b.jpg")
    data = read_own_data(write_table(tmp_path / "data.jsonl", json.loads(line)))
    assert data.form == form
    assert data.groups[0].record.prompt == "a kite"
    assert not [note for note in data.notes if "ignored" in note]


def test_every_form_has_an_example() -> None:
    assert {form for form, _ in EXAMPLES} == {keys.form for keys in KEYS}
    assert len(EXAMPLES) >= len(KEYS)
