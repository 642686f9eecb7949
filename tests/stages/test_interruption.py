"""Killed or interrupted at several moments, the job goes on and ends with the same bits as an undisturbed one."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file

from gdro_cli.config.recipe import Recipe
from gdro_cli.runtime.progress import Reporter
from gdro_cli.stages import train

CHANGES = {
    "prompts": {"train": {"count": 8}},
    "sample": {"steps": 8, "images_per_prompt": 8, "prompts_per_shard": 1},
    "train": {"steps": 24, "checkpoint_every": 4, "eval_every": 0},
}
PATIENCE = 240  # seconds until a moment must have come; starting a process takes most of it on a busy machine


def start(recipe: Path, workspace: Path) -> subprocess.Popen[str]:
    """``gdro train`` as a user starts it."""
    command = [sys.executable, "-m", "gdro_cli", "train", "--recipe", str(recipe), "--out", str(workspace)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


def wait_for(process: subprocess.Popen[str], workspace: Path, pattern: str) -> None:
    """Return when a path of that pattern is there; the process must be running then."""
    deadline = time.monotonic() + PATIENCE
    while not list(workspace.glob(pattern)):
        if process.poll() is not None or time.monotonic() > deadline:
            process.kill()
            pytest.fail(f"{pattern} did not appear before the end: {process.communicate()}")
        time.sleep(0.01)


@pytest.mark.timeout(900)
def test_kills_and_interrupts_change_nothing(make_recipe: Callable[..., Recipe], tmp_path: Path) -> None:
    recipe = make_recipe(**CHANGES)
    path, workspace = tmp_path / "small.yaml", tmp_path / "disturbed"
    path.write_text(yaml.safe_dump(recipe.resolved()))

    moments = [
        ("stores/*/shards/00000/manifest.json", signal.SIGINT),
        ("stores/*/shards/00002/manifest.json", signal.SIGKILL),
        ("stores/*/scores/*/00000.json", signal.SIGINT),
        ("stores/*/scores/*/00001.json", signal.SIGKILL),
        ("runs/*/checkpoints/step-000004", signal.SIGINT),
        ("runs/*/checkpoints/step-000012", signal.SIGKILL),
    ]
    kept: dict[Path, bytes] = {}
    for pattern, number in moments:
        process = start(path, workspace)
        wait_for(process, workspace, pattern)
        process.send_signal(number)
        _, errors = process.communicate(timeout=PATIENCE)
        if number == signal.SIGINT:
            assert process.returncode == 130, errors
            assert "command again to go on" in errors
            assert "press Ctrl-C again" in errors
            assert "Traceback" not in errors
        finished = {p.parent: p.read_bytes() for p in workspace.glob("stores/*/shards/*/manifest.json")}
        assert kept.items() <= finished.items()  # no finished shard was lost or made again
        kept = finished
    process = start(path, workspace)
    output, errors = process.communicate(timeout=PATIENCE)
    assert process.returncode == 0, errors
    assert "continued from step" in output

    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # bits depend on the number of threads
    try:
        undisturbed = train.run(recipe, tmp_path / "undisturbed", Reporter(quiet=True)).run.path
    finally:
        torch.set_num_threads(threads)
    (disturbed,) = (workspace / "runs").iterdir()
    assert disturbed.name == undisturbed.name
    for file in ("adapter", "ema", "optimizer"):
        one, other = (
            load_file(run / "checkpoints" / "step-000024" / f"{file}.safetensors") for run in (disturbed, undisturbed)
        )
        assert one.keys() == other.keys()
        assert all(torch.equal(one[name], other[name]) for name in one), file
