"""Killed or interrupted at several moments, the job goes on and ends with the same bits as an undisturbed one."""

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
from gdro_cli.runtime.progress import Reporter
from gdro_cli.stages.setup.session import Session
from gdro_cli.stages.training import train
from tests.support.jobs import finish, start, stop, wait_for, write_recipe

MOMENTS = [
    ("stores/*/shards/00000/manifest.json", signal.SIGINT),
    ("stores/*/shards/00002/manifest.json", signal.SIGKILL),
    ("stores/*/scores/*/00000.json", signal.SIGTERM),
    ("stores/*/scores/*/00001.json", signal.SIGKILL),
    ("runs/*/checkpoints/step-000004", signal.SIGINT),
    ("runs/*/checkpoints/step-000012", signal.SIGKILL),
]


@pytest.mark.timeout(900)
def test_kills_and_interrupts_change_nothing(tmp_path: Path) -> None:
    path, workspace = tmp_path / "small.yaml", tmp_path / "disturbed"
    write_recipe(
        path,
        prompts={"train": {"builtin": "ocr-train", "count": 8}},
        sample={"steps": 8, "images_per_prompt": 8},
        train={"steps": 24, "checkpoint_every": 4, "eval_every": 0, "keep_checkpoints": 9},
    )
    kept: dict[Path, bytes] = {}
    for pattern, number in MOMENTS:
        process = start(["train"], recipe=path, workspace=workspace)
        wait_for(process, workspace, pattern)
        if number == signal.SIGKILL:
            process.kill()
            process.communicate()
        else:
            said = stop(process, number)
            assert "press Ctrl-C again" in said
        finished = {p.parent: p.read_bytes() for p in workspace.glob("stores/*/shards/*/manifest.json")}
        assert kept.items() <= finished.items()  # no finished shard was lost or made again
        kept = finished
    code, output, errors = finish(start(["train"], recipe=path, workspace=workspace))
    assert code == 0, errors
    assert "continued from step" in output

    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # bits depend on the number of threads
    try:
        undisturbed = train.run(
            Session(load_recipe(str(path)), tmp_path / "undisturbed", Reporter(quiet=True))
        ).run.path
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


def ranks(launcher: subprocess.Popen[str]) -> dict[str, psutil.Process]:
    """The processes that a launcher has started, by their RANK."""
    found = {}
    for child in psutil.Process(launcher.pid).children():
        with suppress(psutil.Error):  # it is gone already
            found[child.environ().get("RANK", "")] = child
    return {rank: child for rank, child in found.items() if rank}


@pytest.mark.parametrize(
    ("number", "code", "words"),
    [
        (signal.SIGKILL, 3, "by signal 9 (SIGKILL), mostly because memory ran out: lower sample.batch_size"),
        (signal.SIGSEGV, 3, "by signal 11 (SIGSEGV), a crash inside a library or a driver"),
    ],
)
def test_a_process_of_several_that_is_killed_is_told(number: int, code: int, words: str, tmp_path: Path) -> None:
    path, workspace = write_recipe(tmp_path / "small.yaml", train={"steps": 2000}), tmp_path / "out"
    launcher = start(["train", "--num-processes", "2"], recipe=path, workspace=workspace)
    wait_for(launcher, workspace, "runs/*/checkpoints/step-000002")
    ranks(launcher)["1"].send_signal(number)
    found, _, errors = finish(launcher)
    assert found == code, errors
    assert f"Error: process 1 of the job was killed {words}" in errors
    assert "run the same command again to continue" in errors and "Traceback" not in errors, errors


def test_a_launcher_that_is_asked_to_stop_says_how_to_go_on(tmp_path: Path) -> None:
    """Both while its processes begin and while they work."""
    path, workspace = write_recipe(tmp_path / "small.yaml", train={"steps": 2000}), tmp_path / "out"
    for pattern in ("", "runs/*/checkpoints/step-000002"):
        launcher = start(["train", "--num-processes", "2"], recipe=path, workspace=workspace)
        if pattern:
            wait_for(launcher, workspace, pattern)
        else:
            while len(ranks(launcher)) < 2:
                assert launcher.poll() is None, launcher.communicate()
        said = stop(launcher, signal.SIGTERM)
        assert "All processes have been stopped by SIGTERM: run the same command again to continue" in said
    assert not list(workspace.glob("**/lock"))
