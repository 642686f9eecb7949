"""What to watch beside the loss: does the policy order the images as the rewards do, and at what price?

The GDRO paper diagnoses collapse by the likelihood of the best image. If the score rises while the policy's error on
its best images climbs above the reference's (``top1_error_gap`` > 0), the policy gains the score by unlearning.
"""

from __future__ import annotations

import torch
from torch import Tensor

from gdro_cli.core.flow import as_float
from gdro_cli.core.ranking import Ranking, best_share, preferences, rank_images, target_distributions


def _mean_where(values: Tensor, where: Tensor) -> Tensor:
    """Mean of ``values`` where ``where`` is True; nan if it is False everywhere."""
    return torch.where(where, values, torch.zeros_like(values)).sum() / where.sum()


def _pair_accuracy(s: Tensor, rewards: Tensor, mask: Tensor | None) -> Tensor:
    """Share of the pairs with different rewards that s orders the same way; a pair with equal s counts half."""
    agreement = 0.5 * (1.0 + torch.sign(s[:, :, None] - s[:, None, :]))
    return _mean_where(agreement, preferences(rewards, mask))


def _share_mean(values: Tensor, share: Tensor) -> Tensor:
    """Mean, over the groups with a score, of the ``share``-weighted sum of ``values``."""
    inside = share > 0
    per_group = (share * torch.where(inside, values, torch.zeros_like(values))).sum(dim=1)
    return _mean_where(per_group, inside.any(dim=1))


def _entropies(s: Tensor, ranking: Ranking, *, tau: float) -> tuple[Tensor, Tensor]:
    """Mean entropy in nats of the policy's and the rewards' distribution over a whole group."""
    logits = ranking.sort(s).masked_fill(ranking.remaining[:, 0] == 0, -torch.inf)
    policy = torch.special.entr(logits.softmax(dim=-1)).sum(dim=-1)
    target = torch.special.entr(target_distributions(ranking, tau=tau)[:, 0]).sum(dim=-1)
    present = ranking.valid[:, 0]
    return _mean_where(policy, present), _mean_where(target, present)


@torch.no_grad()
def group_metrics(
    s: Tensor,
    errors: Tensor,
    reference_errors: Tensor,
    rewards: Tensor,
    mask: Tensor | None = None,
    *,
    tau: float,
) -> dict[str, Tensor]:
    """Return the diagnostics of B groups as detached scalars, nan for a metric with nothing to average.

    Arguments are those of ``losses.group_loss``, all [B, K]; ``s`` are the implicit rewards.

    Returns:
        - ``implicit_accuracy``: share of the pairs with different rewards that s orders as the rewards do, over all
          groups together; a pair with equal s counts half, so an untrained policy has 0.5.
        - ``s_rank_1`` ... ``s_rank_K``: mean s of the best, second, ... image.
        - ``top1_error_gap``, ``bottom1_error_gap``: error minus reference error of the best and of the worst image
          (ties share), mean over groups; below 0 the policy explains the image better than the reference.
        - ``entropy_p``, ``entropy_q``: entropy in nats of P_theta = softmax(s) and of Q = softmax(r / tau) over the
          group.

    Raises:
        ValueError: shapes differ, tau is negative, or a scored reward is not finite.
    """
    if not s.shape == errors.shape == reference_errors.shape == rewards.shape:
        raise ValueError("s, errors, reference_errors and rewards must share one shape [B, K]")
    values = as_float(s.detach())
    gap = as_float(errors.detach()) - as_float(reference_errors.detach())
    ranking = rank_images(rewards, mask)
    by_rank = ranking.sort(values)
    entropy_p, entropy_q = _entropies(values, ranking, tau=tau)
    metrics = {
        "implicit_accuracy": _pair_accuracy(values, rewards, mask),
        "top1_error_gap": _share_mean(gap, best_share(rewards, mask)),
        "bottom1_error_gap": _share_mean(gap, best_share(-rewards, mask)),
        "entropy_p": entropy_p,
        "entropy_q": entropy_q,
    }
    for rank in range(rewards.shape[1]):
        metrics[f"s_rank_{rank + 1}"] = _mean_where(by_rank[:, rank], ranking.valid[:, rank])
    return metrics
