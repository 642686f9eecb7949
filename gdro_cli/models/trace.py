"""Count the operations and bytes of a network that runs on the meta device, where tensors have shapes and no numbers.

There is no formula per architecture: the real classes run, forward and backward. Every tensor is counted with its bytes
when it is made and when it is freed, and every product with its operations. The counts cover the arithmetic of the
model's own code; workspaces of kernels, the allocator's rounding and fragmentation add to them.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

from gdro_cli.core.flow import velocity_error
from gdro_cli.core.footprint import Storage
from gdro_cli.models.base import Conditioning, FlowModel

_LOWERED: set[Any] = {
    functional.linear,
    functional.conv2d,
    torch.matmul,
    Tensor.matmul,
    torch.bmm,
    functional.scaled_dot_product_attention,
}
_RAISED: set[Any] = {
    functional.layer_norm,
    functional.group_norm,
    functional.softmax,
    torch.softmax,
    Tensor.softmax,
    torch.pow,
    Tensor.pow,
    torch.rsqrt,
    Tensor.rsqrt,
    torch.sum,
    Tensor.sum,
}
"""The functions in transformers that CUDA's autocast computes in its lower dtype, and those that it computes in float32
(from the lists in torch's autocast_mode.h)."""


def raised_by_autocast() -> set[Any]:
    """``_RAISED`` of the installed torch: ``rms_norm`` belongs to it from torch 2.12 on."""
    has_kernel = torch._C._dispatch_has_kernel_for_dispatch_key("aten::rms_norm", "AutocastCUDA")
    return _RAISED | ({functional.rms_norm} if has_kernel else set())


class _AsOnGpu(TorchFunctionMode):
    """CUDA's fused attention, which keeps queries, keys, values, the result and one number per row, but not the matrix
    of all pairs; and with ``lower`` the dtypes of CUDA's autocast, which the meta device does not have."""

    def __init__(self, lower: torch.dtype | None) -> None:
        super().__init__()
        self.lower, self.raised = lower, raised_by_autocast()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if self.lower is not None and func in _LOWERED:
            args, kwargs = _cast((args, kwargs), self.lower)
        elif self.lower is not None and func in self.raised:
            args, kwargs = _cast((args, kwargs), torch.float32)
        if func is functional.scaled_dot_product_attention:
            return _fused_attention(*args, **kwargs)
        return func(*args, **kwargs)


def _cast(tree: Any, dtype: torch.dtype) -> Any:
    def one(value: Any) -> Any:
        return value.to(dtype) if isinstance(value, Tensor) and value.is_floating_point() else value

    return tree_map(one, tree)


def _fused_attention(query: Tensor, key: Tensor, value: Tensor, *options: Any, **named: Any) -> Tensor:
    """Masks are ignored; they are small compared with queries, keys and values."""
    heads = query.shape[1] // key.shape[1]
    if heads > 1:  # grouped queries: each key serves several
        key, value = key.repeat_interleave(heads, dim=1), value.repeat_interleave(heads, dim=1)
    result: Tensor = torch.ops.aten._scaled_dot_product_flash_attention(query, key, value, 0.0, False)[0]
    return result


_UNPACKING: dict[Storage, tuple[int, int]] = {"int8": (0, 4), "fp8": (8, 8), "nf4": (0, 0)}
"""Bytes per number of a quantised matrix that unpacking takes beside the result, forwards and backwards (torchao,
bitsandbytes). ``fp8`` makes a float32 copy and its product with the scales; ``int8`` makes the product only backwards,
and forwards applies the scales to the layer's result."""


def quantised_layers(transformer: nn.Module, storage: Storage) -> nn.Module:
    """Let the linear layers on the meta device unpack their weights as those of a quantised base do; returns it."""
    for layer in transformer.modules() if storage != "none" else ():
        if type(layer) is nn.Linear:
            layer.__class__, layer.storage = _Quantised, storage  # type: ignore[assignment]
    return transformer


class _Quantised(nn.Linear):
    """A layer whose ``weight`` stands for the packed matrix, which does not count."""

    storage: Storage

    def forward(self, x: Tensor) -> Tensor:
        arguments = x.to(self.weight.dtype), self.weight, self.bias, self.storage
        product: Tensor = _QuantisedProduct.apply(*arguments)  # type: ignore[no-untyped-call]
        return product


class _QuantisedProduct(torch.autograd.Function):
    """``x @ weight.T + bias``; each pass unpacks the weight, as in ``models.memory``."""

    @staticmethod
    def forward(context: Any, x: Tensor, weight: Tensor, bias: Tensor | None, storage: Storage) -> Tensor:
        context.save_for_backward(weight)
        before, context.backward_room = _UNPACKING[storage]
        unpacked = _unpacked(weight, room=before)
        product = functional.linear(x, weight, bias)
        del unpacked
        return product.clone() if storage == "int8" else product

    @staticmethod
    def backward(context: Any, gradient: Tensor) -> tuple[Tensor, None, None, None]:
        (weight,) = context.saved_tensors
        unpacked = _unpacked(weight, room=context.backward_room)
        product = gradient @ weight
        del unpacked
        return product, None, None, None


def _unpacked(weight: Tensor, *, room: int) -> Tensor:
    """As many bytes as the weight; before they are returned, also ``room`` bytes per number for a moment."""
    room_and_result = weight.new_empty(weight.numel() * (room + weight.element_size()), dtype=torch.uint8)
    del room_and_result
    return torch.empty_like(weight)


class _NoModules(nullcontext[None]):
    """Replaces the counter's list of running modules, whose hooks keep tensors alive and so double the peak of gradient
    checkpointing."""

    parents = frozenset({"Global"})


class Meter(TorchDispatchMode):
    """The counts of a ``metered`` block so far. A storage counts once, and not if it existed before."""

    live = 0
    """Bytes alive now."""
    peak = 0
    """The most bytes alive at once."""

    def __init__(self, existing: Iterable[Tensor], operations: FlopCounterMode) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._operations = operations
        self._noted = {tensor.untyped_storage()._cdata for tensor in existing}

    @property
    def flops(self) -> int:
        """Operations of matrix products, convolutions and attention."""
        return self._operations.get_total_flops()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor):
                self._note(leaf)
        return result

    def _note(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        if storage._cdata in self._noted:
            return
        size = storage.nbytes()
        self._noted.add(storage._cdata)
        self.live += size
        self.peak = max(self.peak, self.live)
        weakref.finalize(storage, self._freed, storage._cdata, size)

    def _freed(self, which: int, size: int) -> None:
        self._noted.discard(which)
        self.live -= size


@contextmanager
def metered(existing: Iterable[Tensor], *, autocast: torch.dtype | None = None) -> Iterator[Meter]:
    """Count what happens inside the block on the meta device.

    Args:
        existing: tensors that do not count, such as weights.
        autocast: the lower dtype of CUDA's autocast; None = every tensor in its own dtype.
    """
    operations = FlopCounterMode(display=False)
    operations.mod_tracker = _NoModules()  # type: ignore[assignment]
    with _AsOnGpu(autocast), operations, Meter(existing, operations) as meter:
        yield meter


@dataclass(frozen=True, slots=True)
class Work:
    """The cost of a pass, for all its images."""

    flops: int
    """Operations."""
    peak: int
    """The most bytes at once, without weights."""


@dataclass(frozen=True, slots=True)
class Update(Work):
    """A forward and a backward pass of the policy."""

    forward: int
    """Operations of the forward pass."""
    kept: int
    """Bytes kept between the two passes: the activations."""


def whole_work(parts: Iterable[tuple[int, Work]]) -> Work:
    """Return the cost of a pass of the deep model from (coefficient, work) of shallow ones (``footprint.depth_plan``).

    Without gradient nothing is kept from block to block, so the peak is the same at any depth.
    """
    counted = list(parts)
    return Work(sum(times * work.flops for times, work in counted), max(work.peak for _, work in counted))


def whole_update(parts: Iterable[tuple[int, Update]]) -> Update:
    """Return the same for a forward and backward pass.

    The bytes kept are affine in the depths. The peak exceeds them by an amount that depends on single blocks: the
    largest excess of the shallow models, which the deep model does not surpass.
    """
    counted = list(parts)
    kept = sum(times * work.kept for times, work in counted)
    return Update(
        flops=sum(times * work.flops for times, work in counted),
        peak=kept + max(work.peak - work.kept for _, work in counted),
        forward=sum(times * work.forward for times, work in counted),
        kept=kept,
    )


def mixed_update(without: Update, checkpointed: Update, share: float) -> Update:
    """Return the cost where a share of the blocks is checkpointed, from the costs of none and of all.

    Operations and kept bytes are sums over blocks, up to one block. The peak exceeds what is kept by the larger excess
    of the two, so it may be too high, never too low.
    """
    kept = round((1 - share) * without.kept + share * checkpointed.kept)
    return Update(
        flops=round((1 - share) * without.flops + share * checkpointed.flops),
        peak=kept + max(update.peak - update.kept for update in (without, checkpointed)),
        forward=without.forward,
        kept=kept,
    )


def trace_forward(
    model: FlowModel,
    images: int,
    text: dict[str, tuple[int, ...]],
    *,
    guidance: float,
    size: tuple[int, int],
    autocast: torch.dtype | None,
) -> Work:
    """Count one pass without gradient, as in sampling.

    Args:
        model: its transformer is on the meta device.
        images: images per pass.
        text: shapes of one prompt's conditioning.
        guidance: guidance scale.
        size: height and width in pixels.
        autocast: that of ``metered``.
    """
    inputs = _inputs(model, images, text, size)
    with torch.no_grad(), metered(_tensors(model.transformer), autocast=autocast) as meter:
        model.velocity(*inputs, guidance=guidance, height=size[0], width=size[1])
    return Work(meter.flops, meter.peak)


def trace_update(
    model: FlowModel,
    parameters: Sequence[nn.Parameter],
    images: int,
    text: dict[str, tuple[int, ...]],
    *,
    guidance: float,
    size: tuple[int, int],
    checkpointing: bool,
    autocast: torch.dtype | None,
) -> Update:
    """Count the forward and backward pass of the velocity errors of one micro-batch, with the adapter on.

    ``parameters`` are the adapter's; ``checkpointing`` recomputes activations block by block. The other arguments are
    those of ``trace_forward``.
    """
    inputs = _inputs(model, images, text, size)
    target = torch.empty_like(inputs[0])
    for parameter in parameters:
        parameter.grad = torch.empty_like(parameter)
    existing = [*_tensors(model.transformer), *(p.grad for p in parameters if p.grad is not None)]
    with checkpointed(model.transformer, checkpointing, autocast), metered(existing, autocast=autocast) as meter:
        velocity = model.velocity(*inputs, guidance=guidance, height=size[0], width=size[1])
        loss = velocity_error(velocity, target).sum()
        forward, kept = meter.flops, meter.live
        torch.autograd.backward(loss)
        update = Update(meter.flops, meter.peak, forward, kept)
    for parameter in parameters:
        parameter.grad = None
    return update


@contextmanager
def checkpointed(transformer: Any, enabled: bool, autocast: torch.dtype | None) -> Iterator[None]:
    """Gradient checkpointing inside the block; the recomputation counts like the first computation."""
    if not enabled:
        yield
        return

    def run(module: Any, *args: Any) -> Any:
        return checkpoint(
            module.__call__, *args, use_reentrant=False, context_fn=lambda: (nullcontext(), _AsOnGpu(autocast))
        )

    transformer.enable_gradient_checkpointing(run)
    try:
        yield
    finally:
        transformer.disable_gradient_checkpointing()


def _tensors(module: nn.Module) -> list[Tensor]:
    return [*module.parameters(), *module.buffers()]


def _inputs(
    model: FlowModel, images: int, text: dict[str, tuple[int, ...]], size: tuple[int, int]
) -> tuple[Tensor, Tensor, Conditioning]:
    shape = model.latent_shape(height=size[0], width=size[1])
    latents = torch.empty(images, *shape, device="meta")
    conditioning = {key: torch.empty(images, *one, device="meta", dtype=model.dtype) for key, one in text.items()}
    return latents, torch.empty(images, device="meta"), conditioning
