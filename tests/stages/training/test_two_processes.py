"""Two processes through accelerate make the samples, scores, steps and results of one, which can also resume them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import psutil  # comes with accelerate
import pytest
import torch
import yaml
from PIL import Image
from safetensors.torch import load_file

from gdro_cli.config.recipe import Recipe
from gdro_cli.data.store import GroupStore
from gdro_cli.runtime.progress import Reporter
from gdro_cli.runtime.run import RunFolder
from gdro_cli.stages.evaluation import evaluate
from gdro_cli.stages.setup.session import Session
from gdro_cli.stages.training import train

pytestmark = pytest.mark.slow

Finished = tuple[Path, train.TrainResult, evaluate.EvalResult]
PATIENCE = 240
"""Seconds that a test waits; starting processes takes most of them on a busy machine."""


@contextmanager
def launched(stage: str, recipe: Recipe, workspace: Path) -> Iterator[subprocess.Popen[str]]:
    """A stage in two processes of one thread each; at the end those that still run are killed."""
    workspace.mkdir(parents=True, exist_ok=True)
    path = workspace.with_suffix(".yaml")
    path.write_text(yaml.safe_dump(recipe.resolved()))
    command = [sys.executable, "-m", "gdro_cli", stage, "--recipe", str(path), "--out", str(workspace)]
    process = subprocess.Popen(
        [*command, "--num-processes", "2"],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    try:
        yield process
    finally:
        kill(process)
        process.communicate()


def kill(process: subprocess.Popen[str]) -> None:
    """Kill a launcher and all processes that it has started."""
    if process.poll() is not None:
        return
    family = [*psutil.Process(process.pid).children(recursive=True), psutil.Process(process.pid)]
    for member in family:
        member.kill()
    process.wait()
    psutil.wait_procs(family, timeout=PATIENCE)


def carried_out(stage: str, recipe: Recipe, workspace: Path) -> str:
    """The output of a stage in two processes."""
    with launched(stage, recipe, workspace) as process:
        output, _ = process.communicate(timeout=PATIENCE)
        assert process.returncode == 0, output
    return output


def same_stores(stores: Path, expected: Path, *, exact: bool) -> None:
    """The same groups and scores, bit by bit, or up to the rounding of batches of another size."""
    for path in stores.iterdir():
        one, other = GroupStore.open(path), GroupStore.open(expected / path.name)
        assert one.missing_shards() == [] and len(one.shards) == len(other.shards)
        for number in range(len(one.shards)):
            same_shard(one, other, number, **({"rtol": 0.0, "atol": 0.0} if exact else {"rtol": 1e-4, "atol": 1e-4}))
        tables = [sorted(store.path.glob("scores/*/*.jsonl")) for store in (one, other)]
        assert [file.name for file in tables[0]] == [file.name for file in tables[1]] and tables[0]
        scores = [[file.read_bytes() for file in table if file.name != "times.jsonl"] for table in tables]
        assert scores[0] == scores[1] or not exact


def same_shard(one: GroupStore, other: GroupStore, number: int, **tolerance: float) -> None:
    for group, expected in zip(one.read_shard(number), other.read_shard(number), strict=True):
        assert (group.prompt, group.origins) == (expected.prompt, expected.origins)
        torch.testing.assert_close(group.latents, expected.latents, **tolerance)
    for image, drawn in zip(one.images(number), other.images(number), strict=True):
        pixels, others = (np.asarray(Image.open(side.path)).astype(int) for side in (image, drawn))
        assert np.abs(pixels - others).max() <= (1 if tolerance["atol"] else 0)


def same_training(run: Path, expected: Path) -> None:
    """The same rows, gradients and adapters, step by step."""
    rows, others = (RunFolder(folder).metrics() for folder in (run, expected))
    assert [(row["kind"], row["step"]) for row in rows] == [(row["kind"], row["step"]) for row in others]
    for row, other in zip(rows, others, strict=True):
        names = ("loss", "grad_norm", "top1_error_gap", "s_rank_1") if row["kind"] == "train" else ("reward", "u")
        for name in names:
            assert row[name] == pytest.approx(other[name], rel=1e-3, abs=1e-5), (name, row["step"])
    # After one step AdamW's first moment is a tenth of the gradient, parameter by parameter.
    assert distance(run, expected, "step-000001", "optimizer") < 1e-4
    assert distance(run, expected, "step-000004", "ema") < 1e-2


def distance(run: Path, other: Path, step: str, name: str) -> float:
    """Norm of the difference of two runs' tensors, as a share of the second's norm."""
    one, two = (load_file(folder / "checkpoints" / step / f"{name}.safetensors") for folder in (run, other))
    assert one.keys() == two.keys()
    wanted = [key for key in one if "exp_avg" in key or name != "optimizer"]
    flat = [torch.cat([tensors[key].flatten() for key in wanted]) for tensors in (one, two)]
    return float((flat[0] - flat[1]).norm() / flat[1].norm())


def test_a_job_killed_in_two_processes_continues_in_one(
    finished: Finished, make_recipe: Callable[..., Recipe], tmp_path: Path, quiet: Reporter
) -> None:
    """Samples and scores of two processes have the bits of one, and the training ends like that of one."""
    workspace, trained, _ = finished
    name = trained.run.path.name
    with launched("train", make_recipe(), tmp_path / "out") as process:
        deadline = time.monotonic() + PATIENCE
        while not (tmp_path / "out" / "runs" / name / "checkpoints" / "step-000001").is_dir():
            assert process.poll() is None and time.monotonic() < deadline, process.communicate()
            time.sleep(0.01)
        kill(process)
    same_stores(tmp_path / "out" / "stores", workspace / "stores", exact=True)
    again = train.run(Session(make_recipe(), tmp_path / "out", quiet))
    assert again.run.path.name == name and 1 <= again.resumed_from < 4
    same_training(again.run.path, trained.run.path)


def test_a_sharded_base_trains_and_is_evaluated_like_a_whole_one(
    finished: Finished, make_recipe: Callable[..., Recipe], tmp_path: Path
) -> None:
    workspace, trained, _ = finished
    recipe = make_recipe(model={"sharding": "fsdp"})
    output = carried_out("train", recipe, tmp_path / "out")
    assert "process 1 of 2" not in output.split("scoring")[0]  # they share every image, so one bar is for all
    run = tmp_path / "out" / "runs" / trained.run.path.name
    same_training(run, trained.run.path)
    carried_out("eval", recipe, tmp_path / "out")
    same_stores(tmp_path / "out" / "stores", workspace / "stores", exact=False)
    held, other = (json.loads((folder / "results.json").read_text()) for folder in (run, trained.run.path))
    assert held["protocol"] == other["protocol"] and held["measures"].keys() == other["measures"].keys()
    for measure in held["measures"]:
        for who in ("base", "trained"):
            mean, expected = (results["measures"][measure][who]["mean"] for results in (held, other))
            assert mean == pytest.approx(expected, rel=0.01, abs=0.01), (measure, who)
