"""Order and share inside a group: explicit rewards made into ranks, remaining sets and targets.

"Remaining set" of rank i: the images i..K after sorting by reward, best first. Images without a score (mask
False) are in no set: they are sorted last and whatever stands in their place, even nan, is replaced before
it meets arithmetic.
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
        rewards: [B, K] rewards in that order; 0 in the place of an unscored image.
        valid: [B, K] bool, True where the rank holds a scored image.
        remaining: [B, K, K] bool, ``remaining[b, i, j]``: the image at rank j is in the remaining set of
            rank i. In a row whose own rank is unscored only the diagonal is True, so that no row is empty.
        terms: [B, K] bool, True for the ranks 1..n-1 of the n scored images: the terms of the sums in eqs.
            7 and 12.
    """

    order: Tensor
    rewards: Tensor
    valid: Tensor
    remaining: Tensor
    terms: Tensor

    def sort(self, values: Tensor) -> Tensor:
        """Return ``values`` [B, K] in rank order, 0 (without gradient) in the places of unscored images."""
        ordered = values.gather(1, self.order)
        return torch.where(self.valid, ordered, torch.zeros_like(ordered))


def scored(rewards: Tensor, mask: Tensor | None) -> Tensor:
    """Check rewards [B, K] and mask, and return the mask (all True when there is none).

    Raises:
        ValueError: wrong shape or dtype, or a scored reward that is not finite.
    """
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

    The sort is stable: images with exactly equal rewards keep their order in the group. Data sets draw the
    images of a group in random order, so that no image is favoured.

    Args:
        rewards: explicit rewards [B, K].
        mask: [B, K] bool, True = scored; None = all scored.

    Raises:
        ValueError: as in ``scored``.
    """
    valid = scored(rewards, mask)
    r = as_float(rewards.detach())
    keys = torch.where(valid, r, torch.full_like(r, -torch.inf))
    order = torch.argsort(keys, dim=1, descending=True, stable=True)
    valid = valid.gather(1, order)
    r = r.gather(1, order)
    size = r.shape[1]
    square = torch.ones(size, size, dtype=torch.bool, device=r.device)
    inside = square.triu() & valid[:, :, None] & valid[:, None, :]
    terms = valid.clone()
    terms[:, :-1] &= valid[:, 1:]
    terms[:, -1:] = False
    return Ranking(
        order=order,
        rewards=torch.where(valid, r, torch.zeros_like(r)),
        valid=valid,
        remaining=inside | torch.eye(size, dtype=torch.bool, device=r.device),
        terms=terms,
    )


def target_distributions(ranking: Ranking, *, tau: float) -> Tensor:
    """Return ``q_i(j, tau)`` of eq. 7: softmax of reward / tau over the remaining set of each rank i.

    ``tau = 0`` is the exact limit: all weight on the best remaining image, shared equally between exact ties.

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
    # Image i is the best of its remaining set, so inside it the gaps are <= 0 and the largest is exactly 0.
    gap = ranking.rewards[:, None, :] - ranking.rewards[:, :, None]
    tied = gap == 0
    if tau == 0:
        best = (tied & ranking.remaining).to(gap.dtype)
        return best / best.sum(dim=-1, keepdim=True)
    # A tau too small for the dtype divides as 0; ties must still come out as 0 and not as nan.
    logits = torch.where(tied, torch.zeros_like(gap), gap / tau)
    return logits.masked_fill(~ranking.remaining, -torch.inf).softmax(dim=-1)


def best_share(rewards: Tensor, mask: Tensor | None = None) -> Tensor:
    """Return the mask M of eqs. 8-9: 1 on the image with the highest reward, shared between exact ties.

    Args:
        rewards: [B, K]; pass ``-rewards`` for the worst image.
        mask: [B, K] bool, True = scored; None = all scored.

    Returns:
        [B, K], at least float32; each row sums to 1, or to 0 in a group without any score.

    Raises:
        ValueError: as in ``scored``.
    """
    valid = scored(rewards, mask)
    r = as_float(rewards.detach())
    keys = torch.where(valid, r, torch.full_like(r, -torch.inf))
    best = (valid & (keys == keys.amax(dim=1, keepdim=True))).to(r.dtype)
    return best / best.sum(dim=1, keepdim=True).clamp_min(1)


def preferences(rewards: Tensor, mask: Tensor | None = None) -> Tensor:
    """Return which image is preferred to which.

    Args:
        rewards: [B, K].
        mask: [B, K] bool, True = scored; None = all scored.

    Returns:
        [B, K, K] bool, ``[b, i, j]``: both images are scored and image i has the higher reward.

    Raises:
        ValueError: as in ``scored``.
    """
    valid = scored(rewards, mask)
    higher = rewards[:, :, None] > rewards[:, None, :]
    return higher & valid[:, :, None] & valid[:, None, :]
