"""The online objective: advantages of the images of a group, and the clipped surrogate of the policy gradient.

Source: Flow-GRPO (arXiv 2505.05470), after GRPO (arXiv 2402.03300) and PPO (arXiv 1707.06347).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

STD_FLOOR = 1e-4
"""Added to the standard deviation of rewards, as in Flow-GRPO's public code."""

Scale = Literal["global", "group"]


def group_advantages(rewards: Tensor, *, scale: Scale, clip: float) -> Tensor:
    """Return ``(r - mean of the group) / (std + 1e-4)``, clipped to [-clip, clip].

    Images without a reward count nowhere. Groups of equal rewards and groups with one reward get exactly 0.

    Args:
        rewards: [B, K], nan where an image has none.
        scale: std over all rewards, ``global``, or over those of the group, ``group``; both with divisor n.
        clip: largest advantage, above 0.

    Returns:
        [B, K] float32; 0 where there is no reward.

    Raises:
        ValueError: a reward is infinite, or the scale is unknown.
    """
    if rewards.isinf().any():
        raise ValueError("a reward is infinite")
    values, known = rewards.double(), ~rewards.isnan()
    values = values.where(known, 0.0)
    mean, own_std = _moments(values, known)
    if scale == "global":
        _, std = _moments(values.reshape(1, -1), known.reshape(1, -1))
    elif scale == "group":
        std = own_std
    else:
        raise ValueError(f"scale must be 'global' or 'group', not {scale!r}")
    highest = values.masked_fill(~known, -torch.inf).amax(dim=1, keepdim=True)
    lowest = values.masked_fill(~known, torch.inf).amin(dim=1, keepdim=True)
    # The mean of equal numbers is not always that number.
    kept = known & (highest > lowest)
    advantages = ((values - mean) / (std + STD_FLOOR)).clamp(-clip, clip)
    return advantages.where(kept, 0.0).float()


def group_std(rewards: Tensor) -> Tensor:
    """Return the standard deviation (divisor n) of each group's rewards [B]; nan where a group has none."""
    known = ~rewards.isnan()
    _, std = _moments(rewards.double().where(known, 0.0), known)
    return std.squeeze(1).where(known.any(dim=1), torch.nan).float()


def _moments(values: Tensor, known: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation [B, 1] over the known values of each row; 0 for a row without any."""
    count = known.sum(dim=1, keepdim=True).clamp(min=1)
    mean = values.sum(dim=1, keepdim=True) / count
    squares = (values - mean).square().where(known, 0.0).sum(dim=1, keepdim=True)
    return mean, torch.sqrt(squares / count)


@dataclass(frozen=True, slots=True)
class Surrogate:
    """The clipped objective of N drawn steps."""

    loss: Tensor
    """[N]; its gradient at ratio 1 is that of ``-advantage * log_prob``."""
    ratio: Tensor
    """Likelihood of the step under the policy, relative to the policy that drew it [N], detached."""
    clipped: Tensor
    """Whether the ratio is outside the clip range [N] bool, detached."""


def clipped_surrogate(log_prob: Tensor, old_log_prob: Tensor, advantage: Tensor, *, clip_range: float) -> Surrogate:
    """Return ``max(-A ratio, -A clamp(ratio, 1 - clip, 1 + clip))`` with ``ratio = exp(log_prob - old_log_prob)``.

    Args:
        log_prob: log-probabilities under the policy [N], with gradient.
        old_log_prob: those under the policy that drew the steps [N].
        advantage: A of the step's image [N].
        clip_range: half the width of the range, above 0.

    Raises:
        ValueError: shapes differ.
    """
    if not log_prob.shape == old_log_prob.shape == advantage.shape:
        raise ValueError("clipped_surrogate: log_prob, old_log_prob and advantage must share one shape [N]")
    ratio = torch.exp(log_prob - old_log_prob)
    bounded = ratio.clamp(1.0 - clip_range, 1.0 + clip_range)
    loss = torch.maximum(-advantage * ratio, -advantage * bounded)
    return Surrogate(loss, ratio.detach(), ((ratio - 1.0).abs() > clip_range).detach())
