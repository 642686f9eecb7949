"""What a job needs, from counts: bytes of weights and of the adapter's training, operations, GPU hours.

Gigabytes are 1e9 bytes; the memory of a card is given in GiB, 2**30 bytes, as its makers mean it. Operations are
floating-point operations, a multiplication and an addition counted as two.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Literal

Storage = Literal["none", "int8", "fp8", "nf4"]

CARDS = (24, 48, 80)
"""Memory of common GPUs, GiB: RTX 3090 and 4090; A6000, L40S; A100, H100."""
USABLE = 0.9
"""Share of a card that an estimate may fill; the rest is for the CUDA context, kernels' workspaces and fragments."""
SUSTAINED_TFLOPS = 125.0
"""Assumed speed of one GPU, 1e12 operations per second: 40 % of the 312 that an A100's data sheet gives for dense
bfloat16 products. An assumption, not a measurement."""
_FLOAT32 = 4
_MOMENTS = 2
_BLOCK_8BIT, _BLOCK_NF4 = 256, 64
"""Values that share one float32 scale: moments in 8 bits (arXiv 2110.02861), weights in nf4 (arXiv 2305.14314)."""


@dataclass(frozen=True, slots=True)
class Weights:
    """How many numbers a network holds."""

    values: int
    """All of them."""
    linear: int = 0
    """Those in the matrices of its linear layers."""
    outputs: int = 0
    """Outputs of its linear layers, together."""
    largest: int = 0
    """Numbers in the matrix of the largest linear layer."""

    def __add__(self, other: Weights) -> Weights:
        return Weights(
            self.values + other.values,
            self.linear + other.linear,
            self.outputs + other.outputs,
            max(self.largest, other.largest),
        )

    def times(self, count: int) -> Weights:
        """So many of them, or so many less."""
        return Weights(self.values * count, self.linear * count, self.outputs * count, self.largest)


def depth_plan(depths: Mapping[str, int], *, shallow: int) -> list[tuple[int, dict[str, int]]]:
    """Shallow depths from which whatever is affine in each depth follows at full depth: (coefficient, depths).

    With repeated blocks of equal shape, a count F (numbers, bytes kept, operations) is a constant plus a multiple of
    each depth n_k. So F(n) = F(b) + sum_k (n_k - b_k) (F(b + e_k) - F(b)) for any b, with e_k one block more of kind k;
    gathered by depths, these are the coefficients, which add up to 1.

    Args:
        depths: kind of block -> how many there are.
        shallow: the most blocks of a kind in b; kinds with no more than one above that stay as they are.
    """
    base = {kind: count if count <= shallow + 1 else shallow for kind, count in depths.items()}
    plan = [(depths[kind] - count, {**base, kind: count + 1}) for kind, count in base.items() if depths[kind] > count]
    return [(1 - sum(coefficient for coefficient, _ in plan), base), *plan]


def weight_bytes(weights: Weights, *, width: int, storage: Storage = "none") -> int:
    """Bytes of frozen weights.

    ``int8`` and ``fp8``: one byte per number of a linear layer's matrix and a float32 scale per output; ``nf4``: half a
    byte and a float32 scale per 64 numbers. Everything else keeps its dtype.

    Args:
        weights: of the network.
        width: bytes per number where nothing is quantised.
        storage: of the linear layers' matrices.
    """
    rest = (weights.values - weights.linear) * width
    if storage == "none":
        return rest + weights.linear * width
    if storage == "nf4":
        return rest + -(-weights.linear // 2) + -(-weights.linear // _BLOCK_NF4) * _FLOAT32
    return rest + weights.linear + weights.outputs * _FLOAT32


def unpacked_bytes(weights: Weights, *, width: int, storage: Storage) -> int:
    """Bytes of the largest quantised matrix in the dtype in which it is multiplied: one is unpacked at a time."""
    return 0 if storage == "none" else weights.largest * width


@dataclass(frozen=True, slots=True)
class AdapterBytes:
    """Bytes that training an adapter takes beside activations."""

    weights: int
    gradients: int
    optimizer: int
    average: int

    @property
    def total(self) -> int:
        """All four."""
        return self.weights + self.gradients + self.optimizer + self.average


def adapter_bytes(values: int, *, eight_bit: bool = False) -> AdapterBytes:
    """Bytes of an adapter of so many numbers: itself, gradients and average in float32, and AdamW's two moments.

    The moments are float32, or 8 bits each and a float32 scale per 256 numbers (matrices of under 4,096 numbers, which
    keep 32 bits, are taken for larger ones).
    """
    own = values * _FLOAT32
    moments = _MOMENTS * (values + -(-values // _BLOCK_8BIT) * _FLOAT32) if eight_bit else _MOMENTS * own
    return AdapterBytes(weights=own, gradients=own, optimizer=moments, average=own)


def sampling_flops(*, images: int, steps: int, passes: int, forward: float) -> float:
    """Operations to draw images: each takes ``passes`` forward passes (2 with classifier-free guidance) per step.

    Args:
        images: how many.
        steps: sampling steps of each.
        passes: forward passes per step.
        forward: operations of one image's forward pass.
    """
    return float(images) * steps * passes * forward


def group_step_flops(*, images: int, reference: float, policy: float, update: float, two_pass: bool) -> float:
    """Operations of an optimizer step on stored groups.

    Each image takes a forward pass of the reference, and one forward and backward pass of the policy; the two-pass
    gradient takes one more forward pass of the policy, for the errors from which the weights of the images follow.

    Args:
        images: of the step, groups times K.
        reference: operations of one image's forward pass with the adapter off.
        policy: the same with the adapter on.
        update: forward and backward pass of one image, recomputed activations included.
        two_pass: which gradient.
    """
    return images * (reference + (policy if two_pass else 0.0) + update)


def gpu_hours(flops: float, *, tflops: float = SUSTAINED_TFLOPS) -> float:
    """Hours that one GPU takes at a sustained speed of ``tflops`` times 1e12 operations per second."""
    return flops / (tflops * 1e12) / 3600


def fits(needed: float, cards: Iterable[int] = CARDS) -> tuple[int, ...]:
    """The cards (GiB) of which ``needed`` bytes fill no more than ``USABLE``."""
    return tuple(card for card in cards if needed <= USABLE * card * 2**30)
