"""Count what a network would do and keep: it runs on the meta device, where tensors have shapes and no numbers.

No formula per architecture: the real classes run, forwards and backwards, every tensor that comes to be and ceases to
be is noted with its bytes, and every product with its operations. What is counted is the arithmetic of the model's own
code; kernels' workspaces, the allocator's rounding and fragmentation come on top.
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
from torch.utils.flop_counter import flop_registry

from gdro_cli.core.flow import velocity_error
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
    functional.rms_norm,
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
"""What autocast on CUDA computes in its lower dtype, and in float32 (the lists of torch's autocast_mode.h), of the
functions that transformers use."""


class _AsOnGpu(TorchFunctionMode):
    """Fused attention, as on CUDA: it keeps queries, keys, values, the result and one number per row, never the matrix
    of all pairs. With ``lower``, the dtypes of CUDA's autocast, which the meta device does not have."""

    def __init__(self, lower: torch.dtype | None) -> None:
        super().__init__()
        self.lower = lower

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if self.lower is not None and func in _LOWERED:
            args, kwargs = _cast((args, kwargs), self.lower)
        elif self.lower is not None and func in _RAISED:
            args, kwargs = _cast((args, kwargs), torch.float32)
        if func is functional.scaled_dot_product_attention:
            return _fused_attention(*args, **kwargs)
        return func(*args, **kwargs)


def _cast(tree: Any, dtype: torch.dtype) -> Any:
    def one(value: Any) -> Any:
        return value.to(dtype) if isinstance(value, Tensor) and value.is_floating_point() else value

    return tree_map(one, tree)


def _fused_attention(query: Tensor, key: Tensor, value: Tensor, *options: Any, **named: Any) -> Tensor:
    """A mask has no place here; beside queries, keys and values it is small."""
    heads = query.shape[1] // key.shape[1]
    if heads > 1:  # grouped queries: each key serves several
        key, value = key.repeat_interleave(heads, dim=1), value.repeat_interleave(heads, dim=1)
    found = torch.ops.aten._scaled_dot_product_flash_attention(query, key, value, 0.0, False)
    result: Tensor = found[0]
    return result


class _Products(TorchDispatchMode):
    """Operations by PyTorch's table of them, without its ``FlopCounterMode``, whose hooks on modules keep tensors alive
    that are gone otherwise.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.flops = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        count = flop_registry.get(func._overloadpacket)
        if count is None and func is not torch.ops.prim.device.default:
            with self:  # a function made of others counts as them
                parts = func.decompose(*args, **kwargs)
            if parts is not NotImplemented:
                return parts
        result = func(*args, **kwargs)
        if count is not None:
            self.flops += int(count(*args, **kwargs, out_val=result))
        return result


class _Live(TorchDispatchMode):
    """Bytes of the tensors that are alive, storages counted once, without those that were there before."""

    def __init__(self, there: Iterable[Tensor]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.live = self.peak = 0
        self._known = {tensor.untyped_storage()._cdata for tensor in there}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor):
                self._note(leaf)
        return result

    def _note(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        if storage._cdata in self._known:
            return
        size = storage.nbytes()
        self._known.add(storage._cdata)
        self.live += size
        self.peak = max(self.peak, self.live)
        weakref.finalize(storage, self._freed, storage._cdata, size)

    def _freed(self, which: int, size: int) -> None:
        self._known.discard(which)
        self.live -= size


class Meter:
    """What has been counted so far in a ``metered`` block."""

    def __init__(self, live: _Live, products: _Products) -> None:
        self._live, self._products = live, products

    @property
    def flops(self) -> int:
        """Operations of matrix products, convolutions and attention."""
        return self._products.flops

    @property
    def live(self) -> int:
        """Bytes alive now."""
        return self._live.live

    @property
    def peak(self) -> int:
        """The most bytes that were alive at once."""
        return self._live.peak


@contextmanager
def metered(there: Iterable[Tensor], *, autocast: torch.dtype | None = None) -> Iterator[Meter]:
    """Count what happens inside the block on the meta device.

    Args:
        there: tensors that are not counted, such as weights.
        autocast: the lower dtype of CUDA's autocast; None = every tensor in its own dtype.
    """
    with _AsOnGpu(autocast), _Products() as products, _Live(there) as live:
        yield Meter(live, products)


@dataclass(frozen=True, slots=True)
class Work:
    """What a piece of work takes, for all its images together."""

    flops: int
    """Operations."""
    peak: int
    """Bytes beside weights, the most at once."""


@dataclass(frozen=True, slots=True)
class Update(Work):
    """A forward and a backward pass of the policy."""

    forward: int
    """Operations of the forward pass alone."""
    kept: int
    """Bytes kept between the two: the activations."""


def whole_work(parts: Iterable[tuple[int, Work]]) -> Work:
    """A pass of the deep model from those of shallow ones (``core.footprint.depth_plan``): (coefficient, work).

    Without gradient nothing is kept from block to block, so the peak is the same at any depth.
    """
    found = list(parts)
    return Work(sum(times * work.flops for times, work in found), max(work.peak for _, work in found))


def whole_update(parts: Iterable[tuple[int, Update]]) -> Update:
    """The same of a forward and backward pass: what is kept is affine in the depths, and the peak lies above it.

    How far above is a matter of single blocks: the highest excess of the shallow models is taken, which the deep one
    does not exceed.
    """
    found = list(parts)
    kept = sum(times * work.kept for times, work in found)
    return Update(
        flops=sum(times * work.flops for times, work in found),
        peak=kept + max(work.peak - work.kept for _, work in found),
        forward=sum(times * work.forward for times, work in found),
        kept=kept,
    )


def trace_forward(
    model: FlowModel, images: int, text: dict[str, tuple[int, ...]], *, guidance: float, size: tuple[int, int]
) -> Work:
    """One pass without gradient, as in sampling, of a model on the meta device.

    Args:
        model: its transformer is on the meta device.
        images: per pass.
        text: shapes of one prompt's conditioning.
        guidance: guidance scale.
        size: height and width in pixels.
    """
    latents, sigma, conditioning = _inputs(model, images, text, size)
    height, width = size
    with torch.no_grad(), metered(_tensors(model.transformer)) as meter:
        model.velocity(latents, sigma, conditioning, guidance=guidance, height=height, width=width)
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
    """Forward and backward pass of the velocity errors of one micro-batch, with the adapter on.

    Args:
        model: its transformer is on the meta device and carries the adapter.
        parameters: the adapter's.
        images: of the micro-batch.
        text: shapes of one prompt's conditioning.
        guidance: guidance scale.
        size: height and width in pixels.
        checkpointing: recompute activations block by block.
        autocast: as in ``metered``.
    """
    latents, sigma, conditioning = _inputs(model, images, text, size)
    target = torch.empty_like(latents)
    for parameter in parameters:
        parameter.grad = torch.empty_like(parameter)
    there = [*_tensors(model.transformer), *(p.grad for p in parameters if p.grad is not None)]
    with checkpointed(model.transformer, checkpointing, autocast), metered(there, autocast=autocast) as meter:
        velocity = model.velocity(latents, sigma, conditioning, guidance=guidance, height=size[0], width=size[1])
        loss = velocity_error(velocity, target).sum()
        forward, kept = meter.flops, meter.live
        torch.autograd.backward(loss)
        found = Update(meter.flops, meter.peak, forward, kept)
    for parameter in parameters:
        parameter.grad = None
    return found


@contextmanager
def checkpointed(transformer: Any, wanted: bool, autocast: torch.dtype | None) -> Iterator[None]:
    """Gradient checkpointing inside the block, whose recomputation is counted like the first time."""
    if not wanted:
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
    conditioning = {key: torch.empty(images, *each, device="meta", dtype=model.dtype) for key, each in text.items()}
    return latents, torch.empty(images, device="meta"), conditioning
