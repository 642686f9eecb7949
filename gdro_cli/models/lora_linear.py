"""A linear layer with an adapter: peft's layer, computed with fewer passes over memory."""

from __future__ import annotations

from typing import cast

import torch
from peft.tuners.lora.layer import Linear
from torch import Tensor, nn
from torch.nn import functional

_WIDE_RANK = 6
"""A layer is computed as one weight if ``6 r (in + out) >= in out``; measured at widths from 64 to 1152."""


class LoraLinear(Linear):
    """``W x + b + s B A x``, in one of two forms.

    - One weight, ``(W + s B A) x + b``, in float32 where the rank is a large part of the width.
    - Otherwise ``s B (A x)`` is added in place to ``W x + b``, without peft's copies of x, the product and the sum.

    Both differ from peft's own form by rounding. Instances are made by changing the class of peft's layers, which adds
    no state to them.
    """

    _folded = False

    def forward(self, x: Tensor) -> Tensor:
        """[..., in] -> [..., out]."""
        base = self._base
        if self._disable_adapters or self._folded:
            result: Tensor = base(x)
            return result
        down, up, scale = self._matrices()
        if self.is_one_weight(rank=len(down)):
            return functional.linear(x, torch.addmm(base.weight, up, down, alpha=scale), base.bias)
        rows = x.flatten(0, -2)
        product: Tensor = base(rows)
        inner = functional.linear(rows, down.to(x.dtype)).to(product.dtype)
        product.addmm_(inner, up.to(product.dtype).t(), alpha=scale)
        return product.view(*x.shape[:-1], -1)

    @property
    def can_fold(self) -> bool:
        """Whether the adapter is on, and W is neither quantised nor sharded."""
        return self._has_plain_weight() and not (self._disable_adapters or self._folded)

    @torch.no_grad()
    def fold(self) -> Tensor:
        """Write W + s B A into W, in W's dtype, and return a copy of W in host memory, which ``unfold`` takes."""
        weight = self._base.weight
        kept = weight.to("cpu", copy=True)
        down, up, scale = self._matrices()
        weight.copy_(torch.addmm(weight.float(), up.to(weight.device), down.to(weight.device), alpha=scale))
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

    def _matrices(self) -> tuple[Tensor, Tensor, float]:
        """A [r, in], B [out, r] and s."""
        (adapter,) = self.lora_A
        down, up = self.lora_A[adapter].weight, self.lora_B[adapter].weight
        return cast(Tensor, down), cast(Tensor, up), self.scaling[adapter]

    def _has_plain_weight(self) -> bool:
        weight = self._base.weight
        return type(self._base) is nn.Linear and type(weight.data) is Tensor and weight.dtype.itemsize > 1
