"""How a failure appears to the user: one sentence in red on stderr, and a fixed exit code."""

from __future__ import annotations

import errno
import os
import sys
import traceback

from gdro_cli.errors import (
    EndedElsewhere,
    GdroError,
    Interrupted,
    PrerequisiteError,
    StoreError,
    UserError,
    is_out_of_memory,
)
from gdro_cli.runtime.interrupt import stopped_at_once

_UNEXPECTED = 1
_DENIED = (errno.EACCES, errno.EPERM, errno.EROFS)
_FULL = (errno.ENOSPC, errno.EDQUOT)
_LONGEST_CHAIN = 100
"""Causes of an error that are examined; ``raise error from error`` makes a circle."""


def exit_code_of(error: Exception, *, debug: bool) -> int:
    """Report ``error`` to the user (with its traceback if ``debug``) and return the exit code."""
    expected = _expected(error)
    if debug:
        traceback.print_exception(error, file=sys.stderr)
    if isinstance(expected, EndedElsewhere) and not str(expected):
        return expected.exit_code  # the process that failed has reported it
    if expected is not None:
        stopped = isinstance(expected, Interrupted)
        _print(str(expected), label="" if stopped else "Error", style="yellow" if stopped else "red")
        return expected.exit_code
    reason = " ".join(str(error).split())
    message = f"Unexpected {type(error).__name__}" + (f": {reason}" if reason else "")
    hint = "the traceback above" if debug else "what the same command prints with --debug"
    _print(f"{message.rstrip('.')}. This is a defect: please report it with {hint} and the output of gdro env.")
    return _UNEXPECTED


def _expected(error: Exception) -> GdroError | None:
    """The error as one of ours; None for a defect of the tool."""
    if isinstance(error, Interrupted):
        return error
    signal = _interrupt_behind(error)
    if signal is not None:
        return Interrupted(stopped_at_once(signal))
    if isinstance(error, GdroError):
        return error
    if is_out_of_memory(error):
        return PrerequisiteError(
            "not enough memory: lower sample.batch_size, train.micro_batch or the images' size (--dry-run reports what"
            " is needed), and run the same command again"
        )
    return _refusal(error) if isinstance(error, OSError) else None


def _refusal(error: OSError) -> GdroError | None:
    """A refusal of the operating system that the user can fix."""
    path = error.filename if error.filename is not None else "a file"
    if error.errno in _DENIED:
        return UserError(f"{path}: {error.strerror}: change its permissions or name another --out")
    if error.errno in _FULL:
        return StoreError(f"the disk is full ({path}): free some space and run the same command again to continue")
    if error.errno == errno.ENAMETOOLONG:
        return UserError(f"the name {str(path)[:60]!r}... is too long for a file: choose a shorter one")
    if error.errno == errno.EMFILE:
        return PrerequisiteError("too many open files: raise the limit (ulimit -n) and run the same command again")
    return None


def _interrupt_behind(error: BaseException | None) -> KeyboardInterrupt | None:
    """The signal behind an error: libraries report an interruption as a failure of their own."""
    for _ in range(_LONGEST_CHAIN):
        if error is None or isinstance(error, KeyboardInterrupt):
            return error
        error = error.__cause__ or error.__context__
    return None


def _print(message: str, *, label: str = "Error", style: str = "red") -> None:
    from rich.text import Text

    from gdro_cli.runtime.progress import ErrorConsole
    from gdro_cli.runtime.terminal import printable

    rank = os.environ.get("RANK", "0")
    head = f"{label} (process {rank})".strip() if rank != "0" else label
    text = f"{head}: {message}" if head else message[:1].upper() + message[1:]
    ErrorConsole().print(Text(printable(text), style=style), soft_wrap=True)
