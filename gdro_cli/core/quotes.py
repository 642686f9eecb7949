"""The text that a prompt asks an image to say: what it puts in double quotes."""

from __future__ import annotations

import re

_QUOTED = re.compile('"([^"]*)"|[\u201c\u201d\u201e\u201f]([^\u201c\u201d\u201e\u201f]*)[\u201c\u201d\u201e\u201f]')


def quoted_text(prompt: str) -> str | None:
    """The text between the first pair of double quotes, straight or typographic; ``None`` without a pair."""
    match = _QUOTED.search(prompt)
    if match is None:
        return None
    return match.group(1) if match.group(1) is not None else match.group(2)
