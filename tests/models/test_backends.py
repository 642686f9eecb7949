"""The way the transformer is computed changes its results only by rounding."""

from __future__ import annotations

import platform
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers.models.embeddings import apply_rotary_emb
from diffusers.models.modeling_utils import ModelMixin
from diffusers.models.transformers import transformer_flux

from gdro_cli.errors import PrerequisiteError, UserError
from gdro_cli.models.adapters import attach_lora, reference
from gdro_cli.models.backends import ComputeOptions, prepare_transformer, rotated
from gdro_cli.models.diffusers_flow import load_flow_model

from .conftest import PROMPTS, SIZE


@pytest.mark.parametrize("attention", ["native", "native_math"])
def test_attention_kernels_give_the_same_velocity(attention: Any, flux_folder: Path) -> None:
    velocities = []
    for options in (ComputeOptions(), ComputeOptions(attention=attention)):
        model = load_flow_model(flux_folder, compute=options)
        text, noise = model.encode(PROMPTS[:2]), model.noise([1, 2], **SIZE)
        with torch.no_grad():
            velocities.append(model.velocity(noise, torch.tensor([0.9, 0.3]), text, guidance=1.0, **SIZE))
    torch.testing.assert_close(*velocities, rtol=1e-4, atol=1e-5)


def test_kernels_of_one_model_are_not_those_of_the_next(flux_folder: Path) -> None:
    """diffusers applies the last choice to all models of the process; `auto` must still be PyTorch's own choice."""
    for attention, name in (("native_math", "_native_math"), ("auto", "native")):
        model = load_flow_model(flux_folder, compute=ComputeOptions(attention=attention))  # type: ignore[arg-type]
        layers: list[Any] = [module for module in model.transformer.modules() if hasattr(module, "processor")]
        assert {layer.processor._attention_backend.value for layer in layers} == {name}


def test_kernels_of_a_missing_package(flux_folder: Path) -> None:
    model = load_flow_model(flux_folder, compute=ComputeOptions(attention="flash_3"))
    with pytest.raises(
        PrerequisiteError, match=r"model\.attention flash_3 cannot be used here .*model\.attention=auto"
    ):
        _ = model.transformer


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("sequence_dim", [1, 2])
@pytest.mark.parametrize("width", [8, 32, 128])
def test_rotation_in_one_product_is_diffusers(width: int, sequence_dim: int, dtype: torch.dtype) -> None:
    """Values and gradient; in float32 with the same bits on x86 at widths that real heads have."""
    generator = torch.Generator().manual_seed(3)
    x = torch.randn((2, 5, 3, width) if sequence_dim == 1 else (2, 3, 5, width), generator=generator).to(dtype)
    gradient = torch.randn(x.shape, generator=generator).to(dtype)
    angles = (torch.arange(5.0)[:, None] * torch.rand(width // 2, generator=generator)).repeat_interleave(2, dim=1)
    results = []
    for rotate in (rotated, apply_rotary_emb):
        own = x.clone().requires_grad_()
        turned = rotate(own, (angles.cos(), angles.sin()), sequence_dim=sequence_dim)
        results.append((turned, *torch.autograd.grad(turned, own, gradient)))
    exact = dtype == torch.float32 and width % 16 == 0 and platform.machine() == "x86_64"
    tolerance = 0.0 if exact else 2e-2 if dtype == torch.bfloat16 else 1e-6
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0.0, atol=tolerance)


def test_flux_rotates_in_one_product(flux_folder: Path) -> None:
    load_flow_model(flux_folder).transformer  # noqa: B018 - loading it is the point
    assert transformer_flux.apply_rotary_emb is rotated


def test_only_the_repeated_blocks_are_compiled(flux_folder: Path) -> None:
    """They are only marked here: compiling takes a minute (docs/performance.md)."""
    model = load_flow_model(flux_folder, compute=ComputeOptions(compile=True))
    marked = {type(m).__name__ for m in model.transformer.modules() if m._compiled_call_impl is not None}
    assert marked == {"FluxTransformerBlock", "FluxSingleTransformerBlock"}


def test_a_transformer_without_repeated_blocks_says_so() -> None:
    class Odd(ModelMixin):
        """It names no repeated blocks."""

    with pytest.raises(UserError, match=r"model\.compile has no effect on this transformer \(Odd\)"):
        prepare_transformer(Odd(), ComputeOptions(compile=True))


def test_a_transformer_that_ignores_the_kernels_says_so(family_folder: Callable[[str], Path]) -> None:
    model = load_flow_model(family_folder("sd3"), compute=ComputeOptions(attention="native_math"))
    with pytest.raises(UserError, match=r"model\.attention has no effect .* \(SD3Transformer2DModel\)"):
        _ = model.transformer


@pytest.mark.slow
def test_no_pass_of_a_job_stays_uncompiled(flux_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Sampling, reference and policy, with and without gradient and autocast, in several sizes of batch."""
    model = load_flow_model(flux_folder, compute=ComputeOptions(compile=True))
    transformer: Any = model.transformer
    assert torch._dynamo.config.recompile_limit >= 64
    transformer.compile_repeated_blocks(backend="eager")  # the guards are the same, without a compiler
    monkeypatch.setattr(torch._dynamo.config, "fail_on_recompile_limit_hit", True)
    attach_lora(model, rank=2, alpha=2)
    text = model.encode(PROMPTS[:1])[0]

    def velocity(images: int) -> torch.Tensor:
        conditioning = model.batch_conditioning([text] * images)
        noise = model.noise(list(range(images)), **SIZE)
        return model.velocity(noise, torch.full((images,), 0.5), conditioning, guidance=1.0, **SIZE)

    for images in (3, 2, 1):
        with torch.inference_mode():
            velocity(images)
        for autocast in (True, False):
            with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
                with torch.no_grad(), reference(model):
                    velocity(images)
                with torch.no_grad():
                    velocity(images)
                velocity(images).square().mean().backward()
