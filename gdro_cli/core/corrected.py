"""The corrected score: what a reward is worth once the quality of the image is counted.

Source: the GDRO paper (arXiv 2601.02036), its corrected score. A model that hacks its reward gains reward by giving up
quality, so quality multiplies the reward. For evaluation only; nothing is trained on it.

There are two readings. ``corrected_score`` is taken image by image and then averaged; ``corrected_of_means`` is taken
once, of the mean reward and the mean u. They differ where reward and u go together from image to image.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from gdro_cli.core.scores import Interval, Values, resamples
from gdro_cli.core.seeds import generator

NEUTRAL_QUALITY = 3.0
"""The middle of the judge's scale of 1 to 5: at this quality the reward earns nothing."""

OFFSET = 0.2
"""Added to every score; the score of an image with reward 0 or of neutral quality."""


def corrected_score(reward: float | None, u: float | None) -> float | None:
    """Return ``reward * (u - 3) + 0.2``, or None when either is missing (None or nan).

    Where u < 3 a higher reward *lowers* the score: a bad image that meets its target counts as worse than a bad image
    that does not. So report reward, u and corrected score side by side.

    Args:
        reward: explicit reward of an image, or the mean of several, 0 to 1.
        u: quality of the same images, the mean of the judge's axes, 1 to 5.
    """
    if reward is None or u is None or math.isnan(reward) or math.isnan(u):
        return None
    return reward * (u - NEUTRAL_QUALITY) + OFFSET


@dataclass(frozen=True, slots=True)
class RewardAndQuality:
    """Reward and u of one model's images, per prompt and image."""

    rewards: Values
    us: Values
    strata: Sequence[str] | None = None
    """The name of each prompt's stratum, where the mean reward is the unweighted mean of the strata's means."""


def corrected_of_means(
    images: RewardAndQuality,
    *,
    base: RewardAndQuality | None = None,
    seed: int = 0,
    samples: int = 2000,
    level: float = 0.95,
) -> Interval:
    """Return ``mean(r) * (mean(u) - 3) + 0.2`` and its percentile bootstrap interval over prompts.

    Each of the ``samples`` resamples draws as many prompts of each stratum as there are, with replacement, and takes
    both means anew. r is averaged over all images that have one, or stratum by stratum; u over all images that have
    one. The interval's prompts and images are those that have both.

    Args:
        images: reward and u of a model.
        base: with it, the difference images - base on the same draws. A reward or u that is missing on one side is
            then left out on both.
        seed: names the random stream.
        samples: number of resamples, >= 1.
        level: confidence level, in (0, 1).

    Raises:
        ValueError: no reward in one stratum, or no u at all, or base and images differ in prompts or images.
    """
    if base is not None:
        images, base = _shared(images, base), _shared(base, images)
    scores = _scores(images, seed=seed, samples=samples)
    if base is not None:
        scores = scores - _scores(base, seed=seed, samples=samples)
    if scores[0].isnan():
        raise ValueError("no scored image to average")
    ends = torch.tensor([(1 - level) / 2, (1 + level) / 2], dtype=torch.float64)
    low, high = torch.nanquantile(scores[1:], ends).tolist()
    both = [sum(map(_both, *pair)) for pair in zip(images.rewards, images.us, strict=True)]
    return Interval(float(scores[0]), low, high, prompts=sum(map(bool, both)), images=sum(both), level=level)


def _scores(images: RewardAndQuality, *, seed: int, samples: int) -> Tensor:
    """The score of all images, then that of each resample [1 + samples]; nan where a mean is over nothing."""
    strata = images.strata or [""] * len(images.rewards)
    prompts = torch.tensor(
        [[*_total(rewards), *_total(us)] for rewards, us in zip(images.rewards, images.us, strict=True)],
        dtype=torch.float64,
    )  # [B, 4]
    stream, names = generator(seed, "bootstrap"), list(dict.fromkeys(strata))
    reward = torch.zeros(1 + samples, dtype=torch.float64)
    quality = torch.zeros(1 + samples, 2, dtype=torch.float64)
    for name in names:
        own = prompts[[stratum == name for stratum in strata]]
        draws = resamples(len(own), stream=stream, samples=samples, columns=4)
        totals = torch.cat([own.sum(dim=0, keepdim=True), *(own[draw].sum(dim=1) for draw in draws)])
        reward += totals[:, 0] / totals[:, 1] / len(names)
        quality += totals[:, 2:]
    return reward * (quality[:, 0] / quality[:, 1] - NEUTRAL_QUALITY) + OFFSET


def _total(values: Sequence[float | None]) -> tuple[float, int]:
    """Sum and number of the values that are not missing."""
    present = [value for value in values if value is not None and not math.isnan(value)]
    return math.fsum(present), len(present)


def _shared(images: RewardAndQuality, other: RewardAndQuality) -> RewardAndQuality:
    """What both have: a value that is missing in the other is missing here."""
    rewards, us = (
        [
            [value if _both(value, counterpart) else None for value, counterpart in zip(*prompt, strict=True)]
            for prompt in zip(values, others, strict=True)
        ]
        for values, others in ((images.rewards, other.rewards), (images.us, other.us))
    )
    return RewardAndQuality(rewards, us, images.strata)


def _both(value: float | None, other: float | None) -> bool:
    return not _missing(value) and not _missing(other)


def _missing(value: float | None) -> bool:
    return value is None or math.isnan(value)
