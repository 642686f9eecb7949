"""The adapter that a training starts from: a frozen low-rank term of the model, beside the adapter that is trained.

It is neither merged into W, whose dtype would round it, nor trained. So base and reference are W + s B A.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from gdro_cli.errors import PrerequisiteError, UserError
from gdro_cli.model_source import files_digest
from gdro_cli.models.lora_files import read_adapter

INITIAL = "initial"
"""The adapter's name in peft's layers."""

_KEY = "train.lora.init"
_FILES = ("pytorch_lora_weights.safetensors", "adapter_model.safetensors")
"""The adapter's file in a folder of diffusers and in one of peft."""
_PEFT_CONFIG = "adapter_config.json"
"""Holds alpha beside a file of peft."""


@dataclass(frozen=True, slots=True)
class InitialAdapter:
    """A trained adapter, to be kept frozen."""

    path: Path
    """Its file."""
    digest: str
    """SHA-256 of its file, and of the configuration that belongs to it."""
    pairs: Mapping[str, tuple[Tensor, Tensor]]
    """Layer -> (A [r, in], s B [out, r]), float32."""

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
                    f"{_KEY}: {self.path} changes {layer}, but the transformer has no such linear layer: use an adapter"
                    " of this model"
                )
            own, wanted = (len(up), down.shape[1]), (linear.out_features, linear.in_features)
            if own != wanted:
                raise UserError(
                    f"{_KEY}: {self.path} has {own[0]} x {own[1]} numbers for {layer}, but the transformer has"
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


def open_initial_adapter(path: Path) -> InitialAdapter:
    """Read an adapter from its file, or from a folder that holds one, such as a finished run.

    Raises:
        PrerequisiteError: there is no such file.
        StoreError: the file is damaged or of an unknown format.
    """
    file = _file(path)
    adapter = read_adapter(file)
    pairs = {layer: (down, adapter.scales[layer] * up) for layer, (down, up) in adapter.pairs.items()}
    files = {"weights": file, "config": file.with_name(_PEFT_CONFIG)}
    return InitialAdapter(file, files_digest({name: path for name, path in files.items() if path.is_file()}), pairs)


def _file(path: Path) -> Path:
    if path.is_file():
        return path
    if not path.is_dir():
        raise PrerequisiteError(f"{_KEY} names {path}, which does not exist: correct the path")
    known = next((path / name for name in _FILES if (path / name).is_file()), None)
    files = [known] if known is not None else sorted(path.glob("*.safetensors"))
    if len(files) != 1:
        found = "several .safetensors files" if files else "no adapter (a .safetensors file)"
        raise PrerequisiteError(f"{_KEY} names {path}, which has {found}: name the adapter's file")
    return files[0]
