"""One writer per folder: a lock file that names its owner."""

from __future__ import annotations

import json
import os
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path

from gdro_cli.errors import StoreError
from gdro_cli.files import cannot_write, parse_json, remove_forgotten

_TRIES = 5
"""Attempts when other processes take and leave the lock at the same moment."""
_LARGEST_PID = 2**31 - 1
_EMPTY_SECONDS = 5.0
"""A lock that stays empty for so long was left by a process killed between making and filling it."""


@dataclass(frozen=True, slots=True)
class Owner:
    """A process: where it runs, its number, and when it began (numbers are used again after a restart)."""

    host: str
    pid: int
    began: str

    @classmethod
    def of(cls, pid: int) -> Owner:
        """Describe a process of this machine."""
        return cls(host=socket.gethostname(), pid=pid, began=_status(pid)[1])

    @property
    def gone(self) -> bool:
        """True if the owner surely no longer runs: it was on this machine and its process is dead or another."""
        if self.host != socket.gethostname():
            return False
        try:
            os.kill(self.pid, 0)
        except ProcessLookupError:
            return True
        except PermissionError:
            pass
        state, began = _status(self.pid)
        return state == "Z" or bool(self.began and began and began != self.began)


@contextmanager
def folder_lock(path: Path) -> Iterator[None]:
    """Hold the lock file ``path``; a lock whose owner died on this machine is taken over.

    Temporary files that dead processes have left in the folder are removed.

    Raises:
        StoreError: another process holds it (the message names it and says how to break the lock), or the folder
            cannot be written to.
    """
    mine = json.dumps(asdict(Owner.of(os.getpid())))
    for _ in range(_TRIES):
        try:
            handle = os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o644)
        except FileExistsError:
            _remove_stale(path)
            continue
        except OSError as error:
            raise cannot_write(path.parent, error) from error
        with os.fdopen(handle, "w", encoding="utf-8") as stream:
            stream.write(mine)
        break
    else:
        raise StoreError(f"{path.parent} is being taken by several processes at once: try again")
    try:
        remove_forgotten(path.parent)
        yield
    finally:
        if _read(path) == mine:
            path.unlink(missing_ok=True)


def clear_stale(path: Path) -> None:
    """Remove the lock of a dead owner from a folder in which nothing is left to do; one that is only read keeps it."""
    with suppress(OSError, StoreError):
        _remove_stale(path)


def _remove_stale(path: Path) -> None:
    """Move a dead owner's lock out of the way; refuse if the owner may be alive."""
    seen = _read(path)
    if seen is None:
        return
    owner = _owner(seen)
    if not _left_behind(path, seen, owner):
        who = f"process {owner.pid} on {owner.host}" if owner else "another process"
        raise StoreError(f"{path.parent} is in use by {who}: wait for it, or if it is gone delete {path}")
    # Between reading and moving, someone else may have taken over: then a live lock was moved, and goes back.
    aside = path.with_name(f".{path.name}.{os.getpid()}.stale")
    try:
        os.rename(path, aside)
    except FileNotFoundError:
        return
    if _read(aside) != seen:
        os.rename(aside, path)
        return
    aside.unlink(missing_ok=True)


def _owner(seen: str) -> Owner | None:
    """Whom a lock names; None where it is not as this tool writes it."""
    try:
        owner = Owner(**parse_json(seen))
    except (ValueError, TypeError):
        return None
    texts = isinstance(owner.host, str) and isinstance(owner.began, str)
    return owner if texts and type(owner.pid) is int and 0 < owner.pid <= _LARGEST_PID else None


def _left_behind(path: Path, seen: str, owner: Owner | None) -> bool:
    if owner is not None:
        return owner.gone
    try:
        return not seen and time.time() - path.stat().st_mtime > _EMPTY_SECONDS
    except FileNotFoundError:
        return True


def _read(path: Path) -> str | None:
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except FileNotFoundError:
        return None
    except OSError as error:
        raise cannot_write(path, error) from error


def _status(pid: int) -> tuple[str, str]:
    """State letter of a process (Z = dead, not yet collected) and when it began in clock ticks; empty if not told."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8")
    except OSError:
        return "", ""
    # The second field, the name in brackets, may hold spaces; the state is the first after it, the start the 20th.
    fields = stat.rpartition(")")[2].split()
    return fields[0], fields[19]
