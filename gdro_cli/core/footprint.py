"""What a job needs, from counts: bytes of weights and of the adapter's training, operations, GPU hours.

A gigabyte is 1e9 bytes. The memory of a card is in GiB, 2**30 bytes, as its makers mean it. Operations are
floating-point operations: a multiplication and an addition count as two.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

Storage = Literal["none", "int8", "fp8", "nf4"]

CARDS = (24, 48, 80)
"""Memory of common GPUs, GiB: RTX 3090 and 4090; A6000, L40S; A100, H100."""
USABLE = 0.9
"""Share of a card that an estimate may fill; the rest is for the CUDA context, workspaces and fragmentation."""
SUSTAINED_TFLOPS = 125.0
"""Assumed speed of one GPU, 1e12 operations per second: 40 % of the 312 that an A100's data sheet gives for dense
bfloat16 products. An assumption, not a measurement."""
_FLOAT32 = 4
_MOMENTS = 2
_BLOCK_8BIT, _BLOCK_NF4 = 256, 64
"""Values that share one float32 scale: moments in 8 bits (arXiv 2110.02861), weights in nf4 (arXiv 2305.14314)."""


@dataclass(frozen=True, slots=True)
class Weights:
    """How many numbers a network has."""

    values: int
    """All of them."""
    linear: int = 0
    """Those in the matrices of linear layers."""
    outputs: int = 0
    """Outputs of all linear layers."""

    def __add__(self, other: Weights) -> Weights:
        return Weights(self.values + other.values, self.linear + other.linear, self.outputs + other.outputs)

    def times(self, count: int) -> Weights:
        """``count`` such networks; negative to subtract them."""
        return Weights(self.values * count, self.linear * count, self.outputs * count)


def depth_plan(depths: Mapping[str, int], *, shallow: int) -> list[tuple[int, dict[str, int]]]:
    """Return shallow depths, each with the coefficient by which its counts enter the count at full depth.

    With repeated blocks of equal shape, a count F (numbers, bytes kept, operations) is a constant plus a multiple of
    each depth n_k. So F(n) = F(b) + sum_k (n_k - b_k) (F(b + e_k) - F(b)) for any b, where e_k adds one block of kind
    k. Collected by depths, these factors are the coefficients; they add up to 1.

    Args:
        depths: kind of block -> number of blocks.
        shallow: the most blocks of a kind in b. A kind with at most one more keeps its depth.
    """
    base = {kind: count if count <= shallow + 1 else shallow for kind, count in depths.items()}
    plan = [(depths[kind] - count, {**base, kind: count + 1}) for kind, count in base.items() if depths[kind] > count]
    return [(1 - sum(coefficient for coefficient, _ in plan), base), *plan]


def weight_bytes(weights: Weights, *, width: int, storage: Storage = "none") -> int:
    """Return the bytes of frozen weights.

    In ``int8`` and ``fp8`` the matrix of a linear layer takes one byte per number and a float32 scale per output, in
    ``nf4`` half a byte per number and a float32 scale per 64 numbers. Everything else keeps its dtype.

    Args:
        weights: of the network.
        width: bytes per number that is not quantised.
        storage: how the matrices of linear layers are stored.
    """
    rest = (weights.values - weights.linear) * width
    if storage == "none":
        return rest + weights.linear * width
    if storage == "nf4":
        return rest + -(-weights.linear // 2) + -(-weights.linear // _BLOCK_NF4) * _FLOAT32
    return rest + weights.linear + weights.outputs * _FLOAT32


@dataclass(frozen=True, slots=True)
class AdapterBytes:
    """Bytes that training an adapter takes, activations aside."""

    weights: int
    gradients: int
    optimizer: int
    average: int

    @property
    def total(self) -> int:
        """All four."""
        return self.weights + self.gradients + self.optimizer + self.average


def adapter_bytes(values: int, *, eight_bit: bool = False) -> AdapterBytes:
    """Return the bytes of an adapter of ``values`` numbers: weights, gradients and average, and AdamW's two moments.

    All are float32, but moments may take 8 bits each and a float32 scale per 256 numbers. (The optimizer keeps matrices
    under 4,096 numbers at 32 bits; the estimate ignores that.)
    """
    own = values * _FLOAT32
    moments = _MOMENTS * (values + -(-values // _BLOCK_8BIT) * _FLOAT32) if eight_bit else _MOMENTS * own
    return AdapterBytes(weights=own, gradients=own, optimizer=moments, average=own)


def group_step_flops(*, images: int, reference: float, policy: float, update: float, two_pass: bool) -> float:
    """Return the operations of an optimizer step on stored groups.

    Each of the ``images`` takes one forward pass of the ``reference``, and one forward and backward pass of the policy,
    the ``update``, recomputed activations included. The two-pass gradient takes another forward pass of the ``policy``,
    for the errors that give the weights of the images. All three are operations of one image.
    """
    return images * (reference + (policy if two_pass else 0.0) + update)


def gpu_hours(flops: float) -> float:
    """Return the hours that one GPU takes at ``SUSTAINED_TFLOPS``."""
    return flops / (SUSTAINED_TFLOPS * 1e12) / 3600


def usable_bytes(card: int) -> float:
    """Return the share ``USABLE`` of a card of so many GiB, in bytes."""
    return USABLE * card * 2**30


def fits(needed: float) -> tuple[int, ...]:
    """Return the ``CARDS`` (GiB) of which ``needed`` bytes fill at most the share ``USABLE``."""
    return tuple(card for card in CARDS if needed <= usable_bytes(card))
