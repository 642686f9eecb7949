"""Counts without numbers against real passes on the CPU, and shallow models against deep ones."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.nn import functional

from gdro_cli.core.flow import velocity_error
from gdro_cli.core.footprint import Weights
from gdro_cli.models.adapters import attach_lora
from gdro_cli.models.backends import ComputeOptions, prepare_transformer
from gdro_cli.models.base import FlowModel
from gdro_cli.models.diffusers_flow import DtypeName, load_flow_model
from gdro_cli.models.meta_model import count_weights, meta_model
from gdro_cli.models.published import PublishedFolder, published_name
from gdro_cli.models.trace import Update, metered, trace_forward, trace_update, whole_update

pytestmark = pytest.mark.slow

SIZE = (128, 128)
"""64 image tokens."""
TEXT = 24
IMAGES = 3
SMALL: dict[str, dict[str, Any]] = {
    "FLUX.1-dev": {
        "num_layers": 4,
        "num_single_layers": 5,
        "attention_head_dim": 32,
        "num_attention_heads": 4,
        "axes_dims_rope": [8, 12, 12],
        "joint_attention_dim": 64,
    },
    "SD3.5-medium": {
        "num_layers": 9,
        "attention_head_dim": 32,
        "num_attention_heads": 4,
        "caption_projection_dim": 128,
        "joint_attention_dim": 64,
        "dual_attention_layers": [0, 1, 2, 3],
    },
}
"""The published configurations with fewer and narrower blocks."""


class Small(PublishedFolder):
    """A published pipeline with a smaller transformer."""

    def config(self, name: str, *, file: str = "config.json") -> dict[str, Any]:
        return super().config(name, file=file) | (
            SMALL[published_name(self.path) or ""] if name == "transformer" else {}
        )


def open_small(name: str, device: str, dtype: DtypeName = "float32") -> tuple[FlowModel, list[Any]]:
    """The whole small model with random numbers (none on the meta device) and an adapter."""
    folder = Small(name)
    flow = load_flow_model(folder, dtype=dtype, device=device, max_sequence_length=TEXT)
    module = folder.meta_component("transformer")
    if device != "meta":
        module = module.to_empty(device=device)
        for parameter in module.parameters():
            torch.nn.init.normal_(parameter, std=0.02)
    prepare_transformer(module, ComputeOptions())  # kernels that another test chose keep more
    flow.transformer = module.to(flow.dtype).requires_grad_(False)
    return flow, attach_lora(flow, rank=4, alpha=4)


def traced(flow: FlowModel, parameters: list[Any], *, checkpointing: bool = False) -> Update:
    text = flow.conditioning_shapes(TEXT)
    return trace_update(
        flow, parameters, IMAGES, text, guidance=3.5, size=SIZE, checkpointing=checkpointing, autocast=None
    )


def saved_bytes(flow: FlowModel) -> int:
    """Bytes that a real forward pass on the CPU keeps for the backward pass, weights left out."""
    weights = {t.untyped_storage().data_ptr() for t in (*flow.transformer.parameters(), *flow.transformer.buffers())}
    kept: dict[int, torch.UntypedStorage] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage
        return tensor

    latents = torch.randn(IMAGES, *flow.latent_shape(height=SIZE[0], width=SIZE[1]))
    text = {key: torch.randn(IMAGES, *shape) for key, shape in flow.conditioning_shapes(TEXT).items()}
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        velocity = flow.velocity(latents, torch.rand(IMAGES), text, guidance=3.5, height=SIZE[0], width=SIZE[1])
        loss = velocity_error(velocity, torch.randn_like(latents)).sum()
    total = sum(storage.nbytes() for storage in kept.values())
    loss.backward()
    return total


@pytest.mark.parametrize("name", list(SMALL))
def test_activations_are_those_of_a_real_pass(name: str) -> None:
    """Within 5 %: the trace counts live tensors, the hooks those that autograd saves; the ends of the pass differ."""
    real, _ = open_small(name, "cpu")
    kept = traced(*open_small(name, "meta")).kept
    assert kept == pytest.approx(saved_bytes(real), rel=0.05)


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("name", list(SMALL))
def test_shallow_models_count_for_the_deep_one(name: str, checkpointing: bool) -> None:
    """Numbers, operations and kept bytes are exact; the peak is not below the deep model's and not far above."""
    whole, parameters = open_small(name, "meta")
    deep = traced(whole, parameters, checkpointing=checkpointing)
    parts = meta_model(Small(name), dtype="float32", max_sequence_length=TEXT).parts
    assert len(parts) == 3
    assert sum((p.weights.times(p.times) for p in parts), Weights(0)) == count_weights(
        Small(name).meta_component("transformer")
    )
    adapters = [attach_lora(part.flow, rank=4, alpha=4) for part in parts]
    assert sum(part.times * sum(p.numel() for p in own) for part, own in zip(parts, adapters, strict=True)) == sum(
        p.numel() for p in parameters
    )
    counted = whole_update(
        (part.times, traced(part.flow, own, checkpointing=checkpointing))
        for part, own in zip(parts, adapters, strict=True)
    )
    assert (counted.flops, counted.forward) == (deep.flops, deep.forward)
    assert counted.kept == pytest.approx(deep.kept, rel=1e-3)
    assert deep.peak * 0.999 <= counted.peak <= deep.peak * 1.15


