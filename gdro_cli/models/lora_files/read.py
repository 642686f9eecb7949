"""Read an adapter file of diffusers."""

from __future__ import annotations

import json
import math
from pathlib import Path

from gdro_cli.errors import PrerequisiteError, StoreError
from gdro_cli.models.adapters import LORA_FILE
from gdro_cli.models.lora_files.adapter import Adapter

_PREFIX = "transformer."


def read_adapter(path: Path) -> Adapter:
    """Read an adapter in diffusers' format, with metadata.

    Args:
        path: a safetensors file, or a folder with one.

    Raises:
        PrerequisiteError: there is no such file.
        StoreError: it is damaged or of another format.
    """
    from safetensors import SafetensorError, safe_open

    file = _file(path)
    try:
        with safe_open(file, "pt") as opened:
            definition = json.loads(opened.metadata()["lora_adapter_metadata"])
            tensors = {name: opened.get_tensor(name).float() for name in opened.keys()}  # noqa: SIM118 (no mapping)
        rank, alpha = int(definition[f"{_PREFIX}r"]), float(definition[f"{_PREFIX}lora_alpha"])
        scale = alpha / (math.sqrt(rank) if definition[f"{_PREFIX}use_rslora"] else rank)
        layers = sorted({name.removeprefix(_PREFIX).rsplit(".lora_", 1)[0] for name in tensors})
        names = {layer: [f"{_PREFIX}{layer}.lora_{side}.weight" for side in "AB"] for layer in layers}
        pairs = {layer: (tensors.pop(a), tensors.pop(b)) for layer, (a, b) in names.items()}
        if tensors or not pairs or not all(a.ndim == b.ndim == 2 and len(a) == b.shape[1] for a, b in pairs.values()):
            raise ValueError("A and B do not fit")
    except (OSError, KeyError, ValueError, TypeError, ZeroDivisionError, SafetensorError) as error:
        raise StoreError(
            f"{file} is not an adapter that can be used ({error}): take another copy of the file"
        ) from error
    return Adapter(pairs, dict.fromkeys(pairs, scale))


def _file(path: Path) -> Path:
    if path.is_dir():
        found = [path / LORA_FILE] if (path / LORA_FILE).is_file() else sorted(path.glob("*.safetensors"))
        if len(found) != 1:
            raise PrerequisiteError(f"{path} contains {len(found)} adapter files: name the file")
        return found[0]
    if not path.is_file():
        raise PrerequisiteError(f"there is no adapter {path}: name a safetensors file, or a folder with one")
    return path
