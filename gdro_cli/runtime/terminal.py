"""What this process prints on the user's terminal."""

from __future__ import annotations

import os
import re

UNREAD = 141
"""Exit code when the reader of the output is gone: that of a process that SIGPIPE ends."""

_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")


def printable(text: str) -> str:
    r"""The text with control characters, which a terminal would obey, escaped; tabs and line ends stay.

    >>> printable("a\x1b[2Jb")
    'a\\x1b[2Jb'
    """
    return _CONTROL.sub(lambda match: f"\\x{ord(match[0]):02x}", text)


def is_main_process() -> bool:
    """Whether this process prints for all: it is the only one, or the first of several."""
    return os.environ.get("RANK", "0") == "0"
