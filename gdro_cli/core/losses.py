"""The group losses of the GDRO paper, the top-1 stabilisation, and the whole loss of any method on stored groups.

Source: the GDRO paper (arXiv 2601.02036) and its supplement (eqs. 13-19): GDRO, its rank and top-1 forms, and DPO.
``other_losses`` has those of other papers. Every loss takes the implicit rewards ``s`` and the explicit rewards ``r``
of B groups of K images, both [B, K] in any order inside a group, and returns a ``LossOutput``. Those of this module
depend only on differences of ``s`` inside a group. To them, a group with fewer than two scored images adds 0.

Common arguments: ``mask`` is [B, K] bool, True = scored, None = all scored. An unscored image adds no loss and no
gradient, whatever its values. ``tau`` is the temperature of the target distribution, >= 0, in units of the reward; 0 is
the exact limit (all weight on the best remaining image, shared equally between exact ties). Every function raises
ValueError if shapes do not fit, tau is negative, or a scored reward is not finite.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn.functional import softplus

from gdro_cli.core.diagnostics import group_metrics
from gdro_cli.core.flow import as_float
from gdro_cli.core.implicit import implicit_reward
from gdro_cli.core.loss_output import LossOutput, checked
from gdro_cli.core.other_losses import dgpo_loss, nft_loss, regression_loss, sft_loss
from gdro_cli.core.ranking import Ranking, best_share, preferences, rank_images, target_distributions

Pairs = Literal["best_worst", "all"]


def _cross_entropies(s: Tensor, ranking: Ranking, target: Tensor, *, terms: Tensor) -> LossOutput:
    """Sum over ranks of ``logsumexp(s over the remaining set) - sum_j q_i(j) s_j``.

    With ties, the second term is its mean over the orders of tied images, and the first the logarithm of the mean
    partition (Efron). That is at least the mean over the orders, by Jensen's inequality, and equal to it, as is the
    gradient, where tied images have equal s, which is what their target asks for.

    Args:
        s: implicit rewards [B, K] in the order of the caller.
        ranking: the sorted groups.
        target: q [B, K, K] in rank order.
        terms: [B, K] bool, the ranks i that count.
    """
    s = checked(s, ranking.rewards)
    columns = ranking.sort(s)[:, None, :]
    share = ranking.remaining.to(s.dtype)
    # No set is empty and all its members are finite, so -inf outside adds exact zeros and no nan in backward.
    log_partition = (columns + share.log()).logsumexp(dim=-1)
    expected = (target.to(s.dtype) * columns).sum(dim=-1)
    per_group = ((log_partition - expected) * terms).sum(dim=1)
    floor = torch.special.entr(target) + torch.xlogy(target, ranking.remaining)
    return LossOutput(per_group.mean(), per_group, {"loss_floor": (floor.sum(dim=-1) * terms).sum(dim=1).mean()})


def gdro_loss(s: Tensor, rewards: Tensor, *, tau: float, mask: Tensor | None = None) -> LossOutput:
    """GDRO (eqs. 7 and 17): match the distribution of the rewards on every remaining set of the ranking.

    With the images sorted by explicit reward, best first,

        L = sum_{i=1..K-1} ( logsumexp_{m=i..K} s_m - sum_{j=i..K} q_i(j, tau) s_j )

    where ``q_i = softmax(r_i..r_K / tau)``.
    """
    ranking = rank_images(rewards, mask)
    return _cross_entropies(s, ranking, target_distributions(ranking, tau=tau), terms=ranking.terms)


def rank_loss(s: Tensor, rewards: Tensor, *, mask: Tensor | None = None) -> LossOutput:
    """Rank (eq. 12): negative Plackett-Luce log-likelihood of the order of the rewards.

        L = sum_{i=1..K-1} ( logsumexp_{m=i..K} s_m - s_i )

    Equal to ``gdro_loss`` at tau = 0, tied images included.
    """
    return gdro_loss(s, rewards, tau=0.0, mask=mask)


def top1_loss(s: Tensor, rewards: Tensor, *, tau: float, mask: Tensor | None = None) -> LossOutput:
    """Top-1 (eq. 6): the first term of GDRO alone, the cross-entropy over the whole group.

    L = logsumexp_{m=1..K} s_m - sum_{j=1..K} q_1(j, tau) s_j
    """
    ranking = rank_images(rewards, mask)
    first = torch.zeros_like(ranking.terms)
    first[:, 0] = ranking.terms[:, 0]
    return _cross_entropies(s, ranking, target_distributions(ranking, tau=tau), terms=first)


def dpo_loss(s: Tensor, rewards: Tensor, *, pairs: Pairs = "best_worst", mask: Tensor | None = None) -> LossOutput:
    """DPO (eqs. 18-19): ``-log sigmoid(s_winner - s_loser)``, mean over the pairs of a group.

    Diffusion-DPO is arXiv 2311.12908. Equal to ``gdro_loss`` with K = 2 and tau = 0. Equal rewards make no pair, so a
    group of equal rewards adds 0.

    ``pairs``: "best_worst" takes the best and the worst image of each group (exact ties share equally), "all" takes
    every pair with different rewards.
    """
    values = checked(s, rewards)
    preferred = preferences(rewards, mask)
    if pairs == "best_worst":
        best, worst = best_share(rewards, mask), best_share(-rewards, mask)
        weights = best[:, :, None] * worst[:, None, :] * preferred
    elif pairs == "all":
        weights = preferred.to(values.dtype)
        weights = weights / weights.sum(dim=(1, 2), keepdim=True).clamp_min(1)
    else:
        raise ValueError(f"pairs must be 'best_worst' or 'all', got {pairs!r}")
    margin = values[:, :, None] - values[:, None, :]
    margin = torch.where(preferred, margin, torch.zeros_like(margin))
    per_group = (softplus(-margin) * weights.to(values.dtype)).sum(dim=(1, 2))
    return LossOutput(per_group.mean(), per_group, {"loss_floor": per_group.new_zeros(())})


def top1_stabiliser(errors: Tensor, rewards: Tensor, mask: Tensor | None = None) -> Tensor:
    """Top-1 likelihood stabilisation (eqs. 8-9): the velocity error of the image with the highest reward.

    Without it the implicit reward of the best image can rise while its likelihood falls, as long as the others fall
    faster. ``L_final = L_method + gamma * e_theta(best image)`` prevents that. Exact ties share equally.

    Args:
        errors: velocity errors of the policy [B, K].
        rewards: explicit rewards [B, K].
        mask: see the module.

    Returns:
        [B], at least float32; 0 for a group without a score.
    """
    values = checked(errors, rewards)
    share = best_share(rewards, mask).to(values.dtype)
    return (share * torch.where(share > 0, values, torch.zeros_like(values))).sum(dim=1)


GroupLoss = Callable[..., LossOutput]
"""A method's loss: ``loss(s, rewards, *, mask=None, ...)``, s and rewards [B, K], with settings of its own."""

