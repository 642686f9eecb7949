"""The text that a prompt wants in its image: the text in double quotes."""

from __future__ import annotations

import re

_QUOTED = re.compile('"([^"]*)"|[\u201c\u201d\u201e\u201f]([^\u201c\u201d\u201e\u201f]*)[\u201c\u201d\u201e\u201f]')


def quoted_text(prompt: str) -> str | None:
    """Return the text between the first pair of double quotes, straight or typographic; None without a pair."""
    match = _QUOTED.search(prompt)
    return None if match is None else match[match.lastindex or 0]
