"""The peak memory of a training pass on a GPU, counted without one, against the estimate of ``--dry-run``.

PyTorch's fake tensors say ``cuda:0`` and have no numbers, so full width costs nothing. Autocast is CUDA's own, and the
quantised layers are those of torchao and bitsandbytes.
"""

from __future__ import annotations

from tests.gpu.pretend_gpu import CUDA, pretend_gpu  # isort: skip - before whatever imports torch

import weakref
from collections.abc import Iterable
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode, is_traceable_wrapper_subclass
from torch.utils._pytree import tree_leaves

from gdro_cli.core.flow import velocity_error
from gdro_cli.models import memory
from gdro_cli.models.adapters import attach_lora
from gdro_cli.models.base import FlowModel
from gdro_cli.models.diffusers_flow import load_flow_model
from gdro_cli.models.meta_model import meta_model
from gdro_cli.models.published import PublishedFolder
from gdro_cli.models.trace import trace_update, whole_update

SIZE, TEXT, RANK = (512, 512), 128, 32
IMAGES = 2
"""With so few, one unpacked matrix is a large part."""
_UNFUSED_ROWS = 1536
"""Rows of the input above which bitsandbytes unpacks a matrix in the forward pass (its CUDA gemm_4bit)."""


class Shallow(PublishedFolder):
    """FLUX.1-dev at full width, with 2 + 4 blocks."""

    def config(self, name: str, *, file: str = "config.json") -> dict[str, Any]:
        fewer = {"num_layers": 2, "num_single_layers": 4} if name == "transformer" else {}
        return super().config(name, file=file) | fewer


def plain(tensors: Iterable[Tensor]) -> list[Tensor]:
    """The tensors, those of torchao as their parts."""
    found: list[Tensor] = []
    for one in tensors:
        inner = one.__tensor_flatten__()[0] if is_traceable_wrapper_subclass(one) else None  # type: ignore[attr-defined]
        found += [one] if inner is None else [getattr(one, name) for name in inner]
    return found


