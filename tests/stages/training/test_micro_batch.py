"""``train.micro_batch: auto`` where memory runs out: the run is that of the smaller micro-batch, bit for bit."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from rich.console import Console

from gdro_cli.config.recipe import Recipe
from gdro_cli.runtime.progress import Reporter
from gdro_cli.runtime.run import RunFolder
from gdro_cli.stages.evaluation import evaluate
from gdro_cli.stages.setup.session import Session
from gdro_cli.stages.training import train
from gdro_cli.stages.training.batch_sizes import micro_batches
from tests.support.rows import timeless
from tests.support.short_memory import plant

pytestmark = pytest.mark.slow

Finished = tuple[Path, train.TrainResult, evaluate.EvalResult]
MakeRecipe = Callable[..., Recipe]
PATIENCE = 240
"""Seconds that a test waits for its processes."""


def bits(run: Path) -> dict[str, bytes]:
    """Adapter, average and optimizer after every step."""
    return {str(path.relative_to(run)): path.read_bytes() for path in sorted(run.glob("checkpoints/*/*.safetensors"))}


def without_times(run: Path) -> list[dict[str, Any]]:
    rows = [row.to_json() for row in RunFolder(run).metrics()]
    return [{k: v for k, v in timeless(row).items() if k != "micro_batch"} for row in rows]


def sizes(run: Path) -> list[Any]:
    return [row.get("micro_batch") for row in RunFolder(run).metrics() if row["kind"] == "train"]


@pytest.fixture
def trained(finished: Finished, tmp_path: Path) -> Callable[..., tuple[Path, str]]:
    """Trains a recipe in a folder of its own that has the shared store; returns the run and what was said."""

    def run(recipe: Recipe, name: str) -> tuple[Path, str]:
        shutil.copytree(finished[0] / "stores", tmp_path / name / "stores", dirs_exist_ok=True)
        console = Console(record=True, width=200, file=open(os.devnull, "w"))  # noqa: SIM115
        return train.run(Session(recipe, tmp_path / name, Reporter(console))).run.path, console.export_text()

    return run


@pytest.mark.parametrize(("room", "left"), [({3: 99}, 3), ({3: 1, 1: 99}, 1)])
def test_a_run_that_ran_out_of_memory_is_the_run_of_the_smaller_value(
    room: dict[int, int],
    left: int,
    trained: Callable[..., tuple[Path, str]],
    make_recipe: MakeRecipe,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Six images fail at once; in the second case also three, after others of the step have gone backward."""
    fixed, _ = trained(make_recipe(train={"micro_batch": left, "eval_every": 0}), "fixed")
    assert sizes(fixed) == [None] * 4
    passes = plant(monkeypatch, lambda images: room.get(images, 0))
    halved, said = trained(make_recipe(train={"micro_batch": "auto", "eval_every": 0}), "auto")
    assert halved.name == fixed.name  # a key of speed
    assert bits(halved) == bits(fixed) and len(bits(fixed)) >= 4
    assert without_times(halved) == without_times(fixed)
    assert sizes(halved) == [left] * 4
    assert passes[3] == (8 if left == 3 else 1)
    assert said.count("not enough memory") == len(room)


def test_online_methods_try_again(make_online: MakeRecipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    changes = {"eval_every": 0, "steps": 2}
    fixed = train.run(Session(make_online(train={"micro_batch": 1, **changes}), tmp_path / "fixed")).run.path
    plant(monkeypatch, lambda images: 99 if images == 1 else 2)
    halved = train.run(Session(make_online(train={"micro_batch": "auto", **changes}), tmp_path / "auto")).run.path
    assert sizes(halved) == [1, 1]
    assert bits(halved) == bits(fixed) and bits(fixed)


@pytest.mark.parametrize(("micro_batch", "room"), [("auto", {}), ("auto", {6: 3, 3: 99}), (6, {3: 99})])
def test_what_cannot_be_halved_stays_an_error(
    micro_batch: Any,
    room: dict[int, int],
    trained: Callable[..., tuple[Path, str]],
    make_recipe: MakeRecipe,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """One image that does not fit; a step after the first three; a number that the recipe gives."""
    plant(monkeypatch, lambda images: room.get(images, 0))
    with pytest.raises(torch.OutOfMemoryError, match="planted"):
        trained(make_recipe(train={"micro_batch": micro_batch, "eval_every": 0}), "error")


def test_processes_halve_together(finished: Finished, make_recipe: MakeRecipe, tmp_path: Path) -> None:
    """Memory runs out in one of two processes only, whose share of a step is one group."""
    runs = []
    for micro_batch, limit in ((1, 9), ("auto", 1)):
        out = tmp_path / str(micro_batch)
        shutil.copytree(finished[0] / "stores", out / "stores")
        recipe = tmp_path / f"{micro_batch}.yaml"
        changes = {"micro_batch": micro_batch, "eval_every": 0, "steps": 2}
        recipe.write_text(yaml.safe_dump(make_recipe(train=changes).resolved()))
        assert in_two_processes("tests.support.short_memory", recipe, out, limit).count("not enough") == (limit == 1)
        runs += out.glob("runs/*")
    assert sizes(runs[1]) == [1, 1]
    assert bits(runs[1]) == bits(runs[0]) and bits(runs[0])


def in_two_processes(module: str, *arguments: object) -> str:
    """A module in two processes that gloo connects; returns what they printed."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    together = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    together |= {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
    processes = [
        subprocess.Popen(
            [sys.executable, "-m", module, *map(str, arguments)],
            env={**os.environ, **together, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(2)
    ]
    try:
        outputs = [process.communicate(timeout=PATIENCE)[0] for process in processes]
        assert [process.returncode for process in processes] == [0, 0], outputs
    finally:
        for process in processes:
            process.kill()
    return "".join(outputs)


def test_micro_batches_that_differ(make_recipe: MakeRecipe, make_online: MakeRecipe) -> None:
    """Groups of 3, two in a step: in one pass whole groups."""
    assert micro_batches(make_recipe(), 1) == [1, 2, 3, 6]
    assert micro_batches(make_recipe(train={"group_gradient": "one_pass"}), 1) == [3, 6]
    assert micro_batches(make_recipe(train={"group_gradient": "two_pass"}), 2) == [1, 2, 3]
    assert micro_batches(make_online(), 2) == [1, 2]  # a round of 6 images in two updates
