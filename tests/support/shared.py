"""What several test processes need is made once, in a folder that they share; a test that changes it fails."""

from __future__ import annotations

import os
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import pytest
from filelock import FileLock

Made = TypeVar("Made")
_used: dict[Path, dict[str, list[int]]] = {}
"""The shared folders of this process, and what they held when they were made."""


def shared(factory: pytest.TempPathFactory, name: str, make: Callable[[Path], Made]) -> Made:
    """What ``make`` returned in the first process that wanted ``name``; it gets the path of a folder to be made.

    Tests read the folder and copy it if they change anything.
    """
    base = factory.getbasetemp()
    folder = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "shared" / name
    note = folder.with_name(f"{name}.made")
    folder.parent.mkdir(exist_ok=True)
    with FileLock(f"{folder}.lock"):
        if not note.exists():
            shutil.rmtree(folder, ignore_errors=True)  # of an attempt that failed
            made = make(folder)
            note.write_bytes(pickle.dumps((made, _files(folder))))
    made, _used[folder] = pickle.loads(note.read_bytes())
    return made


def changes() -> list[str]:
    """The files of this process's shared folders that are new, gone or written again since this was last called."""
    changed: list[str] = []
    for folder, before in _used.items():
        now = _used[folder] = _files(folder)
        changed += [
            str(folder / name) for name in sorted(before.keys() | now.keys()) if before.get(name) != now.get(name)
        ]
    return changed


def _files(folder: Path) -> dict[str, list[int]]:
    """Size and time of each file."""
    stats = {path.relative_to(folder).as_posix(): path.stat() for path in folder.rglob("*") if path.is_file()}
    return {name: [stat.st_size, stat.st_mtime_ns] for name, stat in stats.items()}
