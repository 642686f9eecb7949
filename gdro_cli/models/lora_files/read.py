"""Read an adapter file of diffusers, peft, ComfyUI, kohya's tools or a training script; its keys say which it is."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from gdro_cli.errors import PrerequisiteError, StoreError, UserError
from gdro_cli.files import parse_json, read_object
from gdro_cli.models.adapters import LORA_FILE
from gdro_cli.models.lora_files.adapter import Adapter
from gdro_cli.models.lora_files.original_names import Pair, from_original, recognise

PEFT_FILE, PEFT_CONFIG = "adapter_model.safetensors", "adapter_config.json"
PEFT_PREFIX, DIFFUSERS_PREFIX = "base_model.model.", "transformer."
ORIGINAL_PREFIX, KOHYA_PREFIX = "diffusion_model.", "lora_unet_"
METADATA = "lora_adapter_metadata"
"""Entry of a file's metadata in which diffusers keeps rank and scale."""

_PREFIXES = (PEFT_PREFIX, DIFFUSERS_PREFIX, ORIGINAL_PREFIX, KOHYA_PREFIX)
_KEY = re.compile(r"(.+)\.(?:lora_(A|B|down|up)(?:\.default)?\.weight|(alpha))")
_SIDES = {"A": "A", "down": "A", "B": "B", "up": "B"}
_TEXT_ENCODER = re.compile(r"lora_te\d*_|te\d*_|text_encoders?(_\d)?\.|text_model\.|conditioner\.")
_KINDS = {"lokr_": "LoKr", "hada_": "LoHa", "oft_": "OFT", "dora_scale": "DoRA", "magnitude_vector": "DoRA"}
"""Marks in the keys of adapters that are not ``W + s B A``."""
_ORIGINAL = ("flux", "chroma", "flux2-klein", "sd3")
"""Families that ``recognise`` knows by original names alone; the others share names with diffusers."""
_OTHER_BASES = ("pissa", "olora", "corda", "loftq")
"""Initialisations of peft that change the base's own weights."""
_BAD = (AttributeError, KeyError, OverflowError, TypeError, ValueError, re.error)
"""What a configuration with wrong values ends in."""
_ONLY = "only LoRA (matrices A and B) can be read"


def read_adapter(path: Path) -> Adapter:
    """Read an adapter of a transformer.

    Known by its keys: diffusers (``transformer.LAYER.lora_A.weight``), peft (``base_model.model.``, with the
    configuration beside the file), the models' original names (``diffusion_model.``), kohya (``lora_unet_``, with
    underscores), and bare layer names. Layers that the original code joins are split into diffusers' layers.

    The scale of a layer is that of its tensor ``alpha``, else of diffusers' metadata or peft's configuration, else 1.
    peft always writes its configuration; files with its prefix, original names and no configuration come from other
    trainers, and every reader takes their scale as 1.

    Args:
        path: a safetensors file, or a folder with one.

    Raises:
        PrerequisiteError: there is no such file, or peft's configuration is missing.
        UserError: the file is something else than a LoRA of a transformer, or more than that.
        StoreError: it is damaged.
    """
    file = _file(path)
    raw, alphas, metadata = _tensors(file)
    family = recognise({_bare(key): pair for key, pair in raw.items()})
    unscaled = [key for key in raw if key not in alphas]
    config_scale = _config_scale(file, unscaled, metadata, is_original=family in _ORIGINAL)
    pairs: dict[str, Pair] = {}
    scales: dict[str, float] = {}
    for key, (down, up) in raw.items():
        name, rank = _bare(key), len(down)
        try:
            layers = None if family is None else from_original(name, (down, up), family)
            scale = alphas[key] / rank if key in alphas else config_scale(name, rank)
        except _BAD as error:
            raise _damaged(file, f"{key}: {error}") from error
        if not math.isfinite(scale):
            raise _damaged(file, f"{key} has the scale {scale}")
        if layers is None and (key.startswith("lora_") or family in _ORIGINAL):
            raise UserError(
                f"{file} names a layer that gdro_cli does not know, {key}: give an adapter of this model, or its form"
                " for diffusers"
            )
        for layer, pair in (layers or {name: (down, up)}).items():
            if layer in pairs:
                raise _damaged(file, f"{layer} is in it twice")
            pairs[layer], scales[layer] = pair, scale
    return Adapter(pairs, scales)


def _file(path: Path) -> Path:
    """The adapter file that ``path`` names."""
    if path.is_dir():
        found = [path / name for name in (LORA_FILE, PEFT_FILE) if (path / name).is_file()]
        found = found or sorted(path.glob("*.safetensors"))
        if len(found) != 1:
            what = f"contains {len(found)} adapter files" if found else "contains no adapter file"
            raise PrerequisiteError(f"{path} {what}: name the file")
        return found[0]
    if not path.is_file():
        raise PrerequisiteError(f"there is no adapter {path}: name a safetensors file, or a folder with one")
    return path