def test_checkpointing_keeps_less_and_computes_more() -> None:
    flow, parameters = open_small("FLUX.1-dev", "meta")
    plain, thrifty = traced(flow, parameters), traced(flow, parameters, checkpointing=True)
    assert thrifty.peak < plain.peak / 2
    assert plain.forward < thrifty.flops - plain.flops + plain.forward / 4 < 2 * plain.forward


def test_the_peak_of_a_pass_without_gradient_does_not_depend_on_depth() -> None:
    name = "FLUX.1-dev"
    text = {"prompt_embeds": (TEXT, 64), "pooled_prompt_embeds": (768,)}
    parts = meta_model(Small(name), dtype="float32", max_sequence_length=TEXT).parts
    peaks = {trace_forward(part.flow, IMAGES, text, guidance=3.5, size=SIZE, autocast=None).peak for part in parts}
    assert len(peaks) == 1


def test_operations_by_hand() -> None:
    """[5, 8] x [8, 3]: 2 * 5 * 8 * 3. Attention of 4 queries on 4 keys, width 8, 2 heads: 2 products of 4 x 4 x 8."""
    x, w = torch.empty(5, 8, device="meta"), torch.empty(3, 8, device="meta")
    q = torch.empty(1, 2, 4, 8, device="meta")
    with metered([x, w, q]) as meter:
        functional.linear(x, w)
        assert meter.flops == 240
        functional.scaled_dot_product_attention(q, q, q)
        assert meter.flops == 240 + 2 * 2 * (2 * 4 * 4 * 8)


def test_bytes_by_hand() -> None:
    """Freed tensors are not alive; a view adds nothing."""
    x = torch.empty(5, 8, device="meta")
    with metered([x]) as meter:
        y = x + 1
        assert meter.live == 160
        z = y.t()
        assert meter.live == 160
        del y, z
        assert (meter.live, meter.peak) == (0, 160)


def test_autocast_has_the_dtypes_of_cuda() -> None:
    x = torch.empty(2, 4, device="meta")
    with metered([x], autocast=torch.bfloat16):
        y = functional.linear(x, torch.empty(4, 4, device="meta"))
        assert y.dtype == torch.bfloat16
        assert functional.layer_norm(y, (4,)).dtype == torch.float32
        assert (y * 2).dtype == torch.bfloat16


@pytest.mark.parametrize(("listed", "expected"), [(True, torch.float32), (False, torch.bfloat16)])
def test_rms_norm_has_the_dtype_of_the_installed_torch(
    listed: bool, expected: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before torch 2.12 autocast leaves it alone."""
    name, known = "_dispatch_has_kernel_for_dispatch_key", torch._C._dispatch_has_kernel_for_dispatch_key
    monkeypatch.setattr(torch._C, name, lambda op, key: listed if op == "aten::rms_norm" else known(op, key))
    x = torch.empty(2, 4, device="meta", dtype=torch.bfloat16)
    with metered([x], autocast=torch.bfloat16):
        assert functional.rms_norm(x, (4,)).dtype == expected
