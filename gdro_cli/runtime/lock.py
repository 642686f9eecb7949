"""One writer per folder: the kernel holds a lock file for a process and releases it when the process dies."""

from __future__ import annotations

import os
import re
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

from gdro_cli.errors import StoreError
from gdro_cli.files import storage_errors, write_bytes

_NOTE = re.compile(r"process (?P<process>[1-9]\d*) on (?P<host>.+)")


@contextmanager
def folder_lock(path: Path) -> Iterator[None]:
    """Lock the folder that contains the lock file ``path``; ``<path>.owner`` names this process meanwhile.

    The empty lock file stays when the lock is released.

    Raises:
        StoreError: another process has the lock (the message names it), or the folder cannot be written to.
    """
    lock, owner = FileLock(path), _owner(path)
    with storage_errors(path.parent):
        try:
            lock.acquire(blocking=False)
        except Timeout as error:
            holder = owner.read_text(encoding="utf-8") if owner.is_file() else "another process"
            raise StoreError(f"{path.parent} is in use by {holder}: wait until it ends, or stop it") from error
    try:
        write_bytes(owner, f"process {os.getpid()} on {socket.gethostname()}".encode())
        yield
    finally:
        owner.unlink(missing_ok=True)
        lock.release()


def is_held(path: Path) -> bool:
    """Whether a process holds the lock file ``path``, by the note that names it. A process on another host counts.

    The lock itself stays untouched: whoever tries it could refuse the process that wants it in that moment.
    """
    try:
        note = _NOTE.fullmatch(_owner(path).read_text(encoding="utf-8"))
        if note is not None and note["host"] == socket.gethostname():
            os.kill(int(note["process"]), 0)  # no signal, only the question whether it is there
    except PermissionError:
        return True
    except (OSError, ValueError, OverflowError):
        return False
    return note is not None


def _owner(path: Path) -> Path:
    return path.with_name(f"{path.name}.owner")