def _tensors(file: Path) -> tuple[dict[str, Pair], dict[str, float], Mapping[str, str]]:
    """Layer with its prefix -> (A, B); layer -> alpha; the file's metadata."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(file, "pt") as opened:
            keys = sorted(opened.keys())
            _refuse_other_kinds(file, keys)
            tensors = {key: opened.get_tensor(key).float() for key in keys}
            metadata = opened.metadata() or {}
    except (OSError, SafetensorError) as error:
        raise _damaged(file, f"it is not a whole safetensors file: {error}") from error
    alphas: dict[str, float] = {}
    sides: dict[str, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        [(layer, side, alpha)] = _KEY.findall(key)
        if not alpha:
            sides.setdefault(layer, {})[_SIDES[side]] = tensor
        elif tensor.numel() == 1:
            alphas[layer] = tensor.item()
        else:
            raise _damaged(file, f"{key} is not a number")
    for layer in sides.keys() | alphas.keys():
        if sides.get(layer, {}).keys() != {"A", "B"}:
            raise _damaged(file, f"{layer} lacks A or B")
    pairs = {layer: (side["A"], side["B"]) for layer, side in sides.items()}
    for layer, (down, up) in pairs.items():
        if down.ndim > 2:
            raise UserError(f"{file} adapts the convolution {layer}: only adapters of linear layers can be read")
        if not (down.ndim == up.ndim == 2 and len(down) == up.shape[1] >= 1):
            raise _damaged(file, f"A and B of {layer} do not fit")
        if not (down.isfinite().all() and up.isfinite().all()):
            raise _damaged(file, f"{layer} has numbers that are not finite, as after a training that diverged")
    return pairs, alphas, metadata


def _refuse_other_kinds(file: Path, keys: list[str]) -> None:
    """Raise UserError unless every key is one of a transformer's LoRA."""
    text = [key for key in keys if _TEXT_ENCODER.match(key)]
    if text:
        raise UserError(
            f"{file} also adapts text encoders, with {len(text)} of its {len(keys)} tensors, such as {text[0]}:"
            " give an adapter of the transformer alone"
        )
    kind = next((kind for key in keys for mark, kind in _KINDS.items() if mark in key), None)
    if kind is not None:
        raise UserError(f"{file} is a {kind} adapter: {_ONLY}")
    others = [key for key in keys if not _KEY.fullmatch(key)]
    if len(others) == len(keys):
        raise UserError(f"{file} is not an adapter ({f'it has {keys[0]}' if keys else 'it is empty'}): {_ONLY}")
    if others:
        raise UserError(f"{file} has {len(others)} tensors beside the LoRA's, such as {others[0]}: {_ONLY}")


def _config_scale(
    file: Path, unscaled: Sequence[str], metadata: Mapping[str, str], *, is_original: bool
) -> Callable[[str, int], float]:
    """The scale of a layer, from its name and rank, as the file's configuration defines it."""
    config: dict[str, Any] = {}
    beside = file.with_name(PEFT_CONFIG)
    if any(key.startswith(PEFT_PREFIX) for key in unscaled) and (beside.is_file() or not is_original):
        if not beside.is_file():
            raise PrerequisiteError(f"{file} has no {PEFT_CONFIG} beside it, which holds its scale: fetch that file")
        config = read_object(beside, remedy="fetch the adapter's folder again")
    elif METADATA in metadata:
        try:
            stored = parse_json(metadata[METADATA]).items()
        except _BAD as error:
            raise _damaged(file, f"its {METADATA} cannot be read") from error
        config = {name.removeprefix(DIFFUSERS_PREFIX): value for name, value in stored}
    if not config:
        return lambda layer, rank: 1.0
    kind = str(config.get("peft_type", "LORA"))
    if kind.upper() != "LORA" or config.get("use_dora"):
        raise UserError(f"{file} is a {'DoRA' if config.get('use_dora') else kind} adapter: {_ONLY}")
    if str(config.get("init_lora_weights")).lower().startswith(_OTHER_BASES):
        start = config["init_lora_weights"]
        raise UserError(f"{file} began from {start}, which also changes the model's own weights: {_ONLY}")

    def scale(layer: str, rank: int) -> float:
        from peft.utils.other import get_pattern_key

        alphas: dict[str, Any] = config.get("alpha_pattern") or {}
        alpha: Any = alphas.get(get_pattern_key(list(alphas), layer), config["lora_alpha"])
        return float(alpha) / (math.sqrt(rank) if config.get("use_rslora") else rank)

    return scale


def _bare(key: str) -> str:
    return next((key.removeprefix(prefix) for prefix in _PREFIXES if key.startswith(prefix)), key)


def _damaged(file: Path, reason: str) -> StoreError:
    return StoreError(f"{file} is not an adapter that can be used ({reason}): take another copy of the file")
