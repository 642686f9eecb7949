"""A linear layer with one or two adapters: peft's layer, computed with fewer passes over memory."""

from __future__ import annotations

from typing import cast

import torch
from peft.tuners.lora.layer import Linear
from torch import Tensor, nn
from torch.nn import functional

_WIDE_RANK = 6
"""A layer is computed as one weight if ``6 r (in + out) >= in out``; measured at widths from 64 to 1152."""


class LoraLinear(Linear):
    """``W x + b + s B A x``, in one of two forms. A frozen initial adapter adds such a term before the trained one.

    - One weight, ``(W + s B A) x + b``, in float32 where the ranks are a large part of the width.
    - Otherwise ``s B (A x)`` is added in place to ``W x + b``, without peft's copies of x, the product and the sum.

    Both differ from peft's own form by rounding. Instances are made by changing the class of peft's layers, which adds
    no state to them.
    """

    _folded = False

    def forward(self, x: Tensor) -> Tensor:
        """[..., in] -> [..., out]."""
        base, terms = self._base, self._terms()
        if self._folded or not terms:
            result: Tensor = base(x)
            return result
        # Of all adapters, on or off: the reference is computed in the policy's form, so that both round alike.
        if self.is_one_weight(rank=sum(len(cast(Tensor, down.weight)) for down in self.lora_A.values())):
            weight: Tensor = base.weight
            for down, up, scale in terms:
                weight = torch.addmm(weight, up, down, alpha=scale)
            return functional.linear(x, weight, base.bias)
        rows = x.flatten(0, -2)
        product: Tensor = base(rows)
        for down, up, scale in terms:
            inner = functional.linear(rows, down.to(x.dtype)).to(product.dtype)
            product.addmm_(inner, up.to(product.dtype).t(), alpha=scale)
        return product.view(*x.shape[:-1], product.shape[-1])  # x may have no row: an expert that no token goes to

    @property
    def can_fold(self) -> bool:
        """Whether an adapter is on, and W is neither quantised nor sharded."""
        return self._has_plain_weight() and not self._folded and bool(self._terms())

    @torch.no_grad()
    def fold(self) -> Tensor:
        """Write W + s B A into W, in W's dtype, and return a copy of W in host memory, which ``unfold`` takes."""
        weight = self._base.weight
        kept, total = weight.to("cpu", copy=True), weight.float()
        for down, up, scale in self._terms():
            total = torch.addmm(total, up.to(weight.device), down.to(weight.device), alpha=scale)
        weight.copy_(total)
        self._folded = True
        return kept

    @torch.no_grad()
    def unfold(self, weight: Tensor) -> None:
        """Undo ``fold``."""
        self._base.weight.copy_(weight)
        self._folded = False

    def is_one_weight(self, rank: int) -> bool:
        """Whether the layer is computed in the first form."""
        weight = self._base.weight
        # In half precision W + s B A would be rounded in every training step.
        if weight.dtype != torch.float32 or not self._has_plain_weight():
            return False
        return _WIDE_RANK * rank * sum(weight.shape) >= weight.numel()

    @property
    def _base(self) -> nn.Linear:
        return cast(nn.Linear, self.base_layer)

    def _terms(self) -> list[tuple[Tensor, Tensor, float]]:
        """A [r, in], B [out, r] and s of each adapter that is on."""
        names = [] if self._disable_adapters else [name for name in self.active_adapters if name in self.lora_A]
        return [
            (cast(Tensor, self.lora_A[name].weight), cast(Tensor, self.lora_B[name].weight), self.scaling[name])
            for name in names
        ]

    def _has_plain_weight(self) -> bool:
        weight = self._base.weight
        return type(self._base) is nn.Linear and type(weight.data) is Tensor and weight.dtype.itemsize > 1


def use_own_class(layer: Linear) -> None:
    """Compute a layer of peft as ``LoraLinear``; layers of bitsandbytes and torchao have classes of their own."""
    if type(layer) is Linear:
        layer.__class__ = LoraLinear
