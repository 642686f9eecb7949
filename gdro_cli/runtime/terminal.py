"""Text of others (names, paths, answers) on the user's terminal."""

from __future__ import annotations

import re

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


def _spelt(found: re.Match[str]) -> str:
    code = ord(found[0])
    if code in _BYTES:
        code -= 0xDC00
    return f"\\x{code:02x}" if code < 0x100 else f"\\u{code:04x}"
