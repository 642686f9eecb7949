"""A copy of a pipeline folder with an adapter merged into its transformer, file by file.

``W' = W + s B A`` in float32, stored in W's own dtype. Only one file of the transformer is in memory at a time, and no
class of the model is loaded. Everything else is copied unchanged, so whatever loads the base loads the copy.
"""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from gdro_cli.errors import PrerequisiteError, StoreError, UserError
from gdro_cli.files import storage_errors
from gdro_cli.models.folder import PipelineFolder
from gdro_cli.models.lora_files import Adapter

_WEIGHT_ENDINGS = (".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".msgpack", ".h5", ".onnx")
"""Other weights of the transformer, such as a half-precision variant, lack the adapter and are not copied."""


@dataclass(slots=True)
class Merged:
    """The result of a merge."""

    layers: int = 0
    """Matrices changed."""
    _update: float = field(default=0.0, repr=False)
    _lost: float = field(default=0.0, repr=False)

    def count(self, exact: Tensor, stored: Tensor, update: Tensor) -> None:
        """Count one matrix: W + s B A, the same in the dtype in which it is stored, and s B A."""
        self.layers += 1
        self._update += float(update.double().square().sum())
        self._lost += float((stored.double() - exact.double()).square().sum())

    @property
    def rounding(self) -> float:
        """Norm of the part of the update that the base's dtype rounds away, as a share of the update's norm."""
        return math.sqrt(self._lost / self._update) if self._update else 0.0


def merge_into(
    base: PipelineFolder, adapter: Adapter, target: Path, *, check: Callable[[], None] = lambda: None
) -> Merged:
    """Write the base's files into ``target`` with the adapter in the transformer's weights.

    Args:
        base: the pipeline that the adapter was trained on.
        adapter: the adapter to merge.
        target: an existing, empty folder.
        check: called before each file and each matrix; it may raise to end the merge.

    Raises:
        PrerequisiteError: the base is incomplete, cannot be fetched, links out of its folder, or is another model.
        UserError: its weights are quantised.
        StoreError: the disk refuses.
    """
    files, merged, unused = base.own_files(), Merged(), set(adapter.pairs)
    weights = base.weight_files("transformer")
    missing = [name for name in weights if name not in files]
    if missing:
        raise PrerequisiteError(f"model {base.path} has no {missing[0]}: fetch the whole pipeline folder")
    for name, path in files.items():
        check()
        copy = target / name
        with storage_errors(copy):
            copy.parent.mkdir(parents=True, exist_ok=True)
            if name in weights:
                _merge_file(path, copy, adapter, unused, merged, check)
            elif not (name.startswith("transformer/") and name.endswith(_WEIGHT_ENDINGS)):
                shutil.copyfile(path, copy)
    if unused:
        raise PrerequisiteError(
            f"the transformer of {base.path} lacks {len(unused)} layers of the adapter, such as {min(unused)}:"
            " use the model that the run was trained on"
        )
    return merged


def _merge_file(
    path: Path,
    copy: Path,
    adapter: Adapter,
    unused: set[str],
    merged: Merged,
    check: Callable[[], None],
) -> None:
    """Copy one file of weights, changed by the layers in ``unused``, which are removed there."""
    from safetensors import SafetensorError, safe_open
    from safetensors.torch import save_file

    try:
        with safe_open(path, "pt") as file:
            metadata = file.metadata()
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a mapping)
    except SafetensorError as error:
        check()  # the library also turns Ctrl-C into such an error
        raise PrerequisiteError(f"{path} holds no weights ({error}): fetch the pipeline folder again") from error
    for name, weight in tensors.items():
        check()
        layer = name.removesuffix(".weight")
        if layer == name or layer not in unused:
            continue
        unused.remove(layer)
        down, up = adapter.pairs[layer]
        if not weight.is_floating_point() or weight.dtype.itemsize == 1:
            kind = str(weight.dtype).removeprefix("torch.")
            raise UserError(f"{path} holds quantised weights ({kind}): merge into the model in full or half precision")
        if weight.shape != (len(up), down.shape[1]):
            raise PrerequisiteError(
                f"{path}: {name} has another shape than in the adapter: use the model that the run was trained on"
            )
        update = adapter.scales[layer] * (up @ down)
        exact = weight.to(torch.float32) + update
        tensors[name] = exact.to(weight.dtype)
        merged.count(exact, tensors[name], update)
    try:
        save_file(tensors, copy, metadata=metadata)
    except SafetensorError as error:  # the library's error for a full disk
        check()
        raise StoreError(f"cannot write {copy} ({error}): free some space and run the command again") from error
