"""A copy of a pipeline folder with an adapter merged into its transformer, file by file.

``W' = W + s B A`` in float32, stored in W's own dtype. Memory holds one file of the transformer at a time, no class of
the model is loaded, and everything else is copied as it is, so what loads the base loads the copy.
"""

from __future__ import annotations

import json
import math
import os
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gdro_cli.errors import PrerequisiteError, StoreError, UserError
from gdro_cli.files import storage_errors
from gdro_cli.models.folder import PipelineFolder

_TRANSFORMER = "transformer."
_WEIGHTS = "transformer/diffusion_pytorch_model.safetensors"
_WEIGHTS_INDEX = f"{_WEIGHTS}.index.json"
_WEIGHT_ENDINGS = (".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".msgpack", ".h5", ".onnx")
"""Other weights of the transformer, such as a half-precision variant, are the base's and are not copied."""


@dataclass(frozen=True, slots=True)
class Adapter:
    """The matrices of an adapter file."""

    scale: float
    pairs: Mapping[str, tuple[Tensor, Tensor]]
    """Layer -> (A [r, in], B [out, r]), float32."""


@dataclass(slots=True)
class Merged:
    """What a merge did."""

    layers: int = 0
    """Matrices changed."""
    _asked: float = field(default=0.0, repr=False)
    _missed: float = field(default=0.0, repr=False)

    def count(self, wanted: Tensor, stored: Tensor, update: Tensor) -> None:
        """Take account of one matrix: W + s B A, what is stored of it, and s B A."""
        self.layers += 1
        self._asked += float(update.double().square().sum())
        self._missed += float((stored.double() - wanted.double()).square().sum())

    @property
    def rounding(self) -> float:
        """Length of what the base's dtype rounds away, as a share of the update's length."""
        return math.sqrt(self._missed / self._asked) if self._asked else 0.0


def read_adapter(path: Path) -> Adapter:
    """Read an adapter of the transformer in diffusers' format, as ``save_lora`` writes it.

    Raises:
        StoreError: the file is damaged or no such adapter.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load

    odd = f"{path} is no adapter that gdro_cli wrote: run `gdro train` with the run's recipe again"
    try:
        data = path.read_bytes()  # the library opens no path that is not UTF-8
        tensors = {name: value.float() for name, value in load(data).items()}
        header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
        about = json.loads(header["__metadata__"]["lora_adapter_metadata"])
        rank, alpha = int(about[f"{_TRANSFORMER}r"]), float(about[f"{_TRANSFORMER}lora_alpha"])
        rooted = bool(about[f"{_TRANSFORMER}use_rslora"])
        layers = sorted({name.removeprefix(_TRANSFORMER).rsplit(".lora_", 1)[0] for name in tensors})
        names = {layer: [f"{_TRANSFORMER}{layer}.lora_{side}.weight" for side in "AB"] for layer in layers}
        pairs = {layer: (tensors.pop(a), tensors.pop(b)) for layer, (a, b) in names.items()}
    except (OSError, KeyError, ValueError, TypeError, OverflowError, RecursionError, SafetensorError) as error:
        raise StoreError(odd) from error
    if tensors or not pairs or not (rank >= 1 and math.isfinite(alpha)):
        raise StoreError(odd)
    if not all(a.ndim == b.ndim == 2 and len(a) == b.shape[1] == rank for a, b in pairs.values()):
        raise StoreError(odd)
    return Adapter(alpha / (math.sqrt(rank) if rooted else rank), pairs)


def merge_into(
    base: PipelineFolder, adapter: Adapter, target: Path, *, check: Callable[[], None] = lambda: None
) -> Merged:
    """Write the base's files into ``target`` with the adapter in the transformer's weights.

    Args:
        base: the pipeline that the adapter was trained on.
        adapter: what is added.
        target: an existing, empty folder.
        check: called before each file and each matrix; what it raises ends the merge.

    Raises:
        PrerequisiteError: the base is incomplete, cannot be fetched, links to files elsewhere, or is another model.
        UserError: its weights are quantised, or the library for weights can open the one or the other path not at all.
        StoreError: the disk refuses.
    """
    files, merged, left = base.own_files(), Merged(), dict(adapter.pairs)
    weights = _weight_files(base, files)
    for name in sorted(weights):
        refuse_undecodable(files[name])
        refuse_undecodable(target / name)
    for name, path in files.items():
        check()
        place = target / name
        with storage_errors(place):
            place.parent.mkdir(parents=True, exist_ok=True)
            if name in weights:
                _merge_file(path, place, adapter.scale, left, merged, check)
            elif not (name.startswith("transformer/") and name.endswith(_WEIGHT_ENDINGS)):
                shutil.copyfile(path, place)
    if left:
        raise PrerequisiteError(
            f"the transformer of {base.path} lacks {len(left)} layers of the adapter, such as {next(iter(left))}:"
            " it is not the model that the run was trained on"
        )
    return merged


def refuse_undecodable(path: Path) -> None:
    """Raise UserError for a path that is not UTF-8: the library for weights does not open it."""
    try:
        str(path).encode()
    except UnicodeEncodeError as error:
        shown = os.fsencode(path).decode(errors="backslashreplace")
        raise UserError(
            f"{shown} is no path that weights can be read from or written to, because it is not UTF-8: rename the"
            " folder or name another"
        ) from error


def _weight_files(base: PipelineFolder, files: Mapping[str, Path]) -> set[str]:
    """Names of the files that hold the transformer's weights."""
    if _WEIGHTS_INDEX in files:
        try:
            index: dict[str, Any] = json.loads(files[_WEIGHTS_INDEX].read_bytes().decode("utf-8"))
            names = {f"transformer/{name}" for name in index["weight_map"].values()}
        except (OSError, ValueError, RecursionError, TypeError, KeyError, AttributeError) as error:
            raise PrerequisiteError(
                f"model {base.path}: {_WEIGHTS_INDEX} cannot be read: fetch the pipeline folder again"
            ) from error
    else:
        names = {_WEIGHTS}
    missing = sorted(names - files.keys())
    if missing:
        raise PrerequisiteError(f"model {base.path} has no {missing[0]}: fetch the whole pipeline folder")
    return names


def _merge_file(
    path: Path,
    place: Path,
    scale: float,
    left: dict[str, tuple[Tensor, Tensor]],
    merged: Merged,
    check: Callable[[], None],
) -> None:
    """Copy one file of weights, changed by the pairs in ``left`` that belong to it; they are taken out of it."""
    from safetensors import SafetensorError, safe_open
    from safetensors.torch import save_file

    try:
        with safe_open(path, "pt") as file:
            metadata = file.metadata()
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (no mapping)
    except SafetensorError as error:
        check()  # Ctrl-C inside the library is such an error, too
        raise PrerequisiteError(f"{path} holds no weights ({error}): fetch the pipeline folder again") from error
    for name, weight in tensors.items():
        check()
        layer = name.removesuffix(".weight")
        if layer == name or layer not in left:
            continue
        down, up = left.pop(layer)
        if not weight.is_floating_point() or weight.dtype.itemsize == 1:
            kind = str(weight.dtype).removeprefix("torch.")
            raise UserError(f"{path} holds quantised weights ({kind}): merge into the model in full or half precision")
        if weight.shape != (len(up), down.shape[1]):
            raise PrerequisiteError(f"{path}: {name} has another shape than the adapter's: it is another model")
        update = scale * (up @ down)
        wanted = weight.to(torch.float32) + update
        tensors[name] = wanted.to(weight.dtype)
        merged.count(wanted, tensors[name], update)
    try:
        save_file(tensors, place, metadata=metadata)
    except SafetensorError as error:  # how the library tells of a full disk
        check()
        raise StoreError(f"cannot write {place} ({error}): free some space and run the command again") from error