class Live(TorchDispatchMode):
    """Bytes of the storages that are alive, beside those of ``existing``."""

    def __init__(self, existing: Iterable[Tensor]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.live = self.peak = 0
        self._noted = {tensor.untyped_storage()._cdata for tensor in plain(existing)}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if any(is_traceable_wrapper_subclass(leaf) for leaf in tree_leaves((args, kwargs))):
            return NotImplemented  # first into torchao's own operations
        room = None
        if str(func) == "bitsandbytes.gemm_4bit.default" and args[0].numel() // args[2][1] > _UNFUSED_ROWS:
            room = torch.empty(args[2], dtype=args[0].dtype, device=CUDA)
            self._note(room)
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor) and not is_traceable_wrapper_subclass(leaf):
                self._note(leaf)
        del room
        return result

    def _note(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        if storage._cdata not in self._noted:
            self._noted.add(storage._cdata)
            self.live += storage.nbytes()
            self.peak = max(self.peak, self.live)
            weakref.finalize(storage, self._freed, storage._cdata, storage.nbytes())

    def _freed(self, which: int, size: int) -> None:
        self._noted.discard(which)
        self.live -= size


def empty(tensor: Tensor, *, trained: bool = False) -> nn.Parameter:
    return nn.Parameter(torch.empty(tensor.shape, dtype=tensor.dtype, device=CUDA), requires_grad=trained)


def four_bit(layer: nn.Linear) -> nn.Module:
    """bitsandbytes' layer. Its class of parameters takes no fake tensor, so an ordinary one has its attributes."""
    import bitsandbytes as bnb

    packed, state = bnb.functional.quantize_4bit(layer.weight.data, quant_type="nf4", compress_statistics=False)
    weight: Any = nn.Parameter(packed, requires_grad=False)
    weight.quant_state, weight.quant_type, weight.compress_statistics = state, "nf4", False
    with mock.patch.object(bnb.nn.modules, "Params4bit", lambda data, **_: nn.Parameter(data, requires_grad=False)):
        bits: nn.Module = bnb.nn.Linear4bit(1, 1, compute_dtype=torch.bfloat16, quant_type="nf4")
    bits.in_features, bits.out_features, bits.compute_type_is_set = layer.in_features, layer.out_features, True
    bits._parameters.update(weight=weight, bias=layer.bias)
    return bits


def quantise(transformer: Any, kind: str) -> None:
    """As diffusers does when it loads the transformer."""
    if kind == "nf4":
        linear = [name for name, layer in transformer.named_modules() if isinstance(layer, nn.Linear)]
        for name in linear:
            transformer.set_submodule(name, four_bit(transformer.get_submodule(name)))
        transformer.is_loaded_in_4bit = True
    else:
        from torchao.quantization import quantize_

        config = memory.quantization_config(kind, dtype=torch.bfloat16, device=CUDA)  # type: ignore[arg-type]
        quantize_(transformer, config.quant_type)
    memory.prepare_quantised(transformer, torch.bfloat16)


def fused(query: Tensor, key: Tensor, value: Tensor, *options: Any, **named: Any) -> Tensor:
    heads = (tensor.to(torch.bfloat16) for tensor in (query, key, value))
    result: Tensor = torch.ops.aten._scaled_dot_product_flash_attention(*heads, 0.0, False)[0]
    return result


def measured(kind: str, *, checkpointing: bool) -> int:
    """Bytes at the highest point of a forward and backward pass, without weights and gradients."""
    model = load_flow_model(Shallow("FLUX.1-dev"), dtype="bfloat16", device="meta", max_sequence_length=TEXT)
    transformer = model.folder.meta_component("transformer", dtype=torch.bfloat16)
    with pretend_gpu(numbers=False), FakeTensorMode(allow_non_fake_inputs=True):
        return _peak(model, transformer, kind, checkpointing=checkpointing)


def _peak(model: FlowModel, transformer: Any, kind: str, *, checkpointing: bool) -> int:
    for module in transformer.modules():
        module._parameters.update({key: empty(p) for key, p in module._parameters.items() if p is not None})
        module._buffers.update({key: empty(b).data for key, b in module._buffers.items() if b is not None})
    if kind != "none":
        quantise(transformer, kind)
    model.transformer, model.device = transformer, CUDA
    with mock.patch.object(nn.Module, "_apply", lambda self, *_, **__: self):  # it would swap fake parameters
        attach_lora(model, rank=RANK, alpha=RANK)
    adapter = []
    for module in transformer.modules():
        trained = {
            key: empty(p, trained=True) for key, p in module._parameters.items() if p is not None and p.requires_grad
        }
        module._parameters.update(trained)
        adapter += list(trained.values())
    for parameter in adapter:
        parameter.grad = torch.empty_like(parameter)
    memory.checkpoint_blocks(transformer, float(checkpointing))
    latents = torch.empty(IMAGES, *model.latent_shape(height=SIZE[0], width=SIZE[1]), device=CUDA)
    text = {
        key: torch.empty(IMAGES, *shape, dtype=torch.bfloat16, device=CUDA)
        for key, shape in model.conditioning_shapes(TEXT).items()
    }
    sigma, target = torch.empty(IMAGES, device=CUDA), torch.empty_like(latents)
    gradients = [p.grad for p in adapter if p.grad is not None]
    weights = [*transformer.parameters(), *transformer.buffers(), *gradients, latents, sigma, target, *text.values()]
    with Live(weights) as live, mock.patch.object(nn.functional, "scaled_dot_product_attention", fused):
        with torch.autocast("cuda", dtype=torch.bfloat16):
            velocity = model.velocity(latents, sigma, text, guidance=3.5, height=SIZE[0], width=SIZE[1])
        velocity_error(velocity, target).sum().backward()
    return live.peak


def estimated(kind: Any, *, checkpointing: bool) -> int:
    """The same from the traces behind ``--dry-run``."""
    model = meta_model(Shallow("FLUX.1-dev"), dtype="bfloat16", max_sequence_length=TEXT, storage=kind)
    parts = []
    for part in model.parts:
        adapter = attach_lora(part.flow, rank=RANK, alpha=RANK)
        text = part.flow.conditioning_shapes(TEXT)
        options: Any = {"guidance": 3.5, "size": SIZE, "checkpointing": checkpointing, "autocast": torch.bfloat16}
        parts.append((part.times, trace_update(part.flow, adapter, IMAGES, text, **options)))
    return whole_update(parts).peak


def check_peaks(*kinds: str) -> None:
    """Print measured and estimated peaks in bytes, without and with gradient checkpointing."""
    for kind in kinds:
        for checkpointing in (False, True):
            peak = measured(kind, checkpointing=checkpointing)
            print(kind, checkpointing, peak, estimated(kind, checkpointing=checkpointing))  # noqa: T201