LOSSES: Mapping[str, GroupLoss] = {
    "gdro": gdro_loss,
    "rank": rank_loss,
    "top1": top1_loss,
    "dpo": dpo_loss,
    "regression": regression_loss,
    "dgpo": dgpo_loss,
}
"""The losses of implicit rewards by ``method.name``."""

ERROR_LOSSES: Mapping[str, GroupLoss] = {"sft": sft_loss}
"""The losses of the velocity errors themselves, which take the place of s."""

DEVIATION_LOSSES: Mapping[str, GroupLoss] = {"nft": nft_loss}
"""The losses of the errors, the reference's errors, and the deviations of the policy's velocity from the reference's:
``loss(errors, reference_errors, deviations, rewards, *, mask=None, ...)``, all [B, K]."""


@dataclass(frozen=True, slots=True)
class _Parts:
    """What a training loss is the sum of."""

    s: Tensor
    method: LossOutput
    own: Tensor
    """[B] of the method, times the weights of the groups."""
    stabiliser: Tensor
    """[B] of the stabilisation, gamma included, times the weights of the groups."""


def _parts(
    method: str,
    errors: Tensor,
    reference_errors: Tensor,
    rewards: Tensor,
    mask: Tensor | None,
    *,
    beta: float,
    gamma: float,
    deviations: Tensor | None,
    weights: Tensor | None,
    settings: Mapping[str, Any],
) -> _Parts:
    s = implicit_reward(errors, reference_errors, beta=beta)
    if method in DEVIATION_LOSSES:
        if deviations is None:
            raise TypeError(f"the loss {method!r} needs deviations")
        loss = DEVIATION_LOSSES[method]
        output = loss(errors, reference_errors.detach(), deviations, rewards, mask=mask, **settings)
    elif method in ERROR_LOSSES:
        output = ERROR_LOSSES[method](errors, rewards, mask=mask, **settings)
    else:
        output = LOSSES[method](s, rewards, mask=mask, **settings)
    stabiliser = gamma * top1_stabiliser(errors, rewards, mask)
    of_group = 1.0 if weights is None else weights.to(output.per_group.dtype)
    return _Parts(s, output, output.per_group * of_group, stabiliser * of_group)


