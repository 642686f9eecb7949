"""Scores with their uncertainty: bootstrap confidence intervals over prompts.

Images of one prompt are not independent, so prompts are drawn with replacement, each with all of its images.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from gdro_cli.core.seeds import generator

DRAWS_PER_CHUNK = 4_000_000
"""Prompt draws in memory at a time (32 MB of indices)."""

Values = Sequence[Sequence[float | None]]
"""Scores per prompt and image; None and nan are missing."""


@dataclass(frozen=True, slots=True)
class Interval:
    """A mean over all scored images with its bootstrap confidence interval from ``low`` to ``high``."""

    mean: float
    low: float
    high: float
    prompts: int
    """Prompts with at least one scored image."""
    images: int
    """Scored images."""
    level: float
    """Confidence level, e.g. 0.95."""


def resamples(prompts: int, *, stream: torch.Generator, samples: int, columns: int = 1) -> Iterator[Tensor]:
    """Draw ``samples`` bootstrap resamples: indices [n, B] of B prompts, few enough at a time for ``columns`` sums."""
    rows = max(1, DRAWS_PER_CHUNK // (prompts * columns))
    for start in range(0, samples, rows):
        yield torch.randint(prompts, (min(rows, samples - start), prompts), generator=stream)


def _resampled_means(sums: Tensor, counts: Tensor, *, stream: torch.Generator, samples: int) -> Tensor:
    """Mean over images of each resampled set of prompts [samples], from sums and counts per prompt [B]."""
    draws = resamples(len(sums), stream=stream, samples=samples)
    return torch.cat([sums[draw].sum(dim=1) / counts[draw].sum(dim=1) for draw in draws])


def bootstrap_ci(
    values_per_prompt: Values,
    *,
    strata: Sequence[str] | None = None,
    seed: int = 0,
    samples: int = 2000,
    level: float = 0.95,
) -> Interval:
    """Return the mean over all images and its percentile bootstrap interval over prompts.

    Each of the ``samples`` resamples draws as many prompts as there are, with replacement, and takes the mean over all
    their images. The interval is between the (1 - level) / 2 and (1 + level) / 2 quantiles of these means. Missing
    scores are left out, never counted as 0. With one prompt the interval is a point.

    With ``strata`` the mean is the unweighted mean of the strata's means, and prompts are drawn within their stratum
    (GenEval's overall score: the strata are the tags).

    Args:
        values_per_prompt: scores, one sequence of images per prompt, of any lengths.
        strata: the name of each prompt's stratum.
        seed: seed of the random stream; equal seeds give equal intervals.
        samples: number of resamples, >= 1.
        level: confidence level, in (0, 1).

    Raises:
        ValueError: no score at all, or none in a stratum.
    """
    parts: dict[str, list[list[float]]] = {}
    for name, values in zip(strata or [""] * len(values_per_prompt), values_per_prompt, strict=True):
        present = [float(value) for value in values if value is not None and not math.isnan(value)]
        parts.setdefault(name, []).extend([present] if present else [])
    empty = [name for name, scores in parts.items() if not scores]
    if empty or not parts:
        raise ValueError("no scored image to average" + (f" in {', '.join(empty)}" if any(empty) else ""))
    stream = generator(seed, "bootstrap")
    means = torch.zeros(samples, dtype=torch.float64)
    for scores in parts.values():
        sums = torch.tensor([math.fsum(prompt) for prompt in scores], dtype=torch.float64)
        counts = torch.tensor([len(prompt) for prompt in scores], dtype=torch.float64)
        means += _resampled_means(sums, counts, stream=stream, samples=samples) / len(parts)
    ends = torch.tensor([(1 - level) / 2, (1 + level) / 2], dtype=torch.float64)
    low, high = torch.quantile(means, ends).tolist()
    return Interval(
        mean=math.fsum(_mean(scores) for scores in parts.values()) / len(parts),
        low=low,
        high=high,
        prompts=sum(len(scores) for scores in parts.values()),
        images=sum(len(prompt) for scores in parts.values() for prompt in scores),
        level=level,
    )


def _mean(scores: list[list[float]]) -> float:
    return math.fsum(value for prompt in scores for value in prompt) / sum(map(len, scores))


def paired_bootstrap(
    baseline: Values,
    candidate: Values,
    *,
    strata: Sequence[str] | None = None,
    samples: int = 2000,
) -> Interval:
    """Return the mean difference candidate - baseline and its 95 % bootstrap interval over prompts.

    Entry [p][i] of both must have the same prompt and the same noise seed. The difference is taken image by image, so
    what the two share (easy and hard prompts) cancels. An image missing on either side is left out on both.

    Args:
        baseline: scores per prompt and image, e.g. of the base model.
        candidate: scores to compare with it, e.g. of the trained model.
        strata: as in ``bootstrap_ci``.
        samples: number of resamples, >= 1.

    Raises:
        ValueError: the two differ in prompts or images per prompt, or nothing is scored on both sides.
    """
    if [len(prompt) for prompt in baseline] != [len(prompt) for prompt in candidate]:
        raise ValueError("paired scores must have the same prompts and the same number of images per prompt")
    differences = [
        [None if a is None or b is None else b - a for a, b in zip(before, after, strict=True)]
        for before, after in zip(baseline, candidate, strict=True)
    ]
    return bootstrap_ci(differences, strata=strata, samples=samples)
