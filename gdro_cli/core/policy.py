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


def group_advantages(rewards: Tensor, *, scale: Scale, clip: float, floor: float = STD_FLOOR) -> Tensor:
    """Return ``(r - mean of the group) / (std + floor)``, clipped to [-clip, clip].

    Images without a reward do not count. A group of equal rewards, or with only one reward, gets exactly 0.

    Args:
        rewards: [B, K], nan for an image without one.
        scale: ``global`` takes the std over all rewards, ``group`` over those of the group; both with divisor n.
        clip: largest advantage, above 0.
        floor: added to the std, 0 or more.

    Returns:
        [B, K] float64; 0 for an image without a reward.

    Raises:
        ValueError: a reward is infinite.
    """
    if rewards.isinf().any():
        raise ValueError("a reward is infinite")
    present = ~rewards.isnan()
    values = rewards.double().where(present, 0.0)
    mean, std = _moments(values, present)
    if scale == "global":
        _, std = _moments(values.reshape(1, -1), present.reshape(1, -1))
    highest = values.masked_fill(~present, -torch.inf).amax(dim=1, keepdim=True)
    lowest = values.masked_fill(~present, torch.inf).amin(dim=1, keepdim=True)
    advantages = ((values - mean) / (std + floor)).clamp(-clip, clip)
    # The mean of equal numbers can differ from them in the last bit, so equal rewards are compared themselves.
    return advantages.where(present & (highest > lowest), 0.0)


def group_std(rewards: Tensor) -> Tensor:
    """Return the standard deviation (divisor n) of each group's rewards [B]; nan for a group without rewards."""
    present = ~rewards.isnan()
    _, std = _moments(rewards.double().where(present, 0.0), present)
    return std.squeeze(1).where(present.any(dim=1), torch.nan).float()


def _moments(values: Tensor, present: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation [B, 1] of the present values of each row; 0 for a row without any."""
    count = present.sum(dim=1, keepdim=True).clamp(min=1)
    mean = values.sum(dim=1, keepdim=True) / count
    squares = (values - mean).square().where(present, 0.0).sum(dim=1, keepdim=True)
    return mean, torch.sqrt(squares / count)


@dataclass(frozen=True, slots=True)
class Surrogate:
    """The clipped objective of N sampled steps."""

    loss: Tensor
    """[N]; its gradient at ratio 1 is that of ``-advantage * log_prob``."""
    ratio: Tensor
    """Likelihood of the step under the policy over that under the policy that drew it [N], detached."""
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
