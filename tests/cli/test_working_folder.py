"""Python files in the working folder are data: no process of any command imports them."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

pytestmark = pytest.mark.slow

TRAP = "import pathlib, os; pathlib.Path(os.environ['TRAP']).touch()\n"
"""A module that makes a file when it is imported."""
NAMES = ("yaml", "numpy", "torch", "typer", "pydantic", "selectors", "struct", "accelerate", "onnxruntime")


@pytest.fixture
def trap(tmp_path: Path) -> Path:
    """A working folder with modules that have the names of libraries."""
    folder = tmp_path / "work"
    folder.mkdir()
    for name in NAMES:
        (folder / f"{name}.py").write_text(TRAP)
    return folder


def run(command: list[str], trap: Path, *, code: int = 0) -> None:
    """Run a command in the working folder. It must end with ``code`` and import none of the modules there."""
    mark = trap.parent / "mark"
    environment = {**os.environ, "TRAP": str(mark)}
    environment.pop("PYTHONSAFEPATH", None)
    done = subprocess.run(command, cwd=trap, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == code, done.stderr
    assert not mark.exists()


@pytest.mark.parametrize("start", [[str(Path(sys.executable).with_name("gdro"))], [sys.executable, "-m", "gdro_cli"]])
def test_one_process_and_its_scoring_workers(start: list[str], trap: Path) -> None:
    sample = trap / "images" / "00000" / "samples" / "0000.png"
    sample.parent.mkdir(parents=True)
    Image.new("RGB", (64, 64)).save(sample)
    (sample.parents[1] / "metadata.jsonl").write_text('{"prompt": "a sign that says \\"HI\\""}\n')
    run([*start, "score", "--recipe", "smoke", "--set", "reward.workers=1", "--images", "images", "--out", "out"], trap)


def test_processes_of_one_job(trap: Path) -> None:
    """Both processes start and find nothing to evaluate."""
    gdro = str(Path(sys.executable).with_name("gdro"))
    run([gdro, "eval", "--recipe", "smoke", "--num-processes", "2", "--out", "out"], trap, code=3)
