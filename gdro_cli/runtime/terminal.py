"""The user's terminal: text of others (names, paths, answers), and streams that are gone or not for every text."""

from __future__ import annotations

import errno
import os
import re
import select
import sys
from contextlib import suppress
from io import TextIOWrapper

UNREAD = 141
"""Exit code where nobody reads the output any more: that of a process that SIGPIPE ends."""

_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff]")
_BYTES = range(0xDC80, 0xDD00)
"""Code points by which Python names the bytes of a file name that is not UTF-8."""


def printable(text: str) -> str:
    r"""The text with control characters spelt out, but for tabs and ends of lines: a terminal would obey them.

    So are the bytes of a file name that are no text, and halves of characters: they could not be written at all.

    >>> printable("a\x1b[2Jb"), printable("run-\udcff"), printable("\ud800")
    ('a\\x1b[2Jb', 'run-\\xff', '\\ud800')
    """
    return _CONTROL.sub(_spelt, text)


def prepare_streams() -> None:
    """Make the standard streams take any text, what they have no letters for spelt out; closed ones lead nowhere.

    A closed one is opened because the next file that is made would else be taken for it.
    """
    for number, mode in ((0, "r"), (1, "w"), (2, "w")):
        try:
            os.fstat(number)
        except OSError:
            os.set_inheritable(os.open(os.devnull, os.O_RDWR), True)  # the lowest number that is free
        name = ("stdin", "stdout", "stderr")[number]
        if getattr(sys, name) is None:
            setattr(sys, name, open(number, mode, encoding="utf-8", closefd=False))  # noqa: SIM115 (kept to the end)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def takes_any_letter() -> bool:
    """Whether stdout's encoding has every letter, so that none must be spelt out."""
    return (sys.stdout.encoding or "").lower().startswith("utf")


def unread() -> bool:
    """Whether stdout or stderr is a pipe that nobody reads any more."""
    poll = select.poll()
    for number in (1, 2):
        poll.register(number, 0)
    return any(event & select.POLLERR for _, event in poll.poll(0))


def write_out() -> None:
    """Write what stdout still holds back; from a failure on it leads nowhere, and the interpreter's end says nothing.

    Raises:
        OSError: it could not be written.
    """
    try:
        sys.stdout.flush()
    except OSError:
        _lead_nowhere(sys.stdout.fileno())
        raise
    finally:
        try:
            sys.stderr.flush()
        except OSError:
            _lead_nowhere(sys.stderr.fileno())


def leave_closed_terminal() -> None:
    """Let standard streams of a terminal that has been closed lead nowhere: each word to it would be an error."""
    import termios

    for number in (0, 1, 2):
        try:
            termios.tcgetattr(number)
        except termios.error as error:
            if error.args[0] in (errno.EIO, errno.ENXIO):
                _lead_nowhere(number)


def _lead_nowhere(number: int) -> None:
    with suppress(OSError):
        nowhere = os.open(os.devnull, os.O_RDWR)
        os.dup2(nowhere, number)
        os.close(nowhere)


def _spelt(found: re.Match[str]) -> str:
    code = ord(found[0])
    if code in _BYTES:
        code -= 0xDC00
    return f"\\x{code:02x}" if code < 0x100 else f"\\u{code:04x}"


def is_main_process() -> bool:
    """Whether this process prints for all: the only one, or the first of several."""
    return os.environ.get("RANK", "0") == "0"
