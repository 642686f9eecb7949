"""Ranks, remaining sets and targets of a group."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch

from gdro_cli.core.ranking import best_share, preferences, rank_images, target_distributions

# Image 2 is unscored; images 0 and 3 are tied.
REWARDS = torch.tensor([[0.5, 1.0, torch.nan, 0.5]])
MASK = torch.tensor([[True, True, False, True]])


def test_ranks_by_hand() -> None:
    ranking = rank_images(REWARDS, MASK)
    assert ranking.order.tolist() == [[1, 0, 3, 2]]
    assert ranking.rewards.tolist() == [[1.0, 0.5, 0.5, 0.0]]
    assert ranking.valid.tolist() == [[True, True, True, False]]
    assert ranking.terms.tolist() == [[True, True, False, False]]
    assert ranking.remaining[0].tolist() == [[1, 1, 1, 0], [0, 1, 1, 0], [0, 0.5, 0.5, 0], [0, 0, 0, 1]]


def test_last_rank_has_no_term() -> None:
    """K images have K - 1 terms: a set of one image has no preference."""
    assert rank_images(torch.rand(2, 3)).terms.tolist() == [[True, True, False]] * 2
    assert rank_images(torch.rand(1, 1)).terms.tolist() == [[False]]


def test_sort_replaces_unscored_values() -> None:
    values = torch.tensor([[10.0, 11.0, torch.inf, 13.0]])
    assert rank_images(REWARDS, MASK).sort(values).tolist() == [[11.0, 10.0, 13.0, 0.0]]


def test_targets_at_tau_zero_by_hand() -> None:
    """Rank 1 is one-hot, rank 2 shares between the tied pair."""
    q = target_distributions(rank_images(REWARDS, MASK), tau=0.0)
    assert q[0, :2].tolist() == [[1.0, 0.0, 0.0, 0.0], [0.0, 0.5, 0.5, 0.0]]


def test_targets_by_hand() -> None:
    """tau = 0.5 / ln 4: the weights of rewards 1, 0.5, 0.5 are 4 : 1 : 1."""
    q = target_distributions(rank_images(REWARDS, MASK), tau=0.5 / torch.log(torch.tensor(4.0)).item())
    torch.testing.assert_close(q[0, 0], torch.tensor([4 / 6, 1 / 6, 1 / 6, 0.0]))
    torch.testing.assert_close(q[0, 1], torch.tensor([0.0, 0.5, 0.5, 0.0]))


def test_targets_sum_to_one_and_sharpen() -> None:
    ranking = rank_images(torch.rand(5, 6, generator=torch.Generator().manual_seed(0)))
    best = []
    for tau in (0.5, 0.05, 0.025, 0.0):
        q = target_distributions(ranking, tau=tau)
        torch.testing.assert_close(q.sum(dim=-1), torch.ones(5, 6))
        assert not q.tril(-1).any()
        best.append(q[:, 0, 0])
    assert all((sharper >= softer).all() for softer, sharper in pairwise(best))
    assert (best[0] < best[-1]).all()


def test_best_share() -> None:
    assert best_share(REWARDS, MASK).tolist() == [[0.0, 1.0, 0.0, 0.0]]
    assert best_share(-REWARDS, MASK).tolist() == [[0.5, 0.0, 0.0, 0.5]]
    assert best_share(REWARDS, torch.zeros_like(MASK)).tolist() == [[0.0] * 4]


def test_preferences() -> None:
    assert preferences(REWARDS, MASK)[0].nonzero().tolist() == [[1, 0], [1, 3]]


def test_wrong_arguments() -> None:
    with pytest.raises(ValueError, match="not finite"):
        rank_images(REWARDS)
    with pytest.raises(ValueError, match="shape"):
        rank_images(REWARDS[0])
    with pytest.raises(ValueError, match="mask"):
        rank_images(REWARDS, MASK[:, :3])
    with pytest.raises(ValueError, match="tau"):
        target_distributions(rank_images(REWARDS, MASK), tau=float("nan"))
