"""Stochastic sampling of a rectified flow, with which online methods explore, and the likelihood of a sampled step.

The ODE dx = v dsigma has, for any coefficient sd(sigma), an SDE with the same marginals: the score of x_sigma is
``-eps_hat / sigma`` with ``eps_hat = x + (1 - sigma) v``, so with dt = sigma_next - sigma < 0

    x_next = x + (v + sd^2 / (2 sigma) * eps_hat) dt + sd sqrt(-dt) z          z ~ N(0, 1)

Sources: Flow-GRPO (arXiv 2505.05470) with ``sd = a sqrt(sigma / (1 - sigma))``, DanceGRPO (arXiv 2505.07818) with
constant ``sd = eta``. The two differ in the coefficient only. Everything is computed in float32; float64 stays float64.
Every function raises ValueError if shapes do not fit.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from gdro_cli.core.flow import as_float


@dataclass(frozen=True, slots=True)
class SdeStep:
    """The normal distribution of the latents at the next noise level."""

    mean: Tensor
    """[N, ...], at least float32."""
    std: Tensor
    """Standard deviation ``sd sqrt(-dt)`` [N], the same in all latent dims."""
    coefficient: Tensor
    """Diffusion coefficient sd [N]."""

    def draw(self, noise: Tensor) -> Tensor:
        """Return latents at the next noise level for standard normal ``noise`` [N, ...]."""
        return self.mean + _spread(self.std, self.mean) * as_float(noise)


def flow_grpo_coefficient(sigma: Tensor, *, noise_level: float, sigma_second: float) -> Tensor:
    """Return Flow-GRPO's diffusion coefficient ``a sqrt(sigma / (1 - sigma))``.

    At sigma = 1 it would be infinite. There 1 - sigma is that of the schedule's second value, as in the public code.

    Args:
        sigma: noise levels [N] in (0, 1].
        noise_level: a, 0 or more.
        sigma_second: the second value of the sampling schedule, below 1.

    Raises:
        ValueError: ``sigma_second`` is not below 1.
    """
    if not sigma_second < 1:
        raise ValueError(f"the second noise level must be below 1, not {sigma_second}")
    level = as_float(sigma)
    rest = 1.0 - torch.where(level >= 1.0, torch.full_like(level, sigma_second), level)
    return noise_level * torch.sqrt(level / rest)


def sde_step(x: Tensor, v: Tensor, sigma: Tensor, sigma_next: Tensor, *, coefficient: Tensor) -> SdeStep:
    """Take one Euler-Maruyama step of the SDE from ``sigma`` down to ``sigma_next``.

    With coefficient 0 its mean is the ODE's Euler step.

    Args:
        x: latents [N, ...] at ``sigma``.
        v: the model's velocity at ``x``, same shape.
        sigma: noise levels [N], above 0.
        sigma_next: noise levels [N], below ``sigma``.
        coefficient: diffusion coefficient sd [N], 0 or more.

    Returns:
        Mean [N, ...] and standard deviation [N] of the latents at ``sigma_next``.
    """
    if x.shape != v.shape:
        raise ValueError(f"sde_step: latents {list(x.shape)} and velocity {list(v.shape)} differ")
    state, velocity = as_float(x), as_float(v)
    if not sigma.shape == sigma_next.shape == coefficient.shape == (len(state),):
        raise ValueError(f"sde_step: sigma, sigma_next and coefficient must have the shape [{len(state)}]")
    level, sd = sigma.to(state), coefficient.to(state)
    dt = sigma_next.to(state) - level
    noise_estimate = state + _spread(1.0 - level, state) * velocity
    drift = velocity + _spread(sd.square() / (2.0 * level), state) * noise_estimate
    return SdeStep(mean=state + _spread(dt, state) * drift, std=sd * torch.sqrt(-dt), coefficient=sd)


def log_prob(x_next: Tensor, step: SdeStep) -> Tensor:
    """Return the log-density of sampled latents, as the **mean** over the latent dims.

    Both public implementations take the mean and not the sum. The mean keeps ratios near 1 at any image size, and
    published clip ranges are meant for it.

    Args:
        x_next: latents [N, ...] at the next noise level.
        step: their distribution.

    Returns:
        [N], at least float32.
    """
    if x_next.shape != step.mean.shape:
        raise ValueError(f"log_prob: latents {list(x_next.shape)} and mean {list(step.mean.shape)} differ")
    std = _spread(step.std, step.mean)
    z = (as_float(x_next) - step.mean) / std
    return (-0.5 * z.square() - torch.log(std) - 0.5 * math.log(2.0 * math.pi)).flatten(1).mean(dim=1)


def step_kl(step: SdeStep, reference_mean: Tensor) -> Tensor:
    """Return Flow-GRPO's divergence of a step from the reference's: ``mean (mu - mu_ref)^2 / (2 sd^2)`` per image.

    It is |dt| times the Kullback-Leibler divergence per latent dim of the two normal distributions, because the public
    code divides by the coefficient and not by the step's own deviation. Published values of beta are meant for that.

    Args:
        step: the policy's step.
        reference_mean: the reference's mean [N, ...] from the same latents.

    Returns:
        [N], 0 or more.
    """
    if reference_mean.shape != step.mean.shape:
        raise ValueError(f"step_kl: means {list(step.mean.shape)} and {list(reference_mean.shape)} differ")
    squares = (step.mean - as_float(reference_mean)).square().flatten(1).mean(dim=1)
    return squares / (2.0 * step.coefficient.square())


def _spread(values: Tensor, x: Tensor) -> Tensor:
    """Shape values [N] so that they broadcast over the latent dims of ``x``."""
    return values.reshape(-1, *[1] * (x.ndim - 1))
