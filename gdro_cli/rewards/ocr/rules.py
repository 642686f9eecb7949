"""The reward of a recognised text, as pure functions.

The rule is Flow-GRPO's (arXiv 2505.05470); other public trainers also use it:

    r = 1 - min(d, len(target)) / len(target),   d = 0 if target is a part of the recognised text,
                                                 else the Levenshtein distance between the two,

both without spaces and in lower case, the recognised lines joined in reading order without a separator. Because of the
exemption for parts, extra or repeated text costs nothing, so each score also has ``similarity`` and ``exact_match``,
which have no exemption.
"""

from __future__ import annotations

from rapidfuzz.distance import Levenshtein

RULE = "flow-grpo-substring-1"
"""Name of the rule in the provenance; it changes whenever the same text would score differently."""


def normalise(text: str) -> str:
    """The text without spaces and in lower case; everything else remains, including punctuation."""
    return text.replace(" ", "").lower()


def ocr_reward(target: str, recognised: str) -> float:
    """Flow-GRPO's reward of a recognised text, in [0, 1]; also 1 if the target is only a part of it.

    Raises ValueError if ``target`` is empty after ``normalise``.
    """
    expected, actual = _normalised_target(target), normalise(recognised)
    if expected in actual:
        return 1.0
    return 1.0 - min(Levenshtein.distance(expected, actual), len(expected)) / len(expected)


def similarity(target: str, recognised: str) -> float:
    """``1 - d / max(lengths)`` in [0, 1], without the exemption for parts: extra text costs.

    Raises ValueError if ``target`` is empty after ``normalise``.
    """
    expected, actual = _normalised_target(target), normalise(recognised)
    return 1.0 - Levenshtein.distance(expected, actual) / max(len(expected), len(actual))


def exact_match(target: str, recognised: str) -> bool:
    """Whether both texts are equal after ``normalise``. Raises ValueError for an empty target."""
    return _normalised_target(target) == normalise(recognised)


def _normalised_target(target: str) -> str:
    text = normalise(target)
    if not text:
        raise ValueError("the target text is empty")
    return text
