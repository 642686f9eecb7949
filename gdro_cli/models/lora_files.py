"""Adapter files: the matrices of a LoRA on a transformer, by diffusers' names of its layers."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from gdro_cli.errors import StoreError

_PREFIX = "transformer."


@dataclass(frozen=True, slots=True)
class Adapter:
    """The matrices of an adapter file."""

    pairs: Mapping[str, tuple[Tensor, Tensor]]
    """Layer, such as ``transformer_blocks.0.attn.to_q`` -> (A [r, in], B [out, r]), float32."""
    scales: Mapping[str, float]
    """Layer -> s in W + s B A."""


def read_adapter(path: Path) -> Adapter:
    """Read an adapter in diffusers' format, with metadata.

    Raises:
        StoreError: the file is damaged or of another format.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, "pt") as file:
            definition = json.loads(file.metadata()["lora_adapter_metadata"])
            tensors = {name: file.get_tensor(name).float() for name in file.keys()}  # noqa: SIM118 (not a mapping)
        rank, alpha = int(definition[f"{_PREFIX}r"]), float(definition[f"{_PREFIX}lora_alpha"])
        scale = alpha / (math.sqrt(rank) if definition[f"{_PREFIX}use_rslora"] else rank)
        layers = sorted({name.removeprefix(_PREFIX).rsplit(".lora_", 1)[0] for name in tensors})
        names = {layer: [f"{_PREFIX}{layer}.lora_{side}.weight" for side in "AB"] for layer in layers}
        pairs = {layer: (tensors.pop(a), tensors.pop(b)) for layer, (a, b) in names.items()}
        if tensors or not pairs or not all(a.ndim == b.ndim == 2 and len(a) == b.shape[1] for a, b in pairs.values()):
            raise ValueError
    except (OSError, KeyError, ValueError, TypeError, ZeroDivisionError, SafetensorError) as error:
        raise StoreError(f"{path} is not an adapter in diffusers' format with metadata: save it again") from error
    return Adapter(pairs, dict.fromkeys(pairs, scale))
