"""Text of others (names, paths, answers) on the user's terminal."""

from __future__ import annotations

import os
import re

UNREAD = 141
"""Exit code when nothing reads the output any more: that of a process that SIGPIPE ends."""

_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")


def printable(text: str) -> str:
    r"""The text with control characters, which a terminal would obey, spelt out; tabs and line ends stay.

    >>> printable("a\x1b[2Jb")
    'a\\x1b[2Jb'
    """
    return _CONTROL.sub(lambda match: f"\\x{ord(match[0]):02x}", text)


def is_main_process() -> bool:
    """Whether this process prints for all: the only one, or the first of several."""
    return os.environ.get("RANK", "0") == "0"
