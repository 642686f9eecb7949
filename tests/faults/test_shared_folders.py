"""Two jobs in one folder, full disks and read-only folders: one sentence, and nothing half written."""

from __future__ import annotations

import os
import signal
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from PIL import Image

from gdro_cli.data.imagefolder import refuse_used
from gdro_cli.data.store import Group
from gdro_cli.errors import Interrupted
from gdro_cli.files import write_bytes, write_json, write_tensors
from gdro_cli.runtime.checkpoint import latest_checkpoint, load_checkpoint, save_checkpoint
from gdro_cli.runtime.lock import folder_lock
from gdro_cli.runtime.metrics import TrainRow
from gdro_cli.runtime.run import RunFolder
from gdro_cli.stages.evaluation.image_folder import write_images
from tests.support import small_store
from tests.support.faulty import check, command, largest_file, outcome
from tests.support.jobs import finish, start, stop, wait_for, write_recipe

pytestmark = pytest.mark.slow

# -- two jobs ---------------------------------------------------------------------------------------------------------


@pytest.mark.timeout(900)
def test_a_second_job_is_refused_and_names_the_first(tmp_path: Path) -> None:
    """The first continues undisturbed, and a signal ends it cleanly."""
    prompts = {"train": {"builtin": "ocr-train", "count": 150}}
    recipe = write_recipe(tmp_path / "small.yaml", prompts=prompts, sample={"images_per_prompt": 64})
    workspace = tmp_path / "out"
    first = start(["sample"], recipe=recipe, workspace=workspace)
    wait_for(first, workspace, "stores/*/lock.owner")
    code, _, errors = finish(start(["sample"], recipe=recipe, workspace=workspace))
    assert code == 4, errors
    assert f"is in use by process {first.pid} on {os.uname().nodename}" in errors.strip().splitlines()[-1]
    assert "Traceback" not in errors
    assert first.poll() is None
    stop(first, signal.SIGTERM)
    assert not list(workspace.rglob("lock.owner"))


def test_a_run_is_locked_for_one_job(tmp_path: Path) -> None:
    run = RunFolder.create_or_open(tmp_path / "run", recipe={}, inputs={}, environment={})
    with run.lock():
        check(outcome(lambda: run.lock().__enter__()), 4, f"{run.path} is in use by process {os.getpid()} on")


def test_an_export_is_complete_or_absent(tmp_path: Path) -> None:
    """Also after a stop during the export."""
    store = small_store.open_store(small_store.make(tmp_path / "store"))
    tables = {"base": small_store.open_table(store)}
    calls: list[None] = []

    def stop_at_the_third() -> None:
        calls.append(None)
        if len(calls) == 3:
            raise Interrupted("stopped")

    with pytest.raises(Interrupted):
        write_images(tmp_path / "out", tables, check=stop_at_the_third)
    assert [path.name for path in tmp_path.iterdir()] == ["store"]
    write_images(tmp_path / "out", tables)
    assert len(list((tmp_path / "out" / "base").glob("*/samples/*.png"))) == 6
    check(outcome(lambda: write_images(tmp_path / "out", tables)), 2, "is not empty: name a new folder")


# -- full disks -------------------------------------------------------------------------------------------------------


@contextmanager
def mounted(folder: Path, options: str) -> Iterator[Path]:
    """A file system in memory; skips the test if this user may not mount one."""
    folder.mkdir()
    done = subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(folder)], capture_output=True)
    if done.returncode:
        pytest.skip(f"no file system can be mounted here: {done.stderr.decode().strip()}")
    try:
        yield folder
    finally:
        subprocess.run(["umount", str(folder)], check=True)


def tree(folder: Path) -> dict[str, bytes]:
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def large_group(index: int) -> Group:
    images = [Image.new("RGB", (8, 8))] * 2
    return Group(small_store.PROMPTS.records[index], torch.ones(2, 100_000), {}, images, [{"seed": 1}, {"seed": 2}])


def weights(size: int) -> dict[str, dict[str, torch.Tensor]]:
    return {"adapter": {"a": torch.ones(size)}}


