"""What a failure looks like to the user: one sentence in red on stderr, and a fixed exit code."""

from __future__ import annotations

import errno
import os
import sys
import traceback
from contextlib import suppress

from gdro_cli.errors import EndedElsewhere, GdroError, Interrupted, PrerequisiteError, StoreError, UserError
from gdro_cli.runtime.interrupt import stopped_at_once

_UNEXPECTED = 1
_DENIED = (errno.EACCES, errno.EPERM, errno.EROFS)
_LONGEST_CHAIN = 100
"""Errors behind an error that are looked at; a chain may go in a circle."""
_FULL = (errno.ENOSPC, errno.EDQUOT)


def exit_code_of(error: Exception, *, debug: bool) -> int:
    """Tell the user about ``error`` (with its traceback if ``debug``) and return the exit code."""
    known = _known(error)
    if debug:
        traceback.print_exception(error, file=sys.stderr)
    if isinstance(known, EndedElsewhere) and not str(known):
        return known.exit_code  # the process that failed has said why
    if known is not None:
        stopped = isinstance(known, Interrupted)
        _print(str(known), label="" if stopped else "Error", style="yellow" if stopped else "red")
        return known.exit_code
    reason = " ".join(str(error).split())
    message = f"Unexpected {type(error).__name__}" + (f": {reason}" if reason else "")
    hint = "the traceback above" if debug else "what the same command prints with --debug"
    _print(f"{message.rstrip('.')}. This is a defect: please report it with {hint} and the output of gdro env.")
    return _UNEXPECTED


def _known(error: Exception) -> GdroError | None:
    """The error as one of ours; the operating system's refusals are the user's to mend, too."""
    if isinstance(error, Interrupted):
        return error
    signal = _interrupt_behind(error)
    if signal is not None:
        return Interrupted(stopped_at_once(signal))
    if isinstance(error, GdroError):
        return error
    if _is_out_of_memory(error):
        return PrerequisiteError(
            "There is not enough memory: lower sample.batch_size, train.micro_batch or the pictures' size (--dry-run"
            " tells what is needed), and run the same command again."
        )
    if not isinstance(error, OSError):
        return None
    if error.errno == errno.ENOENT and _nowhere():
        return UserError("The working folder no longer exists: cd to another one and run the command again.")
    where = error.filename if error.filename is not None else "a file"
    if error.errno in _DENIED:
        return UserError(f"{where}: {error.strerror}: change its permissions or name another --out.")
    if error.errno in _FULL:
        return StoreError(f"The disk is full ({where}): make room and run the same command again to go on.")
    if error.errno == errno.ENAMETOOLONG:
        return UserError(f"The name {str(where)[:60]!r}... is too long for a file: choose a shorter one.")
    if error.errno == errno.EMFILE:
        return PrerequisiteError("Too many open files: raise the limit (ulimit -n) and run the same command again.")
    return None


def _interrupt_behind(error: BaseException) -> KeyboardInterrupt | None:
    """The signal in whose course an error came: libraries tell what interrupts them as a failure of their own."""
    behind: BaseException | None = error
    for _ in range(_LONGEST_CHAIN):
        if behind is None or isinstance(behind, KeyboardInterrupt):
            return behind
        behind = behind.__cause__ or behind.__context__
    return None


def _nowhere() -> bool:
    try:
        os.getcwd()
    except FileNotFoundError:
        return True
    return False


def _is_out_of_memory(error: Exception) -> bool:
    """Python's, CUDA's (whose class is not imported for this) or that of PyTorch on the CPU, which has no class."""
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return True
    return isinstance(error, RuntimeError) and "can't allocate memory" in str(error)


def _print(message: str, *, label: str = "Error", style: str = "red") -> None:
    from rich.console import Console
    from rich.text import Text

    from gdro_cli.runtime.terminal import printable

    rank = os.environ.get("RANK", "0")
    parts = [label, f"(process {rank})" if rank != "0" and rank.isdecimal() else ""]
    head = " ".join(part for part in parts if part)
    text = f"{head}: {message}" if head else message[:1].upper() + message[1:]
    with suppress(OSError):  # nobody reads it any more
        Console(stderr=True, highlight=False).print(Text(printable(text), style=style), soft_wrap=True)
