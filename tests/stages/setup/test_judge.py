"""Which axes of the judge are quality."""

from __future__ import annotations

import pytest

from gdro_cli.config.load import load_recipe
from gdro_cli.stages.setup.judge import open_judge


@pytest.mark.parametrize(
    ("recipe", "edits", "axes"),
    [
        ("ocr", False, ["alignment", "coherence", "style"]),
        ("geneval", False, ["coherence", "style"]),
        ("ocr", True, ["coherence", "style"]),
        ("geneval", True, ["coherence", "style"]),
    ],
)
def test_axes_of_u(recipe: str, edits: bool, axes: list[str]) -> None:
    judge = open_judge(load_recipe(recipe), edits=edits)
    assert judge is not None and judge.version["axes"] == axes
