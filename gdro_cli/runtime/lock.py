"""One writer per folder: a lock file that names its owner, and that the owner's process holds open and locked.

The file is what counts; it works on every disk, and says whom to ask. The kernel's lock on it (``flock``) is what tells
a process that runs from one that died wherever the numbers of processes do not: in containers, which count their own.
"""

from __future__ import annotations

import errno
import json
import os
import socket
import stat
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

from gdro_cli.errors import StoreError
from gdro_cli.files import cannot_write, parse_json, reading, remove_forgotten
from gdro_cli.processes import is_running

_TRIES = 5
"""Attempts when other processes take and leave the lock at the same moment."""
_PAUSE_SECONDS = 0.05
_LARGEST_PID = 2**31 - 1
_EMPTY_SECONDS = 5.0
"""A lock that stays empty for so long was left by a process killed between making and filling it."""
_LONGEST = 10_000
"""Bytes of a lock file that are read."""
_NO_LINK = getattr(os, "O_NOFOLLOW", 0)
_NO_WAIT = getattr(os, "O_NONBLOCK", 0)

_Flock = Literal["ours", "another's", "none"]


@dataclass(frozen=True, slots=True)
class Owner:
    """A process: where it runs, its number, and when it began (numbers are used again after a restart)."""

    host: str
    pid: int
    began: str
    machine: str = ""
    """Name of the machine that stays over its restarts; empty where the system does not tell."""
    boot: str = ""
    """Name of the kernel's present run."""
    numbers: str = ""
    """The namespace that process numbers belong to: a container counts its own."""
    disk: int = 0
    """Number of the mounted disk on which the kernel holds the lock file; 0 where it does not."""

    @classmethod
    def of(cls, pid: int, *, disk: int = 0) -> Owner:
        """Describe a process that counts processes as this one does."""
        return cls(
            host=socket.gethostname(),
            pid=pid,
            began=_status(pid)[1],
            machine=_text_of(Path("/etc/machine-id")).strip(),
            boot=_boot(),
            numbers=_numbers(),
            disk=disk,
        )

    @property
    def gone(self) -> bool:
        """True if the owner surely no longer runs: it was on this machine and its process is dead or another."""
        here = Owner.of(os.getpid())
        if self.host != here.host:
            return False
        if _differ(self.boot, here.boot):  # the machine was started again since, or it is another of that name
            return bool(self.machine) and self.machine == here.machine
        if _differ(self.numbers, here.numbers):
            return False
        if not is_running(self.pid):
            return True
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
    for _ in range(_TRIES):
        taken = _make(path)
        if taken is not None:
            break
        _remove_stale(path)
    else:
        raise StoreError(f"{path.parent} is being taken by several processes at once: try again")
    handle, mine = taken
    try:
        try:
            remove_forgotten(path.parent)
            yield
        finally:
            if _text_of(path) == mine:
                path.unlink(missing_ok=True)
    finally:
        os.close(handle)


def clear_stale(path: Path) -> None:
    """Remove the lock of a dead owner from a folder in which nothing is left to do; one that is only read keeps it."""
    with suppress(OSError, StoreError):
        _remove_stale(path)


def _make(path: Path) -> tuple[int, str] | None:
    """Make the lock file and hold it: its handle and content; None if there is one already."""
    try:
        handle = os.open(path, os.O_CREAT | os.O_EXCL | os.O_RDWR, 0o644)
    except FileExistsError:
        return None
    except OSError as error:
        raise cannot_write(path.parent, error) from error
    try:
        held = _flock(handle, wait=True) == "ours"
        mine = json.dumps(asdict(Owner.of(os.getpid(), disk=os.fstat(handle).st_dev if held else 0)))
        with os.fdopen(handle, "w", encoding="ascii", closefd=False) as stream:
            stream.write(mine)
    except BaseException as error:  # an empty lock must not stay
        with suppress(OSError):
            path.unlink()
        os.close(handle)
        if isinstance(error, OSError):
            raise cannot_write(path.parent, error) from error
        raise
    if _is_still(path, handle):
        return handle, mine
    os.close(handle)  # it was empty for so long that another process has removed it
    return None


