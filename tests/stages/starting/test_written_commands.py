"""The commands in the README.md that ``gdro init`` writes run as they are, in their order."""

from __future__ import annotations

import contextlib
import re
from pathlib import Path

import pytest

from gdro_cli.cli.commands import app
from gdro_cli.data.own_data import read_own_data
from gdro_cli.stages.starting.init import DataForm, run
from tests.support.own_data import save_images

pytestmark = pytest.mark.slow

FEW = {r"eval: .*count": 2, "images_per_prompt": 6, r"steps(?=.*optimizer)": 2, "eval_every": 0}
"""Keys of the written recipe, as regular expressions, and smaller numbers, so that a run takes seconds."""


def run_the_readme(folder: Path) -> None:
    recipe = folder / "recipe.yaml"
    text = recipe.read_text(encoding="utf-8")
    for key, value in FEW.items():
        text, found = re.subn(rf"^(  {key}): \d+", rf"\1: {value}", text, flags=re.MULTILINE)
        assert found, key
    recipe.write_text(text, encoding="utf-8")
    lines = re.findall(r"^    gdro (.*?) +#", (folder / "README.md").read_text(encoding="utf-8"), re.MULTILINE)
    assert lines[-2:] == ["train --recipe recipe.yaml", "eval --recipe recipe.yaml"]
    with contextlib.chdir(folder):
        for line in lines:
            app(args=line.split(), prog_name="gdro", standalone_mode=False)
    assert len(list((folder / "gdro-out" / "runs").glob(f"{folder.name}-*/results.json"))) == 1


def test_training_on_the_example_prompts(tmp_path: Path) -> None:
    run(tmp_path / "job", model="tiny", reward="ocr")
    run_the_readme(tmp_path / "job")


@pytest.mark.parametrize(("data", "form"), [("scores", "scored groups"), ("pairs", "pairs"), ("demonstrations",) * 2])
def test_the_table_that_the_readme_shows_is_of_its_form(data: DataForm, form: str, tmp_path: Path) -> None:
    """Trainings on imported data are tested in ``importing``."""
    folder = tmp_path / "kites"
    run(folder, model="tiny", reward="ocr", data=data)
    (line,) = re.findall(r"^        (\{.*)", (folder / "README.md").read_text(encoding="utf-8"), re.MULTILINE)
    (folder / "data.jsonl").write_text(f"{line}\n", encoding="utf-8")
    save_images(folder, "a.png", "b.png")
    assert read_own_data(folder / "data.jsonl").form == form
