"""Order and share inside a group: from explicit rewards to ranks, remaining sets and targets.

The remaining set of rank i is the images i..K after sorting by reward, best first. Images with equal rewards can be
sorted in several ways, and none is preferred: a tied image is in a remaining set to the share of these orders that have
it there. This is Efron's treatment of ties (1977, J. Am. Stat. Assoc. 72). An image without a score (mask False) is in
no set: it is sorted last, and its value, even nan, is replaced before any arithmetic.

``rewards`` are explicit rewards [B, K] and ``mask`` is [B, K] bool, True = scored, None = all scored. Every function of
the two raises ValueError for a wrong shape or dtype and for a scored reward that is not finite.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from gdro_cli.core.flow import as_float


@dataclass(frozen=True, slots=True)
class Ranking:
    """The images of each group sorted by explicit reward, best first, unscored images last.

    Attributes:
        order: [B, K] index of the image at each rank.
        rewards: [B, K] rewards in that order; 0 for an unscored image.
        valid: [B, K] bool, True if the image at the rank is scored.
        remaining: [B, K, K], ``remaining[b, i, j]``: the share of the orders of tied images in which the image at rank
            j is in the remaining set of rank i; without ties 0 or 1. At least float32. In the row of an unscored rank
            only the diagonal is 1, so that no row is empty.
        terms: [B, K] bool, True for the ranks 1..n-1 of the n scored images: the terms of the sums in eqs. 7 and 12.
    """

    order: Tensor
    rewards: Tensor
    valid: Tensor
    remaining: Tensor
    terms: Tensor

    def sort(self, values: Tensor) -> Tensor:
        """Return ``values`` [B, K] in rank order, 0 (without gradient) for unscored images."""
        ordered = values.gather(1, self.order)
        return torch.where(self.valid, ordered, torch.zeros_like(ordered))


def scored(rewards: Tensor, mask: Tensor | None) -> Tensor:
    """Check rewards and mask, and return the mask (all True if it is None)."""
    if rewards.ndim != 2:
        raise ValueError(f"rewards must have shape [B, K], got {list(rewards.shape)}")
    valid = torch.ones_like(rewards, dtype=torch.bool) if mask is None else mask.to(rewards.device)
    if valid.dtype != torch.bool or valid.shape != rewards.shape:
        raise ValueError(f"mask must be bool of shape {list(rewards.shape)}, got {valid.dtype} {list(valid.shape)}")
    if not bool(torch.isfinite(rewards[valid]).all()):
        raise ValueError("a reward marked as scored is not finite; unscored images need mask = False")
    return valid


def rank_images(rewards: Tensor, mask: Tensor | None = None) -> Ranking:
    """Sort each group by explicit reward, descending.

    The sort is stable, but the order of images with exactly equal rewards decides nothing: at the l-th of m tied ranks,
    each of the m images remains with the share (m - l) / m, l = 0..m-1.
    """
    valid = scored(rewards, mask)
    r = as_float(rewards.detach())
    order = torch.argsort(r.masked_fill(~valid, -torch.inf), dim=1, descending=True, stable=True)
    valid, r = valid.gather(1, order), r.gather(1, order)
    square = torch.ones(r.shape[1], r.shape[1], dtype=torch.bool, device=r.device)
    both = valid[:, :, None] & valid[:, None, :]
    tied = both & (r[:, :, None] == r[:, None, :])
    share = (tied & square.triu()).sum(dim=-1) / tied.sum(dim=-1).clamp_min(1)
    remaining = torch.where(tied, share[:, :, None].to(r.dtype), (both & square.triu()).to(r.dtype))
    terms = valid.clone()
    terms[:, :-1] &= valid[:, 1:]
    terms[:, -1:] = False
    return Ranking(
        order=order,
        rewards=r.masked_fill(~valid, 0.0),
        valid=valid,
        remaining=torch.where(valid[:, :, None], remaining, torch.eye(r.shape[1], dtype=r.dtype, device=r.device)),
        terms=terms,
    )


def target_distributions(ranking: Ranking, *, tau: float) -> Tensor:
    """Return ``q_i(j, tau)`` of eq. 7: softmax of reward / tau over the remaining set of each rank i.

    ``tau = 0`` is the exact limit: all weight on the best remaining image, shared equally between exact ties. With
    ties, q_i is the mean over their orders.

    Args:
        ranking: the sorted groups.
        tau: temperature >= 0, in units of the reward.

    Returns:
        [B, K, K] in rank order, rows i, columns j; each row sums to 1.

    Raises:
        ValueError: tau is negative.
    """
    if not tau >= 0:
        raise ValueError(f"tau must be 0 or above, got {tau}")
    # Image i is the best of its remaining set, so the gaps inside it are <= 0 and the largest is exactly 0.
    gap = ranking.rewards[:, None, :] - ranking.rewards[:, :, None]
    tied = gap == 0
    if tau == 0:
        best = tied * ranking.remaining
        return best / best.sum(dim=-1, keepdim=True)
    # A tau too small for the dtype divides as 0; ties must still give 0, and absent images -inf, not nan.
    logits = (gap / tau).masked_fill(tied, 0.0).masked_fill(ranking.remaining == 0, -torch.inf)
    return (logits + ranking.remaining.log()).softmax(dim=-1)


def best_share(rewards: Tensor, mask: Tensor | None = None) -> Tensor:
    """Return the mask M of eqs. 8-9 [B, K]: 1 on the image with the highest reward, shared between exact ties.

    Each row sums to 1, or to 0 in a group without a score; at least float32. Pass ``-rewards`` for the worst image.
    """
    valid = scored(rewards, mask)
    r = as_float(rewards.detach())
    keys = r.masked_fill(~valid, -torch.inf)
    best = (valid & (keys == keys.amax(dim=1, keepdim=True))).to(r.dtype)
    return best / best.sum(dim=1, keepdim=True).clamp_min(1)


def preferences(rewards: Tensor, mask: Tensor | None = None) -> Tensor:
    """Return [B, K, K] bool, ``[b, i, j]``: both images are scored and image i has the higher reward."""
    valid = scored(rewards, mask)
    higher = rewards[:, :, None] > rewards[:, None, :]
    return higher & valid[:, :, None] & valid[:, None, :]
