"""The implicit reward and its unit."""

from __future__ import annotations

import pytest
import torch

from gdro_cli.core.flow import velocity_error
from gdro_cli.core.implicit import equivalent_beta, implicit_reward


def test_implicit_reward_by_hand() -> None:
    """beta = 12: an error 0.25 below the reference's gives +3, 0.5 above gives -6."""
    s = implicit_reward(torch.tensor([[0.75, 1.5]]), torch.tensor([[1.0, 1.0]]), beta=12.0)
    assert s.tolist() == [[3.0, -6.0]]


def test_policy_equal_to_reference_has_no_implicit_reward() -> None:
    e = torch.rand(2, 3)
    assert not implicit_reward(e, e, beta=12.0).any()


def test_only_the_policy_gets_a_gradient() -> None:
    """ds/de = -beta."""
    error, reference = torch.ones(2, requires_grad=True), torch.ones(2, requires_grad=True)
    implicit_reward(error, reference, beta=3.0).sum().backward()
    assert error.grad is not None
    assert error.grad.tolist() == [-3.0, -3.0]
    assert reference.grad is None


def test_equivalent_beta_keeps_the_implicit_reward() -> None:
    """FLUX at 512 px has 65,536 dims: beta 12 on the mean is 12 / 65536 on the sum."""
    assert equivalent_beta(12.0, latent_dims=65536, given="mean", wanted="sum") == 12 / 65536
    assert equivalent_beta(12 / 65536, latent_dims=65536, given="sum", wanted="mean") == 12.0
    assert equivalent_beta(12.0, latent_dims=65536, given="sum", wanted="sum") == 12.0
    v, reference, target = torch.randn(3, 4, 10, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    by_sum = equivalent_beta(6.0, latent_dims=10, given="mean", wanted="sum")
    torch.testing.assert_close(
        implicit_reward(velocity_error(v, target), velocity_error(reference, target), beta=6.0),
        implicit_reward(
            velocity_error(v, target, reduction="sum"),
            velocity_error(reference, target, reduction="sum"),
            beta=by_sum,
        ),
    )


def test_wrong_shapes() -> None:
    with pytest.raises(ValueError, match="shape"):
        implicit_reward(torch.zeros(2, 3), torch.zeros(2, 1), beta=1.0)
