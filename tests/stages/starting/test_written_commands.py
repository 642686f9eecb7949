"""The commands in the README.md that ``gdro init`` writes run as they are, in their order."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from gdro_cli.stages.starting.init import DataForm, run
from tests.support.own_data import save_images

pytestmark = pytest.mark.slow

#: In place of the values of the recipe, so that a run takes seconds. Its keys and prompts stay as they are.
FEW = {"steps: 300": 2, "steps: 30": 2, "images_per_prompt: 16": 6, "eval_every: 100": 0, "eval_every: 10": 0}


def run_the_readme(folder: Path, *, evaluate: bool) -> None:
    recipe = folder / "recipe.yaml"
    text = re.sub(r"(eval: .*count:) \d+", r"\1 2", recipe.read_text(encoding="utf-8"))
    for line, value in FEW.items():
        text = text.replace(f"  {line} #", f"  {line.partition(':')[0]}: {value} #")
    recipe.write_text(text, encoding="utf-8")
    lines = re.findall(r"^    gdro (.*?) +#", (folder / "README.md").read_text(encoding="utf-8"), re.MULTILINE)
    assert lines[-2:] == ["train --recipe recipe.yaml", "eval --recipe recipe.yaml"]
    for line in lines if evaluate else lines[:-1]:
        done = subprocess.run(
            [sys.executable, "-m", "gdro_cli", *line.split()],
            cwd=folder,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stderr
    result = "results.json" if evaluate else "pytorch_lora_weights.safetensors"
    assert len(list((folder / "gdro-out" / "runs").glob(f"{folder.name}-*/{result}"))) == 1


def test_training_on_the_example_prompts(tmp_path: Path) -> None:
    run(tmp_path / "job", model="tiny", reward="ocr")
    run_the_readme(tmp_path / "job", evaluate=True)


@pytest.mark.parametrize("data", ["scores", "demonstrations"])  # half a minute each; pairs differ in a key
def test_training_on_a_table_in_the_form_that_the_readme_shows(data: DataForm, tmp_path: Path) -> None:
    folder = tmp_path / "kites"
    run(folder, model="tiny", reward="ocr", data=data)
    (line,) = re.findall(r"^        (\{.*)", (folder / "README.md").read_text(encoding="utf-8"), re.MULTILINE)
    assert "prompt" in json.loads(line)
    (folder / "data.jsonl").write_text(f"{line}\n", encoding="utf-8")
    save_images(folder, "a.png", "b.png")
    run_the_readme(folder, evaluate=False)
