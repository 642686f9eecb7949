"""One writer per folder: who may take a lock over, and who may not."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from gdro_cli.errors import StoreError
from gdro_cli.runtime.lock import Owner, clear_stale, folder_lock


def hold_in_another_process(path: Path) -> subprocess.Popen[str]:
    code = (
        "import sys, time; from pathlib import Path; from gdro_cli.runtime.lock import folder_lock\n"
        "with folder_lock(Path(sys.argv[1])):\n    print('held', flush=True); time.sleep(60)\n"
    )
    child = subprocess.Popen([sys.executable, "-c", code, str(path)], stdout=subprocess.PIPE, text=True)
    assert child.stdout is not None and child.stdout.readline() == "held\n"
    return child


def test_the_lock_clears_away_what_dead_processes_left_long_ago(tmp_path: Path) -> None:
    old, below = tmp_path / ".results.json.1234.partial", tmp_path / "validation" / ".step.png.12.partial"
    new, other = tmp_path / ".results.json.99.partial", tmp_path / "kept.partial"
    below.parent.mkdir()
    for path in (old, below, new, other):
        path.write_text("half")
    for path in (old, below, other):
        os.utime(path, (time.time() - 4000,) * 2)
    with folder_lock(tmp_path / "lock"):
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
    child = hold_in_another_process(tmp_path / "lock")
    try:
        with (
            pytest.raises(StoreError, match=f"in use by process {child.pid} on .* delete .*lock"),
            folder_lock(tmp_path / "lock"),
        ):
            pass
        child.send_signal(signal.SIGKILL)
        # Not yet collected by its parent: a zombie, which still answers to its number.
        os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)
        with folder_lock(tmp_path / "lock"):
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
    mine = Owner.of(os.getpid())
    assert mine.host == socket.gethostname()
    owner = {"host": mine.host, "pid": mine.pid, "began": mine.began, **change}
    (tmp_path / "lock").write_text(json.dumps(owner))
    if taken:
        with folder_lock(tmp_path / "lock"):
            pass
        assert not (tmp_path / "lock").exists()
    else:
        with pytest.raises(StoreError, match="is in use by process"), folder_lock(tmp_path / "lock"):
            pass
        assert json.loads((tmp_path / "lock").read_text()) == owner


def test_empty_lock_is_taken_over_when_it_is_old(tmp_path: Path) -> None:
    (tmp_path / "lock").touch()
    with pytest.raises(StoreError, match="in use by another process"), folder_lock(tmp_path / "lock"):
        pass
    os.utime(tmp_path / "lock", (0, 0))
    with folder_lock(tmp_path / "lock"):
        pass


def test_lock_is_released_after_an_error(tmp_path: Path) -> None:
    with pytest.raises(KeyError), folder_lock(tmp_path / "lock"):
        raise KeyError
    with folder_lock(tmp_path / "lock"):
        pass


@contextmanager
def held_elsewhere(path: Path) -> Iterator[dict[str, Any]]:
    """The lock is held by another process, which is killed at the end; gives what the file says."""
    child = hold_in_another_process(path)
    try:
        yield json.loads(path.read_text())
    finally:
        child.kill()
        child.communicate()


def take(path: Path) -> None:
    with folder_lock(path):
        pass


def test_a_lock_says_where_its_owner_runs(tmp_path: Path) -> None:
    with held_elsewhere(tmp_path / "lock") as owner:
        assert {"host", "pid", "began", "machine", "boot", "numbers", "disk"} == set(owner)
        assert owner["disk"] == tmp_path.stat().st_dev
        assert owner["boot"] == Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        assert owner["numbers"] == os.readlink("/proc/self/ns/pid")


def test_the_lock_of_a_process_that_counts_otherwise_is_respected(tmp_path: Path) -> None:
    """As seen from another container of the machine: the owner's number is nobody's here."""
    lock = tmp_path / "lock"
    with held_elsewhere(lock) as owner:
        lock.write_text(json.dumps({**owner, "pid": 2**22 + 1, "numbers": "pid:[1]"}))
        with pytest.raises(StoreError, match=f"in use by process {2**22 + 1} on"):
            take(lock)
        assert lock.exists()
    take(lock)  # the kernel holds the file no longer
    assert not lock.exists()


@pytest.mark.parametrize(
    ("change", "taken"),
    [
        ({"numbers": "pid:[1]"}, True),  # killed in another container: the kernel has let the file go
        ({"numbers": "pid:[1]", "disk": 0}, False),  # a disk whose files no kernel holds
        ({"numbers": "pid:[1]", "disk": 1}, False),  # held as a file of another mounted disk
        ({"boot": "an earlier one", "pid": 1}, True),  # the machine was started again
        ({"boot": "an earlier one", "machine": "another"}, False),  # another machine of that name
        ({"boot": "an earlier one", "machine": ""}, False),  # perhaps another machine of that name
        ({"host": "elsewhere"}, True),  # a container of this machine that has another name
        ({"host": "elsewhere", "boot": "an earlier one"}, False),
    ],
)
def test_a_dead_owner_is_known_by_more_than_its_number(tmp_path: Path, change: dict[str, Any], taken: bool) -> None:
    lock = tmp_path / "lock"
    mine = Owner.of(os.getpid())
    owner = {"host": mine.host, "pid": os.getppid(), "began": Owner.of(os.getppid()).began, "boot": mine.boot}
    owner |= {"machine": mine.machine, "numbers": mine.numbers, "disk": tmp_path.stat().st_dev, **change}
    lock.write_text(json.dumps(owner))
    if taken:
        take(lock)
    else:
        with pytest.raises(StoreError, match="is in use by process"):
            take(lock)
    assert lock.exists() == (not taken)


@pytest.mark.skipif(not Path("/etc/machine-id").is_file(), reason="the system does not name the machine")
def test_the_machine_has_a_name() -> None:
    assert Owner.of(os.getpid()).machine


@pytest.mark.parametrize("kind", ["link to nothing", "link to a file", "pipe"])
def test_what_is_no_file_is_refused_and_named(tmp_path: Path, kind: str) -> None:
    lock = tmp_path / "lock"
    if kind == "pipe":
        os.mkfifo(lock)
    else:
        lock.symlink_to(tmp_path / "there")
    if kind == "link to a file":
        (tmp_path / "there").touch()
        os.utime(tmp_path / "there", (0, 0))
    with pytest.raises(StoreError, match=f"{lock}.* delete it and run the command again"):
        take(lock)
    assert os.path.lexists(lock)


RACE = """
import os, sys, time
from pathlib import Path
from gdro_cli.errors import StoreError
from gdro_cli.runtime.lock import folder_lock
folder, number, rounds = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
taken = 0
for turn in range(rounds):
    begin = folder / f"{turn}"
    (folder / f"{turn}-{number}").touch()
    while not begin.exists():
        time.sleep(0.0005)
    try:
        with folder_lock(begin / "lock"):
            os.close(os.open(begin / "alone", os.O_CREAT | os.O_EXCL))
            time.sleep(0.002)
            os.unlink(begin / "alone")
            taken += 1
    except StoreError as error:
        assert "in use by" in str(error) or "several processes" in str(error), error
print(taken)
"""


def test_of_many_that_find_a_dead_owners_lock_one_at_a_time_works(tmp_path: Path) -> None:
    """Each turn is a folder with a dead owner's lock, which appears to all processes at once."""
    rounds, count = 40, 4
    command = [sys.executable, "-c", RACE, str(tmp_path)]
    racing = [
        subprocess.Popen([*command, str(number), str(rounds)], stdout=subprocess.PIPE, text=True)
        for number in range(count)
    ]
    mine = Owner.of(os.getpid())
    dead = json.dumps({"host": mine.host, "pid": 2**22 + 1, "began": "1"})
    for turn in range(rounds):
        while len(list(tmp_path.glob(f"{turn}-*"))) < count:
            assert all(each.poll() in (None, 0) for each in racing)
            time.sleep(0.001)
        prepared = tmp_path / f"prepared-{turn}"
        prepared.mkdir()
        (prepared / "lock").write_text(dead)
        prepared.rename(tmp_path / str(turn))
    told = [each.communicate()[0] for each in racing]
    assert [each.returncode for each in racing] == [0] * count
    assert sum(map(int, told)) >= rounds  # in each turn at least one
