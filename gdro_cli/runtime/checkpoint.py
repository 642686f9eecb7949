"""Checkpoints: all or nothing, checked by digest when read, never pickle.

``<run>/checkpoints/step-000100/`` holds one safetensors file per name, ``state.json``, whatever ``extra`` writes (the
adapter in diffusers' format), and ``manifest.json`` with the SHA-256 of each. The folder is filled under another name
and renamed when it is complete and on the disk.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from gdro_cli.errors import StoreError
from gdro_cli.files import (
    cannot_write,
    json_bytes,
    make_folder,
    sha256,
    sha256_file,
    sync_file,
    sync_folder,
    write_bytes,
)

SCHEMA = 1
_NAME = re.compile(r"step-(\d{6,})")
_MANIFEST = "manifest.json"
_STATE = "state.json"
_SCALES = ("absmax", "qmap")
"""Beginnings of the names of what an 8-bit optimizer keeps per block of a parameter, in a shape of its own."""


class Checkpoint(NamedTuple):
    """What ``load_checkpoint`` reads."""

    step: int
    """Steps done."""
    tensors: dict[str, dict[str, Tensor]]
    """By file name without its ending, then by tensor name; on the CPU."""
    state: dict[str, Any]
    """The JSON state."""


def save_checkpoint(
    folder: Path,
    step: int,
    *,
    tensors: Mapping[str, Mapping[str, Tensor]],
    state: Mapping[str, Any],
    extra: Callable[[Path], None] | None = None,
    keep: int,
) -> Path:
    """Write the checkpoint of ``step`` and drop the oldest ones.

    Args:
        folder: the run folder; the checkpoint goes to ``checkpoints/step-<step>/`` in it. One that is there already
            is replaced.
        step: steps done, >= 0.
        tensors: file name without ending -> tensors.
        state: JSON values; floats come back exactly.
        extra: called with the unfinished folder to write more files into it.
        keep: how many checkpoints stay, the newest ones, >= 1.

    Returns:
        The checkpoint's folder.

    Raises:
        ValueError: ``keep`` is below 1.
        StoreError: the folder cannot be written to.
    """
    if keep < 1:
        raise ValueError("keep must be at least 1")
    home = folder / "checkpoints"
    make_folder(home)
    _remove_leftovers(home)
    final = home / f"step-{step:06d}"
    unfinished = home / f".{final.name}.{os.getpid()}.tmp"
    try:
        unfinished.mkdir()
        _fill(unfinished, step=step, tensors=tensors, state=state, extra=extra)
        if final.exists():
            os.rename(final, home / f".{final.name}.{os.getpid()}.old.tmp")
        os.rename(unfinished, final)
        sync_folder(home)
        _remove_leftovers(home)
        others = [path for _, path in _checkpoints(home) if path != final]
        for old in others[: max(0, len(others) + 1 - keep)]:
            # Renamed first: a half-deleted folder must not look like a checkpoint.
            doomed = old.with_name(f".{old.name}.{os.getpid()}.old.tmp")
            os.rename(old, doomed)
            shutil.rmtree(doomed)
    except OSError as error:
        raise cannot_write(home, error) from error
    return final


def latest_checkpoint(folder: Path) -> Path | None:
    """Return the newest complete checkpoint of a run folder, or None."""
    found = [path for _, path in _checkpoints(folder / "checkpoints") if (path / _MANIFEST).is_file()]
    return found[-1] if found else None


def load_checkpoint(path: Path) -> Checkpoint:
    """Read a checkpoint, every file against its digest.

    Raises:
        StoreError: a file is missing or changed; the message names it.
    """
    from safetensors.torch import load_file

    manifest = _read_json(path / _MANIFEST)
    if not isinstance(manifest, dict) or manifest.pop("sha256", None) != _digest(manifest):
        raise _damaged(path / _MANIFEST, "is damaged (its SHA-256 differs)")
    if manifest["schema"] != SCHEMA:
        raise StoreError(f"checkpoint {path} has schema {manifest['schema']}, this version reads {SCHEMA}")
    for name, digest in manifest["files"].items():
        file = path / name
        if not file.is_file():
            raise _damaged(file, "is missing")
        if sha256_file(file) != digest:
            raise _damaged(file, "is damaged (its SHA-256 differs from the manifest)")
    tensors = {name: load_file(path / f"{name}.safetensors") for name in manifest["tensors"]}
    return Checkpoint(step=int(manifest["step"]), tensors=tensors, state=_read_json(path / _STATE))


def flatten_optimizer(optimizer: torch.optim.Optimizer) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Split an optimizer's state into tensors and JSON, without loss.

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
    """Put back what ``flatten_optimizer`` gave, into an optimizer of the same parameters.

    Raises:
        StoreError: the state belongs to other parameters.
    """
    state: dict[int, dict[str, Any]] = {}
    for key, value in {**tensors, **about["values"]}.items():
        index, _, name = key.partition(".")
        state.setdefault(int(index), {})[name] = value
    groups = [
        # JSON has no tuples, and the betas must be one again.
        {key: tuple(value) if key == "betas" else value for key, value in group.items()}
        for group in about["groups"]
    ]
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    fits = [len(g["params"]) for g in groups] == [len(g["params"]) for g in optimizer.param_groups] and all(
        index < len(parameters) and (value.ndim == 0 or value.shape == parameters[index].shape)
        for index, entries in state.items()
        for name, value in entries.items()
        if isinstance(value, Tensor) and not name.startswith(_SCALES)
    )
    if not fits:
        raise StoreError("the stored optimizer state belongs to other parameters: resume with the same train.lora")
    optimizer.load_state_dict({"state": state, "param_groups": groups})


def _fill(
    unfinished: Path,
    *,
    step: int,
    tensors: Mapping[str, Mapping[str, Tensor]],
    state: Mapping[str, Any],
    extra: Callable[[Path], None] | None,
) -> None:
    """Write all files of a checkpoint and, last, its manifest."""
    from safetensors.torch import save_file

    for name, group in tensors.items():
        save_file(
            {key: value.detach().contiguous() for key, value in group.items()},
            unfinished / f"{name}.safetensors",
        )
    (unfinished / _STATE).write_bytes(json_bytes(dict(state)))
    if extra is not None:
        extra(unfinished)
    files = {}
    for file in sorted(f for f in unfinished.rglob("*") if f.is_file()):
        sync_file(file)
        files[file.relative_to(unfinished).as_posix()] = sha256_file(file)
    manifest = {"schema": SCHEMA, "step": step, "tensors": sorted(tensors), "files": files}
    write_bytes(unfinished / _MANIFEST, json_bytes({**manifest, "sha256": _digest(manifest)}))


def _digest(manifest: Mapping[str, Any]) -> str:
    return sha256(json_bytes(manifest))


def _checkpoints(home: Path) -> list[tuple[int, Path]]:
    """(step, folder) of every finished checkpoint, oldest first."""
    if not home.is_dir():
        return []
    found = [(_NAME.fullmatch(path.name), path) for path in home.iterdir() if path.is_dir()]
    return sorted((int(match[1]), path) for match, path in found if match)


def _remove_leftovers(home: Path) -> None:
    """Delete what a killed process left unfinished; the run's lock guarantees that nobody else is writing."""
    for path in home.glob(".step-*.tmp"):
        shutil.rmtree(path, ignore_errors=True)


def _read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise _damaged(path, "is missing") from error
    except (OSError, ValueError) as error:
        raise _damaged(path, "cannot be read") from error


def _damaged(file: Path, what: str) -> StoreError:
    home = next((p for p in file.parents if _NAME.fullmatch(p.name)), file.parent)
    return StoreError(f"checkpoint file {file} {what}: delete {home} to resume from the checkpoint before it")