def test_a_full_disk(tmp_path: Path) -> None:
    with mounted(tmp_path / "disk", "size=1m") as disk:
        store = small_store.open_store(disk / "store")
        run = RunFolder.create_or_open(disk / "run", recipe={}, inputs={}, environment={})
        save_checkpoint(run.path, 1, tensors=weights(10), state={}, keep=1)
        before = tree(disk)
        full = "the disk is full; free some space"
        check(outcome(lambda: store.write_shard(0, [large_group(0), large_group(1)])), 4, full)
        check(outcome(lambda: save_checkpoint(run.path, 2, tensors=weights(10**6), state={}, keep=1)), 4, full)
        check(outcome(lambda: write_bytes(disk / "x", bytes(2 * 10**6))), 4, full)
        check(outcome(lambda: write_tensors(disk / "x", {"a": torch.ones(10**6)})), 4, full)
        assert tree(disk) == before
        assert store.missing_shards() == [0, 1]
        newest = latest_checkpoint(run.path)
        assert newest is not None and load_checkpoint(newest).step == 1
        filler = disk / "filler"
        with pytest.raises(OSError, match="No space"):
            filler.write_bytes(bytes(2 * 10**6))
        check(outcome(lambda: [run.append_metrics(TrainRow(step=n)) for n in range(10_000)]), 4, full)
        check(outcome(lambda: folder_lock(disk / "lock").__enter__()), 4, full)
        filler.unlink()
        again = RunFolder.create_or_open(disk / "run", recipe={}, inputs={}, environment={})
        steps = [row["step"] for row in again.metrics()]
        assert steps == list(range(len(steps)))
        save_checkpoint(run.path, 2, tensors=weights(10), state={}, keep=1)


def test_a_full_disk_through_the_command_line(tmp_path: Path) -> None:
    with mounted(tmp_path / "disk", "size=16k") as disk:
        recipe = write_recipe(tmp_path / "small.yaml")
        check(command("sample", "--recipe", str(recipe), "--out", str(disk / "out")), 4, "the disk is full")
        assert not list(disk.rglob("*.partial")) and not list(disk.rglob("lock.owner"))


def test_a_checkpoint_that_does_not_fit_leaves_the_older_one(tmp_path: Path) -> None:
    """The failure inside the tensor writer is one sentence."""
    save_checkpoint(tmp_path, 1, tensors=weights(10), state={}, keep=1)
    before = tree(tmp_path)
    with largest_file(2000):
        result = outcome(lambda: save_checkpoint(tmp_path, 2, tensors=weights(10_000), state={}, keep=1))
    check(result, 4, "cannot write")
    assert tree(tmp_path) == before and [p.name for p in (tmp_path / "checkpoints").iterdir()] == ["step-000001"]


# -- read-only folders -----------------------------------------------------------------------------------------------


def test_a_read_only_disk(tmp_path: Path) -> None:
    with mounted(tmp_path / "disk", "size=1m") as disk:
        small_store.make(disk / "store")
        save_checkpoint(disk / "run", 1, tensors=weights(10), state={}, keep=1)
        RunFolder.create_or_open(disk / "run", recipe={}, inputs={}, environment={})
        before = tree(disk)
        subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)
        store = small_store.open_store(disk / "store")
        run = RunFolder(disk / "run")
        refused = "no permission to write there"
        check(outcome(lambda: refuse_used(disk / "deep" / "export")), 2, "no permission to write in")
        for attempt in (
            lambda: store.write_shard(0, [large_group(0), large_group(1)]),
            lambda: save_checkpoint(run.path, 2, tensors=weights(10), state={}, keep=1),
            lambda: run.append_metrics(TrainRow(step=1)),
            lambda: write_json(disk / "x.json", {}),
            lambda: folder_lock(disk / "lock").__enter__(),
        ):
            check(outcome(attempt), 4, refused)
        check(command("sample", "--recipe", "smoke", "--out", str(disk)), 2, "cannot be written")
        check(command("sample", "--recipe", "smoke", "--out", str(disk / "new")), 2, "cannot be made")
        assert tree(disk) == before
