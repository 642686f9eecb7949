"""A job that is killed or interrupted several times continues and ends with the bits of an undisturbed one."""

from __future__ import annotations

import signal
import subprocess
from contextlib import suppress
from pathlib import Path

import psutil  # comes with accelerate
import pytest
import torch
from safetensors.torch import load_file

from gdro_cli.config.load import load_recipe
from gdro_cli.stages.setup.session import Session
from gdro_cli.stages.training import train
from tests.support.jobs import finish, start, stop, wait_for, write_recipe

pytestmark = pytest.mark.slow

MOMENTS = [
    ("stores/*/shards/00001/manifest.json", signal.SIGKILL),
    ("stores/*/scores/*/00001.jsonl", signal.SIGTERM),
    ("runs/*/checkpoints/step-000004", signal.SIGKILL),
]


@pytest.mark.timeout(900)
def test_kills_and_interrupts_change_nothing(tmp_path: Path) -> None:
    path, workspace = tmp_path / "small.yaml", tmp_path / "disturbed"
    write_recipe(
        path,
        sample={"steps": 8, "images_per_prompt": 8},
        train={"steps": 12, "checkpoint_every": 4, "eval_every": 0, "keep_checkpoints": 9},
    )
    earlier: dict[Path, bytes] = {}
    for pattern, number in MOMENTS:
        process = start(["train"], recipe=path, workspace=workspace)
        wait_for(process, workspace, pattern)
        if number == signal.SIGKILL:
            process.kill()
            process.communicate()
        else:
            assert "press Ctrl-C again" in stop(process, number)
        finished = {p.parent: p.read_bytes() for p in workspace.glob("stores/*/shards/*/manifest.json")}
        assert earlier.items() <= finished.items()  # no finished shard was lost or made again
        earlier = finished
    code, output, errors = finish(start(["train"], recipe=path, workspace=workspace))
    assert code == 0, errors
    assert "continued from step" in output

    undisturbed = train.run(Session(load_recipe(str(path)), tmp_path / "undisturbed")).run.path
    (disturbed,) = (workspace / "runs").iterdir()
    assert disturbed.name == undisturbed.name
    for file in ("adapter", "ema", "optimizer"):
        one, other = (
            load_file(run / "checkpoints" / "step-000012" / f"{file}.safetensors") for run in (disturbed, undisturbed)
        )
        assert one.keys() == other.keys()
        assert all(torch.equal(one[name], other[name]) for name in one), file


def ranks(launcher: subprocess.Popen[str]) -> dict[str, psutil.Process]:
    """The processes that a launcher has started, by their RANK."""
    children = {}
    for child in psutil.Process(launcher.pid).children():
        with suppress(psutil.Error):  # it has already ended
            children[child.environ().get("RANK", "")] = child
    return {rank: child for rank, child in children.items() if rank}


def test_processes_of_one_job_end_together(tmp_path: Path) -> None:
    """First one is killed; then the job continues, and all are stopped through their launcher."""
    path, workspace = write_recipe(tmp_path / "small.yaml", train={"steps": 2000}), tmp_path / "out"
    launcher = start(["train", "--num-processes", "2"], recipe=path, workspace=workspace)
    wait_for(launcher, workspace, "runs/*/checkpoints/step-000002")
    ranks(launcher)["1"].kill()
    code, _, errors = finish(launcher)
    assert code == 3, errors
    assert "Error: process 1 of the job was killed by signal 9 (SIGKILL), mostly because memory ran out" in errors
    assert "run the same command again" in errors and "Traceback" not in errors, errors

    launcher = start(["train", "--num-processes", "2"], recipe=path, workspace=workspace)
    wait_for(launcher, workspace, "runs/*/lock.owner")
    errors = stop(launcher, signal.SIGTERM)
    assert "All processes were stopped by SIGTERM: run the same command again" in errors
    assert not list(workspace.rglob("lock.owner"))
