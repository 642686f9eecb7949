"""The stochastic sampler against the ODE's marginals, torch.distributions and values worked by hand."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from gdro_cli.core.flow import euler_step
from gdro_cli.core.sde import SdeStep, flow_grpo_coefficient, log_prob, sde_step, step_kl

MEAN, VARIANCE = 1.5, 0.25  # of the clean data, one normal number per latent


def velocity(x: Tensor, sigma: float) -> Tensor:
    """E[eps - x0 | x] for x0 ~ N(MEAN, VARIANCE): both are jointly normal with x."""
    spread = (1 - sigma) ** 2 * VARIANCE + sigma**2
    centred = (x - (1 - sigma) * MEAN) / spread
    return sigma * centred - (MEAN + (1 - sigma) * VARIANCE * centred)


def moments(sigma: float) -> tuple[float, float]:
    """Mean and variance of x_sigma = (1 - sigma) x0 + sigma eps."""
    return (1 - sigma) * MEAN, (1 - sigma) ** 2 * VARIANCE + sigma**2


@pytest.mark.parametrize("variant", ["flow-grpo", "dance-grpo", "ode"])
def test_the_sde_has_the_marginals_of_the_ode(variant: str) -> None:
    """40,000 paths: the standard errors are 0.005 for the mean and 0.007 for the variance, at variance 1."""
    stream = torch.Generator().manual_seed(0)
    sigmas = torch.linspace(1, 0, 401, dtype=torch.float64)
    x = torch.randn(40_000, 1, dtype=torch.float64, generator=stream)
    for index in range(400):
        sigma = float(sigmas[index])
        if index in (100, 200, 300, 380):
            mean, variance = moments(sigma)
            assert x.mean().item() == pytest.approx(mean, abs=0.02)
            assert x.var().item() == pytest.approx(variance, abs=0.03)
        level, following = (sigmas[index + offset].expand(len(x)) for offset in (0, 1))
        if variant == "flow-grpo":
            sd = flow_grpo_coefficient(level, noise_level=0.7, sigma_second=float(sigmas[1]))
        else:
            sd = torch.full_like(level, 0.3 if variant == "dance-grpo" else 0.0)
        step = sde_step(x, velocity(x, sigma), level, following, coefficient=sd)
        x = step.draw(torch.randn(x.shape, dtype=torch.float64, generator=stream))


def test_the_mean_is_the_published_one_of_flow_grpo() -> None:
    """mean = x (1 + sd^2 dt / (2 sigma)) + v (1 + sd^2 (1 - sigma) / (2 sigma)) dt.

    With x = 2, v = -1, sigma = 0.5, dt = -0.25, sd = 1: 2 * 0.75 - 1 * 1.5 * -0.25 = 1.875; std = sqrt(0.25) = 0.5.
    """
    step = sde_step(*map(torch.tensor, ([[2.0]], [[-1.0]], [0.5], [0.25])), coefficient=torch.tensor([1.0]))
    assert step.mean.item() == pytest.approx(1.875)
    assert step.std.item() == pytest.approx(0.5)


def test_the_mean_is_the_published_one_of_dance_grpo() -> None:
    """mean = x + (v + 0.5 eta^2 (x - (1 - sigma) x0_hat) / sigma^2) dt, std = eta sqrt(-dt)."""
    stream = torch.Generator().manual_seed(1)
    x, v = torch.randn(2, 3, 4, 5, generator=stream).unbind(0)
    sigma, following, eta = torch.tensor([1.0, 0.6, 0.2]), torch.tensor([0.9, 0.5, 0.05]), 0.3
    step = sde_step(x, v, sigma, following, coefficient=torch.full((3,), eta))
    s, dt = sigma[:, None, None], (following - sigma)[:, None, None]
    published = x + (v + 0.5 * eta**2 * (x - (1 - s) * (x - s * v)) / s**2) * dt
    torch.testing.assert_close(step.mean, published)
    torch.testing.assert_close(step.std, eta * torch.sqrt(sigma - following))


def test_coefficient_by_hand_and_at_sigma_one() -> None:
    """0.7 sqrt(0.8 / 0.2) = 1.4; at 1 the denominator is that of the second level: 0.7 sqrt(1 / 0.2)."""
    sd = flow_grpo_coefficient(torch.tensor([1.0, 0.8]), noise_level=0.7, sigma_second=0.8)
    assert sd.tolist() == pytest.approx([0.7 * math.sqrt(5), 1.4])
    with pytest.raises(ValueError, match="below 1"):
        flow_grpo_coefficient(torch.tensor([1.0]), noise_level=0.7, sigma_second=1.0)


def test_without_noise_it_is_the_euler_step() -> None:
    x, v = torch.randn(2, 4, 6, generator=torch.Generator().manual_seed(2)).unbind(0)
    sigma, following = torch.tensor([1.0, 0.7, 0.4, 0.1]), torch.tensor([0.8, 0.5, 0.1, 0.0])
    step = sde_step(x, v, sigma, following, coefficient=torch.zeros(4))
    torch.testing.assert_close(step.mean, euler_step(x, v, sigma, following))
    assert step.std.tolist() == [0.0] * 4


@given(seed=st.integers(0, 1000), std=st.floats(0.01, 10))
@settings(max_examples=25, deadline=None)
def test_log_prob_is_the_mean_of_the_normal_log_density(seed: int, std: float) -> None:
    x, mean = torch.randn(2, 3, 4, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)).unbind(0)
    stds = torch.tensor([std, 2 * std, 3 * std], dtype=torch.float64)
    expected = torch.distributions.Normal(mean, stds[:, None, None]).log_prob(x).mean(dim=(1, 2))
    torch.testing.assert_close(log_prob(x, SdeStep(mean, stds, stds)), expected)


def test_kl_by_hand_and_against_the_normal_distributions() -> None:
    """Means 1 and 3 apart in two dims, sd 2: (1 + 9) / 2 / 8 = 0.625. It is |dt| times the true divergence."""
    mean, reference = torch.tensor([[1.0, 3.0]]), torch.zeros(1, 2)
    step = SdeStep(mean, torch.tensor([2.0 * math.sqrt(0.25)]), torch.tensor([2.0]))
    assert step_kl(step, reference).item() == pytest.approx(0.625)
    exact = torch.distributions.kl_divergence(
        torch.distributions.Normal(mean, step.std), torch.distributions.Normal(reference, step.std)
    )
    assert step_kl(step, reference).item() == pytest.approx(0.25 * exact.mean().item())
    assert step_kl(step, mean).item() == 0


def test_half_precision_comes_out_as_float32() -> None:
    x = torch.ones(2, 3, dtype=torch.bfloat16)
    step = sde_step(x, x, torch.ones(2), torch.full((2,), 0.5), coefficient=torch.ones(2))
    assert step.mean.dtype == log_prob(x, step).dtype == torch.float32


def test_wrong_shapes_are_refused() -> None:
    x, one = torch.zeros(2, 3), torch.ones(2)
    with pytest.raises(ValueError, match="differ"):
        sde_step(x, x[:1], one, one, coefficient=one)
    with pytest.raises(ValueError, match=r"\[2\]"):
        sde_step(x, x, one[:1], one, coefficient=one)
    step = sde_step(x, x, one, 0.5 * one, coefficient=one)
    with pytest.raises(ValueError, match="differ"):
        log_prob(x[:1], step)
    with pytest.raises(ValueError, match="differ"):
        step_kl(step, x[:1])
