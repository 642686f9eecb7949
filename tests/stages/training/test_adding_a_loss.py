"""The loss of docs/adding-a-loss.md: two files of the package, changed as the page says; nothing else knows of it."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

import gdro_cli

pytestmark = pytest.mark.slow

PACKAGE = Path(gdro_cli.__file__).parent
PAGE = PACKAGE.parent / "docs" / "adding-a-loss.md"


def block(begins: str) -> str:
    """The indented block of the page that begins so."""
    (found,) = re.findall(
        rf"^    {re.escape(begins)}.*(?:\n    .*|\n(?=\n    ))*", PAGE.read_text(encoding="utf-8"), re.M
    )
    return textwrap.dedent(found) + "\n\n\n"


def put(text: str, before: str, new: str) -> str:
    assert text.count(before) == 1
    return text.replace(before, new + before)


@pytest.fixture
def package(tmp_path: Path) -> Path:
    """A folder with the package, in which two files are changed and all others are links."""
    losses, methods = ("core/losses.py", "config/methods.py")
    for path in PACKAGE.rglob("*"):
        name = path.relative_to(PACKAGE).as_posix()
        if path.is_file() and "__pycache__" not in name and name not in (losses, methods):
            link = tmp_path / "gdro_cli" / name
            link.parent.mkdir(parents=True, exist_ok=True)
            link.symlink_to(path)
    text = (PACKAGE / losses).read_text()
    text = put(text, "GroupLoss = Callable", block("def hinge_loss"))
    (tmp_path / "gdro_cli" / losses).write_text(put(text, '"dpo": dpo_loss', block('"hinge": hinge_loss,')))
    text = (PACKAGE / methods).read_text()
    text = put(text, "class OnlineMethod", block("class HingeMethod"))
    (tmp_path / "gdro_cli" / methods).write_text(put(text, "    | FlowGrpoMethod", "    | HingeMethod\n"))
    return tmp_path


def gdro(package: Path, *arguments: str) -> str:
    command = [sys.executable, "-m", "gdro_cli", *arguments]
    environment = os.environ | {"PYTHONPATH": str(package)}
    done = subprocess.run(command, cwd=package, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_loss_of_the_page_trains(package: Path) -> None:
    settings = ("method.name=hinge", "method.margin=0.5", "method.k=2", "method.noise_bank=null")
    job = ["--recipe", "smoke", "--out", "out", *(word for each in settings for word in ("--set", each))]
    assert "Difference of the implicit rewards" in gdro(package, "recipes", "fields", "method.margin")
    gdro(package, "train", *job)
    (metrics,) = (package / "out").glob("runs/*/metrics.jsonl")
    rows = [json.loads(line) for line in metrics.read_text().splitlines()]
    losses = [row["loss_method"] for row in rows if row["kind"] == "train"]
    assert losses[0] == pytest.approx(0.5)  # the adapter has not learnt, so each pair adds the margin
    assert len(losses) > 1 and losses[-1] != losses[0]
    (card,) = (package / "out").glob("runs/*/README.md")
    assert "a hinge loss on pairs" in card.read_text()