def _remove_stale(path: Path) -> None:
    """Remove a dead owner's lock; refuse if the owner may be alive. Nothing happens if there is no lock."""
    handle = _open(path)
    if handle is None:
        return
    try:
        flock = _flock(handle, wait=False)
        with reading(path):
            about, text = os.fstat(handle), os.read(handle, _LONGEST).decode("utf-8", errors="replace")
        owner = _owner(text)
        if not _left_behind(owner, text, about, flock):
            who = f"process {owner.pid} on {owner.host}" if owner else "another process"
            raise StoreError(f"{path.parent} is in use by {who}: wait for it, or if it is gone delete {path}")
        if flock == "none":
            _move_away(path, text)
        elif flock == "another's":
            time.sleep(_PAUSE_SECONDS)  # someone else is just removing it
        elif _is_still(path, handle):  # nobody else removes what we hold
            path.unlink(missing_ok=True)
    except OSError as error:
        raise cannot_write(path, error) from error
    finally:
        os.close(handle)


def _move_away(path: Path, seen: str) -> None:
    """Remove a lock that the kernel does not hold for anyone: by moving it first, so that only one process does."""
    # Between reading and moving, someone else may have taken over: then a live lock was moved, and goes back.
    aside = path.with_name(f".{path.name}.{os.getpid()}.stale")
    try:
        os.rename(path, aside)
    except FileNotFoundError:
        return
    if _text_of(aside) != seen:
        os.rename(aside, path)
        return
    aside.unlink(missing_ok=True)


def _owner(seen: str) -> Owner | None:
    """Whom a lock names; None where it is not as this tool writes it."""
    try:
        owner = Owner(**parse_json(seen))
    except (ValueError, TypeError):
        return None
    texts = all(isinstance(each, str) for each in (owner.host, owner.began, owner.machine, owner.boot, owner.numbers))
    whole = type(owner.pid) is int and 0 < owner.pid <= _LARGEST_PID and type(owner.disk) is int
    return owner if texts and whole else None


def _left_behind(owner: Owner | None, seen: str, about: os.stat_result, flock: _Flock) -> bool:
    if owner is None:
        return not seen and time.time() - about.st_mtime > _EMPTY_SECONDS
    # The kernel that held the file for its owner is this one, and holds it no longer.
    let_go = flock == "ours" and owner.boot == _boot() != "" and owner.disk == about.st_dev
    return let_go or owner.gone


def _open(path: Path) -> int | None:
    """Open a lock file, to hold it where that is allowed; None if there is none. Raises StoreError."""
    for way in (os.O_RDWR, os.O_RDONLY):
        try:
            handle = os.open(path, way | _NO_LINK | _NO_WAIT)
        except FileNotFoundError:
            return None
        except OSError as error:
            if way == os.O_RDWR and error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
                continue  # another user's
            raise cannot_write(path, error) from error
        if stat.S_ISREG(os.fstat(handle).st_mode):
            return handle
        os.close(handle)
        raise StoreError(f"{path} is no ordinary file: delete it and run the command again")
    return None


def _flock(handle: int, *, wait: bool) -> _Flock:
    """Ask the kernel to hold an open file for this process; returns whose it is then, if the disk knows such locks."""
    if sys.platform == "win32":
        return "none"
    import fcntl

    try:
        fcntl.flock(handle, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except BlockingIOError:
        return "another's"
    except OSError:
        return "none"
    return "ours"


def _is_still(path: Path, handle: int) -> bool:
    """Whether an open file has that name."""
    try:
        return os.path.samestat(os.stat(path, follow_symlinks=False), os.fstat(handle))
    except FileNotFoundError:
        return False


def _text_of(path: Path) -> str:
    """A file's text; empty where it cannot be read."""
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""


def _boot() -> str:
    return _text_of(Path("/proc/sys/kernel/random/boot_id")).strip()


def _numbers() -> str:
    try:
        return os.readlink("/proc/self/ns/pid")
    except OSError:
        return ""


def _differ(one: str, other: str) -> bool:
    """Whether two names are known and not the same."""
    return bool(one and other) and one != other


def _status(pid: int) -> tuple[str, str]:
    """State letter of a process (Z = dead, not yet collected) and when it began in clock ticks; empty if not told."""
    stat_line = _text_of(Path(f"/proc/{pid}/stat"))
    # The second field, the name in brackets, may hold spaces; the state is the first after it, the start the 20th.
    fields = stat_line.rpartition(")")[2].split()
    return (fields[0], fields[19]) if len(fields) > 19 else ("", "")
