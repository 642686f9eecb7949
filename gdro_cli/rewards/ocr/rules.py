"""The reward of a recognised text, as pure functions.

The rule is the one of Flow-GRPO (arXiv 2505.05470), which other public trainers use too:

    r = 1 - min(d, len(target)) / len(target),   d = 0 if target is a part of the recognised text,
                                                 else the Levenshtein distance between the two,

both sides without spaces and in lower case, the recognised lines joined in reading order without a separator.
The exemption for parts makes extra or repeated text free of charge, so each score also carries ``similarity``
and ``exact_match``, which know no exemption.
"""

from __future__ import annotations

from rapidfuzz.distance import Levenshtein

RULE = "flow-grpo-substring-1"
"""Name of the reward rule in the provenance; it changes whenever the same reading would score differently."""


def normalise(text: str) -> str:
    """The text without spaces and in lower case; everything else is kept, also punctuation."""
    return text.replace(" ", "").lower()


def ocr_reward(target: str, recognised: str) -> float:
    """Flow-GRPO's reward of a recognised text, in [0, 1]; 1 also when the target is only a part of it.

    Raises ValueError when nothing of ``target`` is left after ``normalise``.
    """
    wanted, got = _wanted(target), normalise(recognised)
    if wanted in got:
        return 1.0
    return 1.0 - min(Levenshtein.distance(wanted, got), len(wanted)) / len(wanted)


def similarity(target: str, recognised: str) -> float:
    """``1 - d / max(lengths)`` in [0, 1], without the exemption for parts: extra text costs.

    Raises ValueError when nothing of ``target`` is left after ``normalise``.
    """
    wanted, got = _wanted(target), normalise(recognised)
    return 1.0 - Levenshtein.distance(wanted, got) / max(len(wanted), len(got))


def exact_match(target: str, recognised: str) -> bool:
    """Whether both texts are the same after ``normalise``. Raises ValueError for an empty target."""
    return _wanted(target) == normalise(recognised)


def _wanted(target: str) -> str:
    wanted = normalise(target)
    if not wanted:
        raise ValueError("the target text is empty")
    return wanted
