"""A stop ends a job also while workers start and while they hang."""

from __future__ import annotations

import os
import signal
import subprocess
import threading
import time
from pathlib import Path

import pytest
import torch
from PIL import Image

from gdro_cli.config.load import load_recipe
from gdro_cli.data.imagefolder import PromptImages, write_image_folder
from gdro_cli.data.scores import ScoreTable
from gdro_cli.data.store import Group
from gdro_cli.errors import Interrupted
from gdro_cli.rewards import pool as pool_module
from gdro_cli.rewards.pool import ScoringPool
from gdro_cli.runtime.interrupt import StopFlag
from gdro_cli.runtime.progress import Reporter
from gdro_cli.stages.evaluation import image_folder
from gdro_cli.stages.scoring.fill_table import score_missing
from gdro_cli.stages.setup.session import Session
from tests.support import small_store
from tests.support.breaking_rewards import HANGS, WidthReward
from tests.support.jobs import finish, start, wait_for, write_recipe

pytestmark = pytest.mark.slow

QUIET = Reporter(quiet=True)


@pytest.mark.timeout(600)
def test_starting_workers_leave_a_signal_to_their_parent(tmp_path: Path) -> None:
    """A terminal, a container or a batch system sends a signal to all processes of a job."""
    recipe, workspace = write_recipe(tmp_path / "small.yaml", reward={"workers": 2}), tmp_path / "out"
    process = start(["score"], recipe=recipe, workspace=workspace, own_group=True)
    wait_for(process, workspace, "stores/*/scores/*/lock.owner")
    time.sleep(0.5)  # while they import
    os.killpg(process.pid, signal.SIGTERM)
    code, _, errors = finish(process)
    assert code == 130, errors
    assert "Traceback" not in errors and "run the command again" in errors
    assert not list(workspace.rglob("lock.owner"))
    assert left_in_group(process.pid) == []


def left_in_group(number: int) -> list[str]:
    """The processes in the group, after some time for those that end once the others are gone."""
    deadline = time.monotonic() + 20
    while True:
        output = subprocess.run(["ps", "-eo", "pgid=,stat=,args="], capture_output=True, text=True, check=True).stdout
        rows = [line.split(maxsplit=2) for line in output.splitlines()]
        left = [row[2] for row in rows if int(row[0]) == number and not row[1].startswith("Z")]
        if not left or time.monotonic() > deadline:
            return left
        time.sleep(0.1)


def stop_when(path: Path) -> threading.Thread:
    """Send this process SIGTERM once ``path`` exists."""

    def wait() -> None:
        while not path.exists():
            time.sleep(0.02)
        os.kill(os.getpid(), signal.SIGTERM)

    thread = threading.Thread(target=wait, daemon=True)
    thread.start()
    return thread


def test_a_stop_ends_scoring_that_hangs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The finished shard is kept; a later call scores the one that hangs."""
    monkeypatch.setattr(pool_module, "STOP_GRACE", 0.1)
    store = small_store.open_store(tmp_path / "store")
    for number, width in enumerate((8, HANGS)):
        images = [Image.new("RGB", (width, 8))] * 2
        store.write_shard(
            number,
            [
                Group(prompt, torch.ones(2, 3), {}, images, [{"seed": 1}, {"seed": 2}])
                for prompt in store.shards[number]
            ],
        )
    table = ScoreTable.create_or_open(store, "width", provenance={"reward": "width"})
    waiting = stop_when(tmp_path / "hangs")
    session = Session(load_recipe("smoke"), tmp_path)
    with session, pytest.raises(Interrupted) as ended:
        score_missing(session, table, ScoringPool(WidthReward(tmp_path), workers=1))
    waiting.join()
    assert str(ended.value).startswith(f"stopped while scoring; finished shards are kept in {table.path}: run the")
    assert table.missing_shards() == [1]
    assert not (table.path / "lock.owner").exists()


def test_a_stop_ends_the_scoring_of_a_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pool_module, "STOP_GRACE", 0.0)
    recipe, folder = load_recipe(str(write_recipe(tmp_path / "small.yaml"))), tmp_path / "images"
    (tmp_path / "0000.png").write_bytes(b"")
    write_image_folder(folder, [PromptImages(small_store.PROMPTS.records[0], (tmp_path / "0000.png",))])
    with StopFlag(), pytest.raises(Interrupted, match="stopped while scoring; finished scores are kept in"):
        os.kill(os.getpid(), signal.SIGTERM)
        image_folder.run(Session(recipe, tmp_path / "out", QUIET), folder=folder)
    assert [path.name for path in tmp_path.glob("out/folders/*/*")] == ["lock"]
