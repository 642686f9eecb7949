"""One sampling and one training step of a tiny model on any device, through the product's own code."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gdro_cli.config.methods import GdroMethod
from gdro_cli.core.seeds import generator
from gdro_cli.data.dataset import GroupBatch
from gdro_cli.data.records import PromptRecord
from gdro_cli.models import adapters
from gdro_cli.models.backends import ComputeOptions
from gdro_cli.models.base import FlowModel
from gdro_cli.models.diffusers_flow import DtypeName, load_flow_model
from gdro_cli.models.sampling import sample_latents
from gdro_cli.stages.training.group_gradient import GroupGradient, draw_noise, loss_arguments, noisy_groups
from tests.support.tiny_families import BUILDERS, SIZE, build_flux

PROMPTS = ("a red sign", "two blue stars on a brick wall")
K = 3
FAMILIES: dict[str, Callable[[Path], Path]] = {"flux-dev": partial(build_flux, guidance_embeds=True), **BUILDERS}


def draw(*shape: int, name: str) -> Tensor:
    return torch.randn(shape, generator=generator(0, name))


def engine_pass(
    folder: Path,
    device: str,
    dtype: DtypeName = "float32",
    compute: ComputeOptions | None = None,
    *,
    one_pass: bool = False,
    checkpointing: bool = True,
    loudness: float = 1.0,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Latents [2, ...] of two sampling steps, and the adapter's gradients of a training step, all on the CPU.

    The transformer's weights are multiplied by ``loudness``.
    """
    model = load_flow_model(folder, dtype=dtype, device=device, compute=compute)
    with torch.no_grad():
        for weight in model.transformer.parameters():
            weight.mul_(loudness)
    text, noise = model.encode(PROMPTS), model.noise([1, 2], **SIZE)
    latents = sample_latents(model, noise, text, steps=2, guidance=2.0, batch_size=2, **SIZE)
    assert None not in model.decode(latents, **SIZE)
    parameters = adapters.attach_lora(model, rank=2, alpha=4)
    with torch.no_grad():
        for number, parameter in enumerate(parameters):
            parameter.copy_(0.1 * draw(*parameter.shape, name=f"parameter {number}"))
    transformer: Any = model.transformer
    if checkpointing:
        transformer.enable_gradient_checkpointing()
    gradient = group_gradient(model, latents.cpu(), tuple(text), one_pass=one_pass)
    assert gradient.isfinite(), gradient
    return latents.cpu(), {
        name: p.grad.cpu() for name, p in transformer.named_parameters() if p.requires_grad and p.grad is not None
    }


def group_gradient(model: FlowModel, latents: Tensor, text: tuple[Any, ...], *, one_pass: bool) -> Tensor:
    """Backward of one step of two groups of K images, in micro-batches of two; returns the loss."""
    method = GdroMethod(name="gdro", k=K)
    batch = GroupBatch(
        latents=latents[:, None] + draw(2, K, *latents.shape[1:], name="latents"),
        rewards=torch.tensor([[0.1, 0.9, 0.4], [1.0, 0.0, 0.2]]),
        mask=torch.ones(2, K, dtype=torch.bool),
        weights=torch.ones(2),
        prompts=tuple(PromptRecord(id=str(i), prompt=prompt) for i, prompt in enumerate(PROMPTS)),
        image_indices=torch.arange(K).repeat(2, 1),
        visits=(0, 0),
        conditioning=text,
    )
    step = GroupGradient(
        model=model,
        loss=loss_arguments(method),
        reduction=method.reduction,
        guidance=2.0,
        size=(SIZE["height"], SIZE["width"]),
        micro_batch=2,
        one_pass=one_pass,
        backward=lambda loss: loss.backward(),
    )
    return step(noisy_groups(model, batch, draw_noise(batch, method, seed=0))).loss.cpu()


def flat(gradients: dict[str, Tensor]) -> Tensor:
    """All gradients as one vector."""
    return torch.cat([gradients[name].flatten() for name in sorted(gradients)])


def difference(found: Tensor, wanted: Tensor) -> float:
    """The relative difference of two tensors, by their norms, in float32."""
    found, wanted = found.detach().float(), wanted.detach().float()
    return float((found - wanted).norm() / wanted.norm())
