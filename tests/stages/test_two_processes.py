"""Two processes through accelerate take the steps of one: groups are split, gradients summed."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from gdro_cli.config.recipe import Recipe
from gdro_cli.stages import evaluate, train

Finished = tuple[Path, train.TrainResult, evaluate.EvalResult]


def test_training_in_two_processes_equals_training_in_one(
    finished: Finished, make_recipe: Callable[..., Recipe], tmp_path: Path
) -> None:
    workspace, trained, _ = finished
    shutil.copytree(workspace / "stores", tmp_path / "out" / "stores")
    recipe = tmp_path / "small.yaml"
    recipe.write_text(yaml.safe_dump(make_recipe().resolved()))
    command = [sys.executable, "-m", "gdro_cli", "train", "--recipe", str(recipe), "--out", str(tmp_path / "out")]
    done = subprocess.run([*command, "--num-processes", "2"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    run = tmp_path / "out" / "runs" / trained.run.path.name
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    expected = trained.run.metrics()
    assert [(row["kind"], row["step"]) for row in rows] == [(row["kind"], row["step"]) for row in expected]
    for row, one in zip(rows, expected, strict=True):
        if row["kind"] == "train":
            for name in ("loss", "grad_norm", "top1_error_gap", "s_rank_1"):
                assert row[name] == pytest.approx(one[name], rel=1e-3, abs=1e-5)
