"""Killed or interrupted at several moments, the job goes on and ends with the same bits as an undisturbed one."""

from __future__ import annotations

import signal
from pathlib import Path

import pytest
import torch
from jobs import finish, start, stop, wait_for, write_recipe
from safetensors.torch import load_file

from gdro_cli.config.recipe import load_recipe
from gdro_cli.runtime.progress import Reporter
from gdro_cli.stages import train

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
        undisturbed = train.run(load_recipe(str(path)), tmp_path / "undisturbed", Reporter(quiet=True)).run.path
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
