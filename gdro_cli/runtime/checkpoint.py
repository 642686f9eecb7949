"""Checkpoints: complete or absent, checked by digest when read, never pickle.

``<run>/checkpoints/step-000100/`` has one safetensors file per name, ``state.json``, whatever ``extra`` writes (the
adapter in diffusers' format), and ``manifest.json`` with the SHA-256 of each. The folder appears once all of it is on
the disk.
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from gdro_cli.errors import StoreError
from gdro_cli.files import (
    json_bytes,
    new_folder,
    read_file,
    read_object,
    remove_partials,
    sha256,
    sha256_file,
    storage_errors,
    write_json,
    write_tensors,
)

SCHEMA = 1
_NAME = re.compile(r"step-(\d{6,})")
_MANIFEST = "manifest.json"
_STATE = "state.json"


class Checkpoint(NamedTuple):
    """A checkpoint in memory."""

    step: int
    """Steps done."""
    tensors: dict[str, dict[str, Tensor]]
    """By file name without its ending, then by tensor name; on the CPU."""
    state: dict[str, Any]


def save_checkpoint(
    folder: Path,
    step: int,
    *,
    tensors: Mapping[str, Mapping[str, Tensor]],
    state: Mapping[str, Any],
    extra: Callable[[Path], None] | None = None,
    keep: int,
) -> Path:
    """Write the checkpoint of ``step``, delete the oldest ones, and return the checkpoint's folder.

    Args:
        folder: the run folder, which this process has locked. A checkpoint of the same step in it is replaced.
        step: steps done, >= 0.
        tensors: file name without ending -> tensors.
        state: JSON values; floats come back exactly.
        extra: called with the unfinished folder to write more files into it.
        keep: how many of the newest checkpoints stay, >= 1.

    Raises:
        StoreError: the folder cannot be written to.
    """
    home = folder / "checkpoints"
    path = home / f"step-{step:06d}"
    with storage_errors(path):
        remove_partials(home, "step-*")  # a killed process may have been at another step
        with new_folder(path, replace=True) as unfinished:
            for name, group in tensors.items():
                write_tensors(unfinished / f"{name}.safetensors", {key: value.detach() for key, value in group.items()})
            write_json(unfinished / _STATE, dict(state))
            if extra is not None:
                extra(unfinished)
            _write_manifest(unfinished, step=step, tensors=sorted(tensors))
        others = [other for other in _checkpoints(home) if other != path]
        for old in others[::-1][keep - 1 :]:
            (old / _MANIFEST).unlink(missing_ok=True)  # first: a half-deleted folder must not look like a checkpoint
            shutil.rmtree(old)
    return path


def latest_checkpoint(folder: Path) -> Path | None:
    """Return the newest complete checkpoint of a run folder, or None."""
    complete = [path for path in _checkpoints(folder / "checkpoints") if (path / _MANIFEST).is_file()]
    return complete[-1] if complete else None


def checkpoint_step(path: Path) -> int:
    """The step in the name of a checkpoint's folder."""
    return int(path.name.rpartition("-")[2])


def load_checkpoint(path: Path, *, needed: Collection[str] = ()) -> Checkpoint:
    """Read a checkpoint and check every file against its digest; files that the manifest does not name are ignored.

    Args:
        path: the checkpoint's folder.
        needed: names of ``tensors`` that the checkpoint must have.

    Raises:
        StoreError: a file is missing or damaged; the message names it.
    """
    remedy = f"delete {path} to resume from the checkpoint before it"
    manifest = read_object(path / _MANIFEST, remedy=remedy)
    if manifest.pop("sha256", None) != sha256(json_bytes(manifest)):
        raise StoreError(f"{path / _MANIFEST} is damaged (its SHA-256 differs): {remedy}")
    if manifest.get("schema") != SCHEMA:
        raise StoreError(
            f"checkpoint {path} has schema {manifest.get('schema')}, this version reads {SCHEMA}: {remedy}"
        )
    inside = {file.relative_to(path).as_posix(): file for file in path.rglob("*")}
    data = {}
    for name, digest in manifest["files"].items():
        if name not in inside or inside[name].is_symlink():
            raise StoreError(f"{path / name} is missing: {remedy}")
        data[name] = read_file(inside[name], digest=digest, remedy=remedy)
    for name in needed:
        if name not in manifest["tensors"]:
            raise StoreError(f"{path / name}.safetensors is missing: {remedy}")
    from safetensors.torch import load

    tensors = {name: load(data[f"{name}.safetensors"]) for name in manifest["tensors"]}
    return Checkpoint(manifest["step"], tensors, read_object(path / _STATE, remedy=remedy))


def flatten_optimizer(optimizer: torch.optim.Optimizer) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Split an optimizer's state into tensors and JSON; nothing is lost.

    Returns:
        ``{"<parameter index>.<name>": tensor}`` copied to the CPU, and ``{"groups": [...], "values": {...}}`` with
        the settings of each parameter group and the state entries that are not tensors.
    """
    whole = optimizer.state_dict()
    tensors: dict[str, Tensor] = {}
    values: dict[str, Any] = {}
    for index, entries in whole["state"].items():
        for name, value in entries.items():
            if isinstance(value, Tensor):
                tensors[f"{index}.{name}"] = value.detach().to("cpu", copy=True).contiguous()
            else:
                values[f"{index}.{name}"] = value
    return tensors, {"groups": whole["param_groups"], "values": values}


def restore_optimizer(
    optimizer: torch.optim.Optimizer, tensors: Mapping[str, Tensor], about: Mapping[str, Any]
) -> None:
    """Give an optimizer the state that ``flatten_optimizer`` took from one of the same parameters.

    Raises:
        StoreError: the state belongs to other parameters.
    """
    state: dict[int, dict[str, Any]] = {}
    for key, value in {**tensors, **about["values"]}.items():
        index, _, name = key.partition(".")
        state.setdefault(int(index), {})[name] = value
    # JSON has no tuples; the optimizer wants its betas as one
    groups = [
        {key: tuple(value) if key == "betas" else value for key, value in group.items()} for group in about["groups"]
    ]
    try:
        optimizer.load_state_dict({"state": state, "param_groups": groups})
    except ValueError as error:
        raise StoreError(
            "the stored optimizer state belongs to other parameters: resume with the same train.lora"
        ) from error


def _write_manifest(folder: Path, *, step: int, tensors: list[str]) -> None:
    files = {f.relative_to(folder).as_posix(): sha256_file(f) for f in sorted(folder.rglob("*")) if f.is_file()}
    manifest = {"schema": SCHEMA, "step": step, "tensors": tensors, "files": files}
    write_json(folder / _MANIFEST, {**manifest, "sha256": sha256(json_bytes(manifest))})


def _checkpoints(home: Path) -> list[Path]:
    """Every checkpoint's folder, oldest first."""
    folders = [path for path in home.glob("step-*") if _NAME.fullmatch(path.name) and path.is_dir()]
    return sorted(folders, key=checkpoint_step)
