"""The reward of a recognised text, as pure functions.

The rule is Flow-GRPO's (arXiv 2505.05470); other public trainers also use it:

    r = 1 - min(d, len(target)) / len(target),   d = 0 if target is a part of the recognised text,
                                                 else the Levenshtein distance between the two,

both without spaces and in lower case, the recognised lines joined in reading order without a separator. Because of the
exemption for parts, extra or repeated text costs nothing, so each score also has ``similarity`` and ``exact_match``,
which have no exemption.

Flow-GRPO's own code deletes U+0020 alone, so no image satisfies a target with a line break, a decomposed accent or a
typographic apostrophe, which recognisers read in another form. Here both texts are brought to one form first. For texts
of plain letters, digits and spaces the two rules give the same numbers.
"""

from __future__ import annotations

import unicodedata

from rapidfuzz.distance import Levenshtein

RULE = "flow-grpo-substring-3"
"""Name of the rule in the provenance; it changes whenever the same text would get another score or other details."""

_TWINS = str.maketrans(
    {
        **dict.fromkeys("\u2018\u2019\u201a\u201b\u2032\u02bc\u00b4`", "'"),
        **dict.fromkeys("\u201c\u201d\u201e\u201f\u2033", '"'),
        **dict.fromkeys("\u2010\u2011\u2012\u2013\u2014\u2015\u2212", "-"),
        **{chr(ord(sign) + 0xFEE0): sign for sign in "!\"#%&'()*+,-./:;<=>?@|~"},  # full width
    }
)
"""Characters that differ in typography only, one for one."""
_ELLIPSIS, _DOTS = "\u2026", "..."


def normalise(text: str) -> str:
    """The text in the form that is compared: in lower case, NFC, without white space and invisible characters.

    Typographic quotes, apostrophes, dashes and punctuation of full width become the ASCII ones; everything else
    remains, including other punctuation and accents.
    """
    composed = unicodedata.normalize("NFC", text.lower())
    return "".join(sign for sign in composed if not _is_invisible(sign)).translate(_TWINS)


def letters(text: str) -> frozenset[str]:
    """The characters of a text that are compared."""
    return frozenset(normalise(text).replace(_ELLIPSIS, _DOTS))


def _is_invisible(sign: str) -> bool:
    """Whether a character is white space, of zero width, or selects the form of the one before it."""
    return sign.isspace() or unicodedata.category(sign) == "Cf" or "\ufe00" <= sign <= "\ufe0f"


def ocr_reward(target: str, recognised: str) -> float:
    """Flow-GRPO's reward of a recognised text, in [0, 1]; also 1 if the target is only a part of it.

    Raises ValueError if ``target`` is empty after ``normalise``.
    """
    expected, actual = _compared(target, recognised)
    if expected in actual:
        return 1.0
    return 1.0 - min(Levenshtein.distance(expected, actual), len(expected)) / len(expected)


def similarity(target: str, recognised: str) -> float:
    """``1 - d / max(lengths)`` in [0, 1], without the exemption for parts: extra text costs.

    Raises ValueError if ``target`` is empty after ``normalise``.
    """
    expected, actual = _compared(target, recognised)
    return 1.0 - Levenshtein.distance(expected, actual) / max(len(expected), len(actual))


def exact_match(target: str, recognised: str) -> bool:
    """Whether both texts are equal in the form that is compared. Raises ValueError for an empty target."""
    expected, actual = _compared(target, recognised)
    return expected == actual


def _compared(target: str, recognised: str) -> tuple[str, str]:
    """Both texts normalised. If the target has an ellipsis, one character and three dots are the same."""
    expected, actual = normalise(target), normalise(recognised)
    if not expected:
        raise ValueError("the target text is empty")
    if _ELLIPSIS in expected or _DOTS in expected:
        return expected.replace(_ELLIPSIS, _DOTS), actual.replace(_ELLIPSIS, _DOTS)
    return expected, actual