def group_loss(
    method: str,
    errors: Tensor,
    reference_errors: Tensor,
    rewards: Tensor,
    mask: Tensor | None = None,
    *,
    beta: float,
    gamma: float,
    deviations: Tensor | None = None,
    weights: Tensor | None = None,
    **settings: Any,
) -> LossOutput:
    """Return the whole training loss (eqs. 8-9): ``L_final = L_method(s) + gamma * e_theta(best image)``.

    Args:
        method: a key of ``LOSSES``, ``ERROR_LOSSES`` or ``DEVIATION_LOSSES``.
        errors: velocity errors of the policy [B, K]; the gradient flows into these.
        reference_errors: velocity errors of the reference on the same latents, sigma and noise [B, K].
        rewards: explicit rewards [B, K].
        mask: see the module.
        beta: strength of the implicit reward, in 1 / unit of the errors.
        gamma: weight of the top-1 stabilisation, >= 0, in 1 / unit of the errors.
        deviations: squared distances of the policy's velocity from the reference's [B, K], reduced as the errors are;
            the gradient flows into these as well. Only for the losses that take them.
        weights: [B] weights of the groups, >= 0; None: all 1.
        settings: settings of the method's loss, such as ``tau`` or ``pairs``.

    Returns:
        The loss. Its metrics are those of the method, those of ``diagnostics.group_metrics``, and ``loss_method`` and
        ``loss_stabiliser`` (gamma included), which add up to the loss.

    Raises:
        KeyError: the method is unknown.
        TypeError: the method's loss takes other settings, or needs deviations.
    """
    parts = _parts(
        method,
        errors,
        reference_errors,
        rewards,
        mask,
        beta=beta,
        gamma=gamma,
        deviations=deviations,
        weights=weights,
        settings=settings,
    )
    per_group = parts.own + parts.stabiliser
    metrics = group_metrics(parts.s, errors, reference_errors, rewards, mask, tau=settings.get("tau", 0.0))
    metrics |= parts.method.metrics
    metrics["loss_method"] = parts.own.detach().mean()
    metrics["loss_stabiliser"] = parts.stabiliser.detach().mean()
    return LossOutput(per_group.mean(), per_group, metrics)


def image_weights(
    method: str,
    errors: Tensor,
    reference_errors: Tensor,
    rewards: Tensor,
    mask: Tensor | None = None,
    *,
    beta: float,
    gamma: float,
    deviations: Tensor | None = None,
    weights: Tensor | None = None,
    **settings: Any,
) -> Tensor:
    """Return ``w = d loss / d errors`` of ``group_loss``, the weights of the two-pass gradient.

    Pass 1 computes all errors of the group without gradient, in micro-batches of any size. Pass 2 runs the images
    again, in micro-batches, and goes backward through ``sum(w * errors)``. By the chain rule this gives the gradient of
    the loss itself, to rounding, and memory does not grow with K. The mean over the B groups is already in ``w``.

    Works under ``torch.no_grad`` and ``torch.inference_mode``. Arguments and errors as for ``group_loss``.

    Returns:
        [B, K], or with deviations [2, B, K]: the errors' weights, then the deviations'. At least float32, detached; 0
        for unscored images.
    """
    given = [errors] if deviations is None else [errors, deviations]
    with torch.inference_mode(False), torch.enable_grad():
        leaves = [as_float(each.detach()).clone().requires_grad_(True) for each in given]
        parts = _parts(
            method,
            leaves[0],
            reference_errors.detach().clone(),
            rewards.detach().clone(),
            None if mask is None else mask.clone(),
            beta=beta,
            gamma=gamma,
            deviations=leaves[1] if len(leaves) > 1 else None,
            weights=None if weights is None else weights.clone(),
            settings=settings,
        )
        of_images = torch.autograd.grad((parts.own + parts.stabiliser).mean(), leaves)
    return of_images[0] if deviations is None else torch.stack(of_images)
