"""Rectified flow: the straight path between an image latent and noise.

One time convention everywhere: ``sigma`` in [0, 1], 1 = pure noise,

    x_sigma = (1 - sigma) * x0 + sigma * eps        velocity v = eps - x0 = d x_sigma / d sigma

A scheduler's 0..1000 timestep exists only inside the model families. Everything here is computed in float32, whatever
the dtype of the arguments; float64 stays float64. Every function raises ValueError if shapes do not fit.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

Reduction = Literal["mean", "sum"]


def as_float(x: Tensor) -> Tensor:
    """Return ``x`` in float32; float64 stays float64."""
    return x if x.dtype in (torch.float32, torch.float64) else x.to(torch.float32)


def _sigma_like(sigma: Tensor | float, x: Tensor) -> Tensor:
    """Shape sigma ([N] or a scalar) so that it broadcasts over the latent dims of ``x`` [N, ...]."""
    values = torch.as_tensor(sigma, dtype=x.dtype, device=x.device)
    if values.ndim == 0:
        return values
    if values.ndim != 1 or values.shape[0] != x.shape[0]:
        raise ValueError(f"sigma must be a scalar or of shape [{x.shape[0]}], got {list(values.shape)}")
    return values.reshape(-1, *[1] * (x.ndim - 1))


def _same_shape(name: str, a: Tensor, b: Tensor) -> None:
    if a.shape != b.shape:
        raise ValueError(f"{name}: shapes {list(a.shape)} and {list(b.shape)} differ")


def interpolate(x0: Tensor, noise: Tensor, sigma: Tensor | float) -> Tensor:
    """Put noise on clean latents: ``x_sigma = (1 - sigma) * x0 + sigma * eps``.

    Args:
        x0: clean latents [N, ...].
        noise: standard normal noise eps, same shape.
        sigma: noise level in [0, 1], a scalar or [N]; 0 gives ``x0``, 1 gives ``noise``.

    Returns:
        Noisy latents [N, ...], at least float32.
    """
    _same_shape("interpolate", x0, noise)
    clean, eps = as_float(x0), as_float(noise)
    level = _sigma_like(sigma, clean)
    return (1.0 - level) * clean + level * eps


def velocity_target(x0: Tensor, noise: Tensor) -> Tensor:
    """Return the velocity that the model must predict, ``v = eps - x0`` [N, ...], at least float32."""
    _same_shape("velocity_target", x0, noise)
    return as_float(noise) - as_float(x0)


def velocity_error(v_pred: Tensor, v_target: Tensor, *, reduction: Reduction = "mean") -> Tensor:
    """Return the velocity error of each image, ``e = mean over latent dims of (v - v_model)^2``.

    The GDRO paper (arXiv 2601.02036, eqs. 5 and 13) writes the squared norm, ``reduction="sum"``. The default is the
    mean, which keeps beta independent of the image size (see ``implicit.equivalent_beta``).

    Args:
        v_pred: the model's velocity [N, ...].
        v_target: the true velocity, same shape.
        reduction: over the latent dims of one image.

    Returns:
        Errors [N], at least float32.

    Raises:
        KeyError: the reduction is unknown.
    """
    _same_shape("velocity_error", v_pred, v_target)
    squares = (as_float(v_pred) - as_float(v_target)).square().flatten(1)
    return {"mean": squares.mean, "sum": squares.sum}[reduction](dim=1)


def euler_step(x: Tensor, v: Tensor, sigma: Tensor | float, sigma_next: Tensor | float) -> Tensor:
    """Take one Euler step of the sampling ODE: ``x + (sigma_next - sigma) * v``.

    Args:
        x: latents [N, ...] at ``sigma``.
        v: the model's velocity at ``x``, same shape.
        sigma: current noise level, a scalar or [N].
        sigma_next: next noise level, below ``sigma`` when sampling.

    Returns:
        Latents at ``sigma_next``, in the dtype of ``x`` (the step itself is taken in float32).
    """
    _same_shape("euler_step", x, v)
    state = as_float(x)
    step = _sigma_like(sigma_next, state) - _sigma_like(sigma, state)
    return (state + step * as_float(v)).to(x.dtype)


def with_norms_of(target: Tensor, values: Tensor) -> Tensor:
    """Scale each row of ``values`` (its last dimension) to the norm of ``target``'s; a row of zeros stays zero."""
    _same_shape("with_norms_of", target, values)
    wanted: Tensor = torch.linalg.vector_norm(as_float(target), dim=-1, keepdim=True)
    norm: Tensor = torch.linalg.vector_norm(as_float(values), dim=-1, keepdim=True)
    return as_float(values) * (wanted / norm.clamp_min(torch.finfo(norm.dtype).tiny))
