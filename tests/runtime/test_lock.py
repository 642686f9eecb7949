"""One writer per folder, among processes that run, end and are killed."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from gdro_cli.errors import StoreError
from gdro_cli.runtime.lock import folder_lock, is_held

HOLD = """
import sys, time
from pathlib import Path
from gdro_cli.runtime.lock import folder_lock
with folder_lock(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(60)
"""


def take(path: Path) -> None:
    with folder_lock(path):
        pass


@pytest.mark.slow
def test_a_second_process_is_refused_until_the_first_is_killed(tmp_path: Path) -> None:
    lock = tmp_path / "lock"
    holder = subprocess.Popen([sys.executable, "-c", HOLD, str(lock)], stdout=subprocess.PIPE, text=True)
    try:
        assert holder.stdout is not None and holder.stdout.readline() == "held\n"
        with pytest.raises(
            StoreError, match=f"{tmp_path} is in use by process {holder.pid} on {os.uname().nodename}: "
        ):
            take(lock)
        assert is_held(lock)
    finally:
        holder.kill()
        holder.communicate()
    assert (tmp_path / "lock.owner").exists()  # a process that is killed removes nothing
    assert not is_held(lock)
    take(lock)
    assert not (tmp_path / "lock.owner").exists()


def test_the_lock_is_released_after_an_error_and_names_its_owner_until_then(tmp_path: Path) -> None:
    with pytest.raises(KeyError), folder_lock(tmp_path / "lock"):
        assert (tmp_path / "lock.owner").read_text() == f"process {os.getpid()} on {os.uname().nodename}"
        with pytest.raises(StoreError, match=f"in use by process {os.getpid()} on"):
            take(tmp_path / "lock")
        raise KeyError
    take(tmp_path / "lock")
    assert [path.name for path in tmp_path.iterdir()] == ["lock"]


def test_a_process_of_another_host_holds_a_lock_and_a_damaged_note_names_none(tmp_path: Path) -> None:
    assert not is_held(tmp_path / "lock")
    for note, held in (("process 999999999 on elsewhere", True), ("process x on y", False), ("\xff", False)):
        (tmp_path / "lock.owner").write_bytes(note.encode("latin-1"))
        assert is_held(tmp_path / "lock") is held


def test_no_link_is_followed(tmp_path: Path) -> None:
    """In a folder that another user has prepared."""
    victim = tmp_path / "victim"
    victim.write_text("precious")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "lock.owner").symlink_to(victim)
    take(tmp_path / "run" / "lock")
    (tmp_path / "run" / "lock").unlink()
    (tmp_path / "run" / "lock").symlink_to(victim)
    with pytest.raises(StoreError, match="it is a link that leads elsewhere; delete it"):
        take(tmp_path / "run" / "lock")
    assert victim.read_text() == "precious"
