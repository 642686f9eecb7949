"""Advantages and the clipped surrogate, by hand and in their limits."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gdro_cli.core.policy import clipped_surrogate, group_advantages, group_std
from gdro_cli.core.sde import SdeStep, log_prob

NAN = math.nan


def test_advantages_by_hand() -> None:
    """Group 1: mean 0.5, std 0.5. Group 2: mean 0.5, std 0. All: mean 0.5, std sqrt(0.5 / 4) = 0.353553."""
    rewards = torch.tensor([[0.0, 1.0], [0.5, 0.5]])
    own = group_advantages(rewards, scale="group", clip=5)
    assert own.tolist() == [pytest.approx([-0.5 / 0.5001, 0.5 / 0.5001]), [0.0, 0.0]]
    whole = group_advantages(rewards, scale="global", clip=5)
    assert whole.tolist() == [pytest.approx([-0.5 / 0.3536534, 0.5 / 0.3536534]), [0.0, 0.0]]


def test_a_missing_reward_is_as_good_as_absent() -> None:
    rewards = torch.tensor([[0.2, NAN, 0.8], [NAN, 0.9, 0.1]])
    present = torch.tensor([[0.2, 0.8], [0.9, 0.1]])
    for scale in ("global", "group"):
        advantages = group_advantages(rewards, scale=scale, clip=5)  # type: ignore[arg-type]
        assert advantages[rewards.isnan()].tolist() == [0.0, 0.0]
        expected = group_advantages(present, scale=scale, clip=5)  # type: ignore[arg-type]
        torch.testing.assert_close(advantages[~rewards.isnan()], expected.flatten())


@pytest.mark.parametrize("scale", ["global", "group"])
def test_groups_without_a_preference_get_exactly_zero(scale: str) -> None:
    """The mean of seven times 0.1 is not 0.1 in floating point."""
    rewards = torch.tensor([[0.1] * 7, [NAN] * 6 + [0.4], [NAN] * 7, [0.0] * 6 + [1.0]])
    advantages = group_advantages(rewards, scale=scale, clip=5)  # type: ignore[arg-type]
    assert advantages[:3].abs().max().item() == 0
    assert (advantages[3] != 0).all()


def test_advantages_are_clipped() -> None:
    """One of 101 rewards differs: (1 - 1/101) / std is close to 10."""
    rewards = torch.tensor([[1.0] + [0.0] * 100])
    assert group_advantages(rewards, scale="group", clip=100)[0, 0].item() == pytest.approx(10, rel=0.01)
    assert group_advantages(rewards, scale="group", clip=5)[0, 0].item() == 5


def test_an_infinite_reward_is_refused() -> None:
    with pytest.raises(ValueError, match="infinite"):
        group_advantages(torch.tensor([[math.inf, 0.0]]), scale="group", clip=5)


@given(
    st.lists(st.lists(st.floats(0, 1, width=32), min_size=4, max_size=4), min_size=1, max_size=4),
    st.sampled_from(["global", "group"]),
    st.floats(-3, 3),
)
@settings(max_examples=50, deadline=None)
def test_advantages_of_a_group_cancel_and_a_shift_changes_nothing(
    rows: list[list[float]], scale: str, shift: float
) -> None:
    rewards = torch.tensor(rows, dtype=torch.float64)
    advantages = group_advantages(rewards, scale=scale, clip=1e9)  # type: ignore[arg-type]
    assert advantages.sum(dim=1).abs().max().item() < 1e-3
    torch.testing.assert_close(
        group_advantages(rewards + shift, scale=scale, clip=1e9), advantages, atol=1e-4, rtol=1e-4
    )  # type: ignore[arg-type]


def test_group_std_by_hand() -> None:
    std = group_std(torch.tensor([[0.0, 1.0, NAN], [NAN, NAN, NAN]]))
    assert std[0].item() == 0.5
    assert std[1].isnan()


def test_surrogate_by_hand() -> None:
    """Ratios 1.2 and 0.5 with clip 0.1; max picks the clipped one where that is worse for the objective.

    A = +1: max(-1.2, -1.1) = -1.1; max(-0.5, -0.9) = -0.5. A = -1: max(1.2, 1.1) = 1.2; max(0.5, 0.9) = 0.9.
    """
    new = torch.tensor([1.2, 0.5, 1.2, 0.5, 1.05]).log()
    surrogate = clipped_surrogate(new, torch.zeros(5), torch.tensor([1.0, 1, -1, -1, 2]), clip_range=0.1)
    assert surrogate.loss.tolist() == pytest.approx([-1.1, -0.5, 1.2, 0.9, -2.1])
    assert surrogate.ratio.tolist() == pytest.approx([1.2, 0.5, 1.2, 0.5, 1.05])
    assert surrogate.clipped.tolist() == [True, True, True, True, False]


def test_nothing_is_learnt_from_a_clipped_gain() -> None:
    new = torch.tensor([1.2, 0.8, 1.2, 0.8]).log().requires_grad_()
    clipped_surrogate(new, torch.zeros(4), torch.tensor([1.0, -1, -1, 1]), clip_range=0.1).loss.sum().backward()
    assert new.grad is not None
    assert (new.grad != 0).tolist() == [False, False, True, True]


def test_before_the_first_update_it_is_the_policy_gradient() -> None:
    """Same weights: the ratio is exactly 1, nothing is clipped, and the gradient is that of -A log p."""
    stream = torch.Generator().manual_seed(0)
    weight = torch.randn(3, 8, generator=stream, requires_grad=True)
    drawn, advantage, std = torch.randn(3, 8, generator=stream), torch.tensor([1.5, -0.5, 0.2]), torch.full((3,), 0.3)
    old = log_prob(drawn, SdeStep(weight, std, std)).detach()
    new = log_prob(drawn, SdeStep(weight, std, std))
    surrogate = clipped_surrogate(new, old, advantage, clip_range=1e-4)
    assert surrogate.ratio.tolist() == [1.0] * 3
    assert not surrogate.clipped.any()
    (by_surrogate,) = torch.autograd.grad(surrogate.loss.sum(), weight, retain_graph=True)
    (by_log_prob,) = torch.autograd.grad(-(advantage * new).sum(), weight)
    assert torch.equal(by_surrogate, by_log_prob)


def test_shapes_must_agree() -> None:
    with pytest.raises(ValueError, match="share one shape"):
        clipped_surrogate(torch.zeros(2), torch.zeros(2), torch.zeros(1), clip_range=0.1)
