"""The corrected score: what a reward is worth once the quality of the image is counted.

Source: the GDRO paper (arXiv 2601.02036), its corrected score. A model that hacks its reward gains reward by giving up
quality, so quality multiplies the reward. For evaluation only; nothing is trained on it.
"""

from __future__ import annotations

import math

NEUTRAL_QUALITY = 3.0
"""The middle of the judge's scale of 1 to 5: at this quality the reward earns nothing."""

OFFSET = 0.2
"""Added to every score; the score of an image with reward 0 or of neutral quality."""


def corrected_score(reward: float | None, u: float | None) -> float | None:
    """Return ``reward * (u - 3) + 0.2``, or None when either is missing (None or nan).

    Where u < 3 a higher reward *lowers* the score: a bad image that meets its target counts as worse than a bad image
    that does not. So report reward, u and corrected score side by side.

    Args:
        reward: explicit reward of an image, 0 to 1.
        u: quality of the same image, the mean of the judge's axes, 1 to 5.
    """
    if reward is None or u is None or math.isnan(reward) or math.isnan(u):
        return None
    return reward * (u - NEUTRAL_QUALITY) + OFFSET
