"""The run folder: identity, metrics that survive a kill, and one writer at a time."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from gdro_cli.errors import StoreError
from gdro_cli.runtime.lock import Owner, clear_stale
from gdro_cli.runtime.run import RunFolder

RECIPE = {"name": "ocr", "train": {"lr": 3e-4, "steps": 10, "adam_betas": (0.9, 0.999)}}
INPUTS = {"store": "abc"}
ENVIRONMENT = {"python": "3.11"}


def open_run(path: Path, *, recipe: Any = None, inputs: Any = None, environment: Any = None) -> RunFolder:
    return RunFolder.create_or_open(
        path, recipe=recipe or RECIPE, inputs=inputs or INPUTS, environment=environment or ENVIRONMENT
    )


def test_run_is_made_once_and_opened_again(tmp_path: Path) -> None:
    run = open_run(tmp_path / "a" / "run")
    created = run.read_json("manifest.json")["created"]
    again = open_run(tmp_path / "a" / "run")
    assert again.read_json("manifest.json")["created"] == created
    assert again.recipe == {"name": "ocr", "train": {"lr": 3e-4, "steps": 10, "adam_betas": [0.9, 0.999]}}
    assert again.read_json("environment.json") == ENVIRONMENT
    assert sorted(p.name for p in run.path.iterdir()) == ["environment.json", "manifest.json", "recipe.json"]


def test_changed_recipe_or_inputs_are_refused_with_the_difference(tmp_path: Path) -> None:
    open_run(tmp_path)
    other = {**RECIPE, "train": {**RECIPE["train"], "lr": 1e-3}}  # type: ignore[dict-item]
    with pytest.raises(StoreError, match=r"recipe\.train\.lr: 0\.0003 -> 0\.001.*--out"):
        open_run(tmp_path, recipe=other)
    with pytest.raises(StoreError, match=r'inputs\.store: "abc" -> "xyz"'):
        open_run(tmp_path, inputs={"store": "xyz"})


def test_other_environments_are_kept_beside_the_first(tmp_path: Path) -> None:
    open_run(tmp_path)
    for python in ("3.12", "3.12", "3.11", "3.13"):
        run = open_run(tmp_path, environment={"python": python})
    assert run.read_json("environment-2.json") == {"python": "3.12"}
    assert run.read_json("environment-3.json") == {"python": "3.13"}
    assert len(list(tmp_path.glob("environment*.json"))) == 3


def test_half_made_run_is_made_again(tmp_path: Path) -> None:
    open_run(tmp_path)
    (tmp_path / "manifest.json").unlink()
    (tmp_path / "recipe.json").write_text("{")
    assert open_run(tmp_path).recipe["name"] == "ocr"


def test_damaged_and_unwritable_runs_say_so(tmp_path: Path) -> None:
    run = open_run(tmp_path / "run")
    (run.path / "recipe.json").write_text("{")
    with pytest.raises(StoreError, match=r"recipe\.json is damaged"):
        open_run(run.path)
    (run.path / "recipe.json").unlink()
    with pytest.raises(StoreError, match=r"recipe\.json is missing"):
        open_run(run.path)
    (tmp_path / "file").write_text("")
    with pytest.raises(StoreError, match="cannot write .*file/run"):
        open_run(tmp_path / "file" / "run")


def test_metrics_are_cut_at_a_step(tmp_path: Path) -> None:
    run = open_run(tmp_path)
    assert run.metrics() == []
    run.truncate_metrics(0)
    for step in range(1, 6):
        run.append_metrics({"kind": "train", "step": step, "loss": 0.1 * step})
    run.append_metrics({"kind": "other", "step": 3, "reward": 0.5})
    run.truncate_metrics(3)
    assert run.metrics() == [
        {"kind": "train", "step": 1, "loss": 0.1},
        {"kind": "train", "step": 2, "loss": 0.2},
        {"kind": "train", "step": 3, "loss": 0.1 * 3},
        {"kind": "other", "step": 3, "reward": 0.5},
    ]
    with pytest.raises(ValueError, match="integer 'step'"):
        run.append_metrics({"kind": "train", "loss": 1.0})
    with pytest.raises(ValueError, match="'kind'"):
        run.append_metrics({"step": 4, "loss": 1.0})


def test_torn_last_line_is_dropped_and_a_damaged_one_named(tmp_path: Path) -> None:
    run = open_run(tmp_path)
    run.append_metrics({"kind": "train", "step": 1})
    with run.metrics_path.open("a") as stream:
        stream.write('{"step": 2, "lo')
    assert run.metrics() == [{"kind": "train", "step": 1}]
    run = open_run(tmp_path)
    run.append_metrics({"kind": "train", "step": 2})
    assert [row["step"] for row in run.metrics()] == [1, 2]
    run.metrics_path.write_text('{"kind": "train", "step": 1}\n{"ste\n{"kind": "train", "step": 3}\n')
    with pytest.raises(StoreError, match=r"metrics\.jsonl line 2 is damaged"):
        run.metrics()


def hold_in_another_process(path: Path) -> subprocess.Popen[str]:
    code = (
        "import sys, time; from pathlib import Path; from gdro_cli.runtime.lock import folder_lock\n"
        "with folder_lock(Path(sys.argv[1])):\n    print('held', flush=True); time.sleep(60)\n"
    )
    child = subprocess.Popen([sys.executable, "-c", code, str(path)], stdout=subprocess.PIPE, text=True)
    assert child.stdout is not None and child.stdout.readline() == "held\n"
    return child


def test_the_lock_clears_away_what_dead_processes_left_long_ago(tmp_path: Path) -> None:
    run = open_run(tmp_path)
    old, below = tmp_path / ".results.json.1234.partial", tmp_path / "validation" / ".step.png.12.partial"
    new, other = tmp_path / ".results.json.99.partial", tmp_path / "kept.partial"
    below.parent.mkdir()
    for path in (old, below, new, other):
        path.write_text("half")
    for path in (old, below, other):
        os.utime(path, (time.time() - 4000,) * 2)
    with run.lock():
        assert not old.exists() and not below.exists()
        assert new.exists() and other.exists()  # being written, perhaps; and a file of someone's own


def test_only_a_dead_owners_lock_is_cleared_where_nothing_is_left_to_do(tmp_path: Path) -> None:
    lock = tmp_path / "lock"
    clear_stale(lock)  # none is there
    child = hold_in_another_process(lock)
    try:
        clear_stale(lock)
        assert lock.exists()
    finally:
        child.kill()
        child.wait()
    clear_stale(lock)
    assert not lock.exists()


def test_second_process_is_refused_and_a_killed_ones_lock_taken_over(tmp_path: Path) -> None:
    run = open_run(tmp_path)
    child = hold_in_another_process(tmp_path / "lock")
    try:
        with (
            pytest.raises(StoreError, match=f"in use by process {child.pid} on .* delete .*lock"),
            run.lock(),
        ):
            pass
        child.send_signal(signal.SIGKILL)
        # Not yet collected by its parent: a zombie, which still answers to its number.
        os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)
        with run.lock():
            assert json.loads((tmp_path / "lock").read_text())["pid"] == os.getpid()
    finally:
        child.kill()
        child.communicate()
    assert not (tmp_path / "lock").exists()
    assert not list(tmp_path.glob(".lock*"))


@pytest.mark.parametrize(
    ("change", "taken"),
    [
        ({"began": "1"}, True),  # the number runs again, as another process
        ({"host": "elsewhere"}, False),  # cannot be seen from here
        ({"pid": 2**22 + 1}, True),  # above the kernel's largest number
        ({}, False),
    ],
)
def test_whose_lock_is_taken_over(tmp_path: Path, change: dict[str, Any], taken: bool) -> None:
    run = open_run(tmp_path)
    mine = Owner.of(os.getpid())
    assert mine.host == socket.gethostname()
    owner = {"host": mine.host, "pid": mine.pid, "began": mine.began, **change}
    (tmp_path / "lock").write_text(json.dumps(owner))
    if taken:
        with run.lock():
            pass
        assert not (tmp_path / "lock").exists()
    else:
        with pytest.raises(StoreError, match="is in use by process"), run.lock():
            pass
        assert json.loads((tmp_path / "lock").read_text()) == owner


def test_empty_lock_is_taken_over_when_it_is_old(tmp_path: Path) -> None:
    run = open_run(tmp_path)
    (tmp_path / "lock").touch()
    with pytest.raises(StoreError, match="in use by another process"), run.lock():
        pass
    os.utime(tmp_path / "lock", (0, 0))
    with run.lock():
        pass


def test_lock_is_released_after_an_error(tmp_path: Path) -> None:
    run = open_run(tmp_path)
    with pytest.raises(KeyError), run.lock():
        raise KeyError
    with run.lock():
        pass
