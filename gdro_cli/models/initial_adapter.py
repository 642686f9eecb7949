"""The adapter that a training starts from: a frozen low-rank term of the model, beside the adapter that is trained.

It is neither merged into W, whose dtype would round it, nor trained. So base and reference are W + s B A.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from gdro_cli.errors import UserError

INITIAL = "initial"
"""The adapter's name in peft's layers."""


@dataclass(frozen=True)
class InitialAdapter:
    """A trained adapter, to be kept frozen."""

    path: Path
    """Its file, or the folder of that."""
    pairs: Mapping[str, tuple[Tensor, Tensor]]
    """Layer -> (A [r, in], s B [out, r]), float32."""

    @cached_property
    def digest(self) -> str:
        """SHA-256 of its layers and numbers, whatever the format of its file."""
        whole = hashlib.sha256()
        for layer, pair in sorted(self.pairs.items()):
            for matrix in pair:
                whole.update(f"{layer} {list(matrix.shape)}\n".encode())
                whole.update(matrix.numpy().tobytes())
        return whole.hexdigest()

    @property
    def values(self) -> int:
        """How many numbers it has."""
        return sum(down.numel() + up.numel() for down, up in self.pairs.values())

    def check(self, transformer: nn.Module) -> None:
        """Compare its layers and shapes with those of a transformer, which may be on the meta device.

        Raises:
            UserError: a layer is missing there, or is of another shape.
        """
        modules = dict(transformer.named_modules())
        for layer, (down, up) in self.pairs.items():
            linear = modules.get(layer)
            if not isinstance(linear, nn.Linear):
                raise UserError(
                    f"{self.path} changes {layer}, but the transformer has no such linear layer: use an adapter of this"
                    " model"
                )
            own, wanted = (len(up), down.shape[1]), (linear.out_features, linear.in_features)
            if own != wanted:
                raise UserError(
                    f"{self.path} has {own[0]} x {own[1]} numbers for {layer}, but the transformer has"
                    f" {wanted[0]} x {wanted[1]}: use an adapter of this model"
                )

    def attach(self, transformer: Any) -> None:
        """Add it to a frozen transformer that has no adapter yet, float32, on the transformer's device."""
        from peft import LoraConfig

        from gdro_cli.models.lora_linear import use_own_class

        names = "|".join(re.escape(layer) for layer in self.pairs)
        config = LoraConfig(r=1, lora_alpha=1, target_modules=names, init_lora_weights=False, inference_mode=True)
        transformer.add_adapter(config, adapter_name=INITIAL)
        for name, pair in self.pairs.items():
            layer = transformer.get_submodule(name)
            for matrices, value in zip((layer.lora_A, layer.lora_B), pair, strict=True):
                device = matrices[INITIAL].weight.device
                matrices[INITIAL].weight = nn.Parameter(value.to(device, torch.float32), requires_grad=False)
            use_own_class(layer)
