"""Write an adapter as a file for diffusers, peft, ComfyUI or kohya's tools.

Each has s = 1, that is B times s and alpha = rank, so that a reader that ignores the scale gives the same model.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from gdro_cli.files import write_json, write_tensors
from gdro_cli.models.adapters import LORA_FILE, write_lora
from gdro_cli.models.lora_files.adapter import Adapter
from gdro_cli.models.lora_files.original_names import to_original
from gdro_cli.models.lora_files.read import (
    DIFFUSERS_PREFIX,
    KOHYA_PREFIX,
    ORIGINAL_PREFIX,
    PEFT_CONFIG,
    PEFT_FILE,
    PEFT_PREFIX,
)

Format = Literal["diffusers", "peft", "comfyui", "kohya"]
FORMATS: tuple[Format, ...] = get_args(Format)

_ORIGINAL_IN_COMFYUI = ("chroma", "flux2", "flux2-klein", "lumina2", "sana")
"""Families of which ComfyUI does not know every layer by diffusers' name."""


@dataclass(frozen=True, slots=True)
class AdapterFile:
    """An adapter as the tensors of a file, before it is written."""

    name: str
    tensors: Mapping[str, Tensor]
    format: Format
    definition: Mapping[str, Any]
    """As peft's configuration of the adapter; diffusers keeps it in the metadata."""

    @property
    def size(self) -> int:
        """Bytes of the tensors."""
        return sum(tensor.nbytes for tensor in self.tensors.values())

    def write(self, folder: Path) -> None:
        """Write the file, and for peft its configuration, into an existing folder. Raises StoreError."""
        if self.format == "diffusers":
            write_lora(folder / self.name, self.tensors, self.definition)
            return
        write_tensors(folder / self.name, self.tensors, metadata={"format": "pt"})
        if self.format == "peft":
            write_json(folder / PEFT_CONFIG, self.definition)


def adapter_file(adapter: Adapter, format: Format, *, family: str, stem: str) -> AdapterFile:
    """Convert an adapter to a format.

    Args:
        adapter: the adapter.
        format: whose names to use. ComfyUI reads diffusers' names for most families; kohya's tools have the models'
            original ones, and adapt only layers of the repeated blocks.
        family: the model's family, as ``FlowModel.family``.
        stem: name of a file whose tool prescribes none.

    Raises:
        UserError: the format cannot hold a layer.
    """
    pairs = adapter.folded()
    definition = _definition(pairs)
    if format == "diffusers":
        return AdapterFile(LORA_FILE, _named(pairs, DIFFUSERS_PREFIX), format, definition)
    if format == "peft":
        return AdapterFile(PEFT_FILE, _named(pairs, PEFT_PREFIX), format, definition)
    name = f"{stem}.safetensors"
    if format == "kohya":
        original = to_original(pairs, family, blocks_only=True)
        flat = {KOHYA_PREFIX + layer.replace(".", "_"): pair for layer, pair in original.items()}
        alphas = {f"{layer}.alpha": torch.tensor(float(len(down))) for layer, (down, _) in flat.items()}
        return AdapterFile(name, _named(flat, "", ("lora_down", "lora_up")) | alphas, format, definition)
    if family in _ORIGINAL_IN_COMFYUI:
        return AdapterFile(name, _named(to_original(pairs, family), ORIGINAL_PREFIX), format, definition)
    return AdapterFile(name, _named(pairs, DIFFUSERS_PREFIX), format, definition)


def _named(
    pairs: Mapping[str, tuple[Tensor, Tensor]], prefix: str, sides: tuple[str, str] = ("lora_A", "lora_B")
) -> dict[str, Tensor]:
    return {
        f"{prefix}{layer}.{side}.weight": tensor
        for layer, pair in pairs.items()
        for side, tensor in zip(sides, pair, strict=True)
    }


def _definition(pairs: Mapping[str, tuple[Tensor, Tensor]]) -> dict[str, Any]:
    """peft's configuration: the keys that define the adapter, since an older peft refuses keys that it lacks."""
    ranks = {layer: len(down) for layer, (down, _) in pairs.items()}
    rank = max(ranks.values())
    definition = {
        "peft_type": "LORA",
        "r": rank,
        "lora_alpha": rank,
        "use_rslora": False,
        "target_modules": sorted(ranks),
    }
    others = {f"^{layer}": own for layer, own in ranks.items() if own != rank}
    return definition | ({"rank_pattern": others, "alpha_pattern": others} if others else {})
