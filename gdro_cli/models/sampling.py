"""Sample the latents of images: Euler steps on the flow's ODE, as the pipelines of diffusers take them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise

import torch
from torch import Tensor

from gdro_cli.core.flow import euler_step
from gdro_cli.models.base import Conditioning, FlowModel, takes_two_passes


def sample_latents(
    model: FlowModel,
    noise: Tensor,
    conditioning: Sequence[Conditioning],
    *,
    steps: int,
    guidance: float,
    height: int,
    width: int,
    batch_size: int,
    on_step: Callable[[int], None] | None = None,
) -> Tensor:
    """Integrate from noise (sigma 1) to clean latents (sigma 0).

    The state is kept in float32 between steps; image i depends on its own noise and conditioning only, so batches
    change nothing but rounding.

    Args:
        model: gives schedule and velocity.
        noise: starting noise [N, S, C] of ``model.noise``.
        conditioning: N conditionings.
        steps: Euler steps.
        guidance: guidance scale; above 1, a model with ``cfg`` guidance takes two passes per step (see
            ``base.GuidanceKind``).
        height: image height in pixels.
        width: image width in pixels.
        batch_size: images per forward.
        on_step: called after each step of each batch with the number of images in it (N * steps in total); what it
            raises ends the sampling.

    Returns:
        Clean latents [N, S, C], float32, where ``noise`` is.

    Raises:
        ValueError: ``noise`` and ``conditioning`` have different lengths, or steps or batch_size is below 1.
    """
    count = len(noise)
    if len(conditioning) != count:
        raise ValueError(f"sample_latents: {count} starting points but {len(conditioning)} conditionings")
    if steps < 1 or batch_size < 1:
        raise ValueError(f"sample_latents: steps ({steps}) and batch_size ({batch_size}) must be at least 1")
    sigmas = model.sigmas(steps, height=height, width=width).tolist()
    result = torch.empty(noise.shape, dtype=torch.float32, device=noise.device)
    with torch.inference_mode():
        for start in range(0, count, batch_size):
            part = slice(start, min(start + batch_size, count))
            text = model.batch_conditioning(conditioning[part])
            state = noise[part].to(model.device, torch.float32)
            away = away_from(model, len(state), guidance=guidance)
            for sigma, sigma_next in pairwise(sigmas):
                level = torch.full((len(state),), sigma, device=model.device)
                velocity = guided_velocity(
                    model, state, level, text, away, guidance=guidance, height=height, width=width
                )
                state = euler_step(state, velocity, sigma, sigma_next)
                if on_step is not None:
                    on_step(len(state))
            result[part] = state.to(result.device)
    return result


def away_from(model: FlowModel, count: int, *, guidance: float) -> Conditioning | None:
    """Batch the unconditional conditioning for ``count`` images; None where one pass is all that guidance takes."""
    return model.batch_conditioning([model.unconditional()] * count) if takes_two_passes(model, guidance) else None


def guided_velocity(
    model: FlowModel,
    latents: Tensor,
    sigma: Tensor,
    conditioning: Conditioning,
    away: Conditioning | None,
    *,
    guidance: float,
    height: int,
    width: int,
) -> Tensor:
    """Return the velocity [N, S, C] that a sampling step takes, differentiable in the weights.

    Args:
        model: the flow.
        latents: noisy latents [N, S, C].
        sigma: noise levels [N].
        conditioning: batched, of the prompts.
        away: batched, of ``away_from``; None for one pass.
        guidance: guidance scale.
        height: image height in pixels.
        width: image width in pixels.
    """
    velocity = model.velocity(latents, sigma, conditioning, guidance=guidance, height=height, width=width)
    if away is None:
        return velocity
    other = model.velocity(latents, sigma, away, guidance=guidance, height=height, width=width)
    return model.guided(velocity, other, guidance)
