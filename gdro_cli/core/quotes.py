"""The text that a prompt wants in its image: the text in double quotes."""

from __future__ import annotations

import re

_CURLY = "\u201c\u201d\u201e\u201f"
_QUOTED = re.compile(f'"([^"]*)"|[{_CURLY}]([^{_CURLY}]*)[{_CURLY}]')
_OTHER = re.compile(
    "\u300c([^\u300c\u300d]*)\u300d|\u300e([^\u300e\u300f]*)\u300f"  # corner brackets
    "|[\u00ab\u00bb]([^\u00ab\u00bb]*)[\u00ab\u00bb]|[\u2039\u203a]([^\u2039\u203a]*)[\u2039\u203a]"  # guillemets
)
_MARKS = re.compile(f'["{_CURLY}]')


def quoted_text(prompt: str) -> str | None:
    """The text in the first pair of double quotes, straight or typographic; None without a pair.

    In a prompt without such a pair, the first pair of corner brackets or guillemets counts.
    """
    match = _QUOTED.search(prompt) or _OTHER.search(prompt)
    return None if match is None else match[match.lastindex or 0]


def has_several(prompt: str) -> bool:
    """Whether more than one text is quoted, by marks of the kind that ``quoted_text`` reads."""
    found = _QUOTED.findall(prompt) or _OTHER.findall(prompt)
    return len(found) > 1


def has_odd_mark(prompt: str) -> bool:
    """Whether a double quote has no partner, so that the quoted text may not be the one that was meant."""
    return _MARKS.search(_QUOTED.sub("", prompt)) is not None
