"""Sample the latents of images with Euler steps on the flow's ODE, as the pipelines of diffusers do."""

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

    The state is float32 between steps. Image i depends only on its own noise and conditioning, so the batch size
    changes nothing but rounding.

    Args:
        model: the flow.
        noise: starting noise [N, S, C] of ``model.noise``.
        conditioning: N conditionings.
        steps: Euler steps.
        guidance: guidance scale (see ``base.GuidanceKind``).
        height, width: size of the images in pixels.
        batch_size: images per forward pass.
        on_step: called after each step of each batch with the number of images in it (N * steps in total); it may
            raise to end the sampling.

    Returns:
        Clean latents [N, S, C], float32, where ``noise`` is.

    Raises:
        ValueError: ``noise`` and ``conditioning`` have different lengths.
    """
    count = len(noise)
    if len(conditioning) != count:
        raise ValueError(f"sample_latents: {count} starting points but {len(conditioning)} conditionings")
    sigmas = model.sigmas(steps, height=height, width=width).tolist()
    result = torch.empty(noise.shape, dtype=torch.float32, device=noise.device)
    with torch.inference_mode():
        for start in range(0, count, batch_size):
            batch = slice(start, start + batch_size)
            text = model.batch_conditioning(conditioning[batch])
            state = noise[batch].to(model.device, torch.float32)
            away = away_from(model, text, guidance=guidance)
            for sigma, sigma_next in pairwise(sigmas):
                level = torch.full((len(state),), sigma, device=model.device)
                velocity = guided_velocity(
                    model, state, level, text, away, guidance=guidance, height=height, width=width
                )
                state = euler_step(state, velocity, sigma, sigma_next)
                if on_step is not None:
                    on_step(len(state))
            result[batch] = state.to(result.device)
    return result


def away_from(model: FlowModel, conditioning: Conditioning, *, guidance: float) -> Conditioning | None:
    """Return the unconditional conditioning beside that of a batch; None if guidance takes one pass."""
    return model.away(conditioning) if takes_two_passes(model, guidance) else None


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
    """Return the velocity [N, S, C] of a sampling step, differentiable in the weights.

    The arguments are those of ``FlowModel.velocity``, and the result of ``away_from``.
    """
    velocity = model.velocity(latents, sigma, conditioning, guidance=guidance, height=height, width=width)
    if away is None:
        return velocity
    other = model.velocity(latents, sigma, away, guidance=guidance, height=height, width=width)
    return model.guided(velocity, other, guidance)
