"""Losses of other papers on the same groups: supervised fine-tuning, Diffusion LAIR, CRD, DGPO and DiffusionNFT.

Shapes, ``mask`` and ``tau`` are those of ``losses``, and so are the errors raised. ``sft_loss`` and ``nft_loss`` take
velocity errors in the place of implicit rewards. Of the others, only the ``lair`` target of ``regression_loss`` depends
on more than differences of ``s`` inside a group. To all but ``sft_loss``, a group with fewer than two scored images
adds 0.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor
from torch.nn.functional import softplus

from gdro_cli.core.loss_output import LossOutput, checked
from gdro_cli.core.policy import group_advantages
from gdro_cli.core.ranking import Ranking, rank_images, target_distributions

RegressionTarget = Literal["lair", "crd"]


def sft_loss(errors: Tensor, rewards: Tensor, *, tau: float, mask: Tensor | None = None) -> LossOutput:
    """Supervised fine-tuning: the velocity errors of the group's images, weighted by ``q = softmax(r / tau)``.

        L = sum_{i=1..K} q(i, tau) e_i

    At tau = 0 it fine-tunes on the best image alone; at K = 1, on demonstrations. No reference takes part.

    Args:
        errors: velocity errors of the policy [B, K].
        rewards: explicit rewards [B, K].
        tau: see ``losses``.
        mask: see ``losses``.
    """
    ranking = rank_images(rewards, mask)
    values = ranking.sort(checked(errors, rewards))
    target = target_distributions(ranking, tau=tau)[:, 0].to(values.dtype) * ranking.valid
    per_group = (target * values).sum(dim=1)
    return LossOutput(per_group.mean(), per_group, {"loss_floor": per_group.new_zeros(())})


def regression_loss(
    s: Tensor,
    rewards: Tensor,
    *,
    target: RegressionTarget = "lair",
    tau: float,
    penalty: float,
    mask: Tensor | None = None,
) -> LossOutput:
    """Regression of the implicit rewards onto targets made of the rewards, with n scored images and lambda = penalty.

    "lair", Diffusion LAIR (arXiv 2605.26491), has its minimum at ``s_i = a_i / lambda``:

        L = sum_i ( lambda / 2 s_i^2 - a_i s_i )        a = softmax(r / tau) - 1 / n

    "crd", Centered Reward Distillation (arXiv 2603.14128), at ``s_i = A_i / lambda`` + constant:

        L = 1 / n sum_i ( s_i - mean s - A_i / lambda )^2        A = (r - mean r) / std r, divisor n

    Args:
        s: implicit rewards [B, K].
        rewards: explicit rewards [B, K].
        target: "lair" or "crd".
        tau: see ``losses``; "crd" has none.
        penalty: lambda, above 0.
        mask: see ``losses``.
    """
    ranking = rank_images(rewards, mask)
    values = ranking.sort(checked(s, rewards))
    count = _counts(ranking).to(values.dtype)
    if target == "lair":
        q = target_distributions(ranking, tau=tau)[:, 0].to(values.dtype)
        wanted = torch.where(ranking.valid, q - 1 / count, 0.0)
        per_group = (penalty / 2 * values.square() - wanted * values).sum(dim=1)
        floor = -wanted.square().sum(dim=1) / (2 * penalty)
    elif target == "crd":
        centred = torch.where(ranking.valid, values - values.sum(dim=1, keepdim=True) / count, 0.0)
        per_group = (centred - _advantages(ranking).to(values.dtype) / penalty).square().sum(dim=1) / count.squeeze(1)
        floor = torch.zeros_like(per_group)
    else:
        raise ValueError(f"target must be 'lair' or 'crd', got {target!r}")
    per_group, floor = per_group * ranking.terms[:, 0], floor * ranking.terms[:, 0]
    return LossOutput(per_group.mean(), per_group, {"loss_floor": floor.mean().detach()})


def dgpo_loss(s: Tensor, rewards: Tensor, *, mask: Tensor | None = None) -> LossOutput:
    """DGPO (arXiv 2510.08425): the images above the group's mean reward against those below, weighted by advantage.

        L = -log sigmoid( 1 / n sum_i A_i s_i )        A = (r - mean r) / std r, divisor n

    over the n scored images. With K = 2, A is +1 and -1: DPO at half the margin. A group of equal rewards adds 0.
    """
    ranking = rank_images(rewards, mask)
    values = ranking.sort(checked(s, rewards))
    advantages = _advantages(ranking).to(values.dtype)
    margin = (advantages * values).sum(dim=1) / _counts(ranking).squeeze(1)
    per_group = softplus(-margin) * advantages.any(dim=1)
    return LossOutput(per_group.mean(), per_group, {"loss_floor": per_group.new_zeros(())})


def nft_loss(
    errors: Tensor,
    reference_errors: Tensor,
    deviations: Tensor,
    rewards: Tensor,
    *,
    mixing: float,
    advantage_clip: float,
    mask: Tensor | None = None,
) -> LossOutput:
    """DiffusionNFT (arXiv 2509.16117): a good image pulls the policy's velocity towards it, a bad one a mirrored one.

        L = 1 / n sum_i ( p_i ||v+ - v||^2 + (1 - p_i) ||v- - v||^2 )        v+- = (1 -+ b) v_ref +- b v_theta

    over the n scored images, with ``b = mixing`` and the probability ``p = (1 + clip(A / advantage_clip, -1, 1)) / 2``
    that the image is a good one, A as in ``dgpo_loss``. Both distances follow from three scalars of an image: with
    ``d = v_theta - v_ref`` and ``t = v - v_ref``, ``||v+- - v||^2 = ||t||^2 -+ 2 b <t, d> + b^2 ||d||^2`` and
    ``e_theta = ||t||^2 - 2 <t, d> + ||d||^2``.

    Args:
        errors: velocity errors of the policy e_theta [B, K].
        reference_errors: those of the reference ||t||^2 [B, K].
        deviations: ||d||^2 [B, K], reduced over the latent's dimensions as the errors are.
        rewards: explicit rewards [B, K].
        mixing: b, above 0.
        advantage_clip: the advantage at which p is 1, above 0.
        mask: see ``losses``.
    """
    ranking = rank_images(rewards, mask)
    own, reference, apart = (ranking.sort(checked(each, rewards)) for each in (errors, reference_errors, deviations))
    good = (1 + (_advantages(ranking).to(own.dtype) / advantage_clip).clamp(-1, 1)) / 2
    along = mixing * (own - reference - apart)  # -2 b <t, d>
    around = reference + mixing**2 * apart
    per_image = good * (around + along) + (1 - good) * (around - along)
    lowest = 4 * good * (1 - good) * reference  # at b d = (2 p - 1) t
    share = ranking.valid * ranking.terms[:, :1] / _counts(ranking)
    per_group = (share * per_image).sum(dim=1)
    return LossOutput(per_group.mean(), per_group, {"loss_floor": (share * lowest).sum(dim=1).mean().detach()})


def _counts(ranking: Ranking) -> Tensor:
    """Number of scored images [B, 1], at least 1."""
    return ranking.valid.sum(dim=1, keepdim=True).clamp_min(1)


def _advantages(ranking: Ranking) -> Tensor:
    """``(r - mean r) / std r`` of a group's scored images, divisor n: [B, K] in rank order, 0 for equal rewards."""
    rewards = ranking.rewards.masked_fill(~ranking.valid, torch.nan)
    return group_advantages(rewards, scale="group", clip=torch.inf, floor=0.0)
