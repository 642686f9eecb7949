"""What people have instead of a pipeline folder, named for what it is, with the way to a pipeline folder."""

from __future__ import annotations

import json
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

INDEX = "model_index.json"

_CHECKPOINTS = (".safetensors", ".ckpt", ".pt", ".pth", ".bin", ".gguf", ".sft")
_MERGE = "load it into its base with diffusers (`load_lora_weights`, `fuse_lora`, `save_pretrained(FOLDER)`)"
_SINGLE = (
    "open it with diffusers, and name the folder that it writes: `FluxPipeline.from_single_file(FILE)"
    ".save_pretrained(FOLDER)`, with the pipeline class of the model"
)


def other_form(path: Path) -> str | None:
    """What a path without ``model_index.json`` is, and what to do, as the end of a sentence; None if unknown."""
    if path.is_file():
        return _file(path) if path.suffix.lower() in _CHECKPOINTS else "a file, not a folder: name a pipeline folder"
    if not path.is_dir() or (path / INDEX).is_file():
        return None
    names = {file.name for file in path.iterdir()}
    if {"manifest.json", "recipe.json"} <= names:
        return f"a run of gdro, which has no base: make a pipeline folder with `gdro export {path} --merge FOLDER`"
    if "adapter_config.json" in names:
        base = _base_of(path / "adapter_config.json")
        return f"an adapter of peft{f' for {base}' if base else ''}: {_MERGE}"
    if (path.parent / INDEX).is_file():
        return f"one component of the pipeline {path.parent}: name that folder"
    if path.name.startswith("models--") and "snapshots" in names:
        name = "/".join(path.name.split("--")[1:])
        return f"the Hub's cache of {name}: name {name}, or one of the folders in {path / 'snapshots'}"
    if "config.json" in names:
        return "one component or a model of another kind: name the folder that holds the whole pipeline"
    weights = sorted(file for file in path.iterdir() if file.suffix.lower() in _CHECKPOINTS)
    if len(weights) == 1:
        form = _file(weights[0])
        return f"a folder with {weights[0].name} alone, {form}"
    return None


def _file(path: Path) -> str:
    if any("lora" in name.lower() for name in _tensor_names(path)):
        return f"an adapter: {_MERGE}"
    return f"a single file of weights: {_SINGLE}"


def _tensor_names(path: Path) -> Iterable[str]:
    """Names of the tensors in a safetensors file; none if it is not one."""
    from safetensors import SafetensorError, safe_open

    with suppress(SafetensorError, OSError), safe_open(path, "pt") as file:
        return tuple(file.keys())
    return ()


def _base_of(config: Path) -> str | None:
    """The base that an adapter's configuration names."""
    with suppress(OSError, ValueError, AttributeError):
        base = json.loads(config.read_text(encoding="utf-8")).get("base_model_name_or_path")
        return base[:80] if isinstance(base, str) and base else None
    return None
