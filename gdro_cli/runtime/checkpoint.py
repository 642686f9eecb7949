"""Checkpoints: all or nothing, checked by digest when read, never pickle.

``<run>/checkpoints/step-000100/`` holds one safetensors file per name, ``state.json``, whatever ``extra`` writes (the
adapter in diffusers' format), and ``manifest.json`` with the SHA-256 of each. The folder is filled under another name
and renamed when it is complete and on the disk. One that it replaces keeps another name until then, by which
``mend_checkpoints`` finds it if the process was killed in between.
"""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Callable, Collection, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from gdro_cli.errors import StoreError
from gdro_cli.files import (
    cannot_write,
    json_bytes,
    make_folder,
    parse_json,
    read_bytes,
    sha256,
    sha256_file,
    sync_file,
    sync_folder,
    write_bytes,
    write_tensors,
)

SCHEMA = 1
_NAME = re.compile(r"step-(\d{6,})")
_FILE = re.compile(r"[A-Za-z0-9_][\w.-]*(/[\w.-]+)*")
_MANIFEST = "manifest.json"
_STATE = "state.json"
_REPLACED = ".replaced.tmp"
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
    mend_checkpoints(folder)
    final = home / f"step-{step:06d}"
    unfinished = home / f".{final.name}.{os.getpid()}.tmp"
    try:
        unfinished.mkdir()
        _fill(unfinished, step=step, tensors=tensors, state=state, extra=extra)
        if final.exists():
            os.rename(final, home / f".{final.name}{_REPLACED}")
        os.rename(unfinished, final)
        sync_folder(home)
        others = [path for _, path in _checkpoints(home) if path != final]
        for old in others[: max(0, len(others) + 1 - keep)]:
            # Renamed first: a half-deleted folder must not look like a checkpoint.
            doomed = old.with_name(f".{old.name}.{os.getpid()}.old.tmp")
            os.rename(old, doomed)
            shutil.rmtree(doomed)
    except OSError as error:
        raise cannot_write(home, error) from error
    finally:
        mend_checkpoints(folder)
    return final


def mend_checkpoints(folder: Path) -> None:
    """Delete what a killed process left unfinished in a run folder, and put back a checkpoint that it was replacing.

    The run's lock guarantees that nobody else is writing.
    """
    home = folder / "checkpoints"
    for path in home.glob(f".step-*{_REPLACED}"):
        place = home / path.name.removeprefix(".").removesuffix(_REPLACED)
        if not os.path.lexists(place):
            with suppress(OSError):
                os.rename(path, place)
    for path in home.glob(".step-*.tmp"):
        shutil.rmtree(path, ignore_errors=True)


def latest_checkpoint(folder: Path) -> Path | None:
    """Return the newest complete checkpoint of a run folder, or None."""
    found = [path for _, path in _checkpoints(folder / "checkpoints") if (path / _MANIFEST).is_file()]
    return found[-1] if found else None


def checkpoint_step(path: Path) -> int:
    """The step of a checkpoint's folder, by its name."""
    return int(path.name.rpartition("-")[2])


def load_checkpoint(path: Path, *, needed: Collection[str] = ()) -> Checkpoint:
    """Read a checkpoint, every file against its digest; files that its manifest does not name are left alone.

    Args:
        path: the checkpoint's folder.
        needed: names of ``tensors`` that must be there.

    Raises:
        StoreError: a file is missing or changed; the message names it.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load

    manifest = _read_json(path / _MANIFEST)
    if not isinstance(manifest, dict) or manifest.pop("sha256", None) != _digest(manifest):
        raise _damaged(path / _MANIFEST, "is damaged (its SHA-256 differs)")
    if manifest.get("schema") != SCHEMA:
        raise StoreError(
            f"checkpoint {path} has schema {str(manifest.get('schema'))[:40]}, this version reads {SCHEMA}: delete it,"
            " or use the version that wrote it"
        )
    step, files, names = _contents(path, manifest)
    for name in needed:
        if name not in names:
            raise _damaged(path / f"{name}.safetensors", "is missing")
    for name, digest in files.items():
        file = path / name
        if file.is_symlink() or not file.is_file():
            raise _damaged(file, "is missing")
        if sha256_file(file) != digest:
            raise _damaged(file, "is damaged (its SHA-256 differs from the manifest)")
    tensors = {}
    for name in names:
        file = path / f"{name}.safetensors"
        try:
            tensors[name] = load(read_bytes(file))  # by its bytes: the library takes no path that is not UTF-8
        except OSError as error:
            raise _damaged(file, "cannot be read") from error
        except SafetensorError as error:
            raise _damaged(file, "holds no tensors") from error
    state = _read_json(path / _STATE)
    if not isinstance(state, dict):
        raise _damaged(path / _STATE, "is damaged")
    return Checkpoint(step=step, tensors=tensors, state=state)


def _contents(path: Path, manifest: Mapping[str, Any]) -> tuple[int, dict[str, str], list[str]]:
    """Step, digests of the files and names of the tensors; no file lies outside of the checkpoint."""
    step, files, names = (manifest.get(key) for key in ("step", "files", "tensors"))
    sound = (
        type(step) is int
        and isinstance(files, dict)
        and isinstance(names, list)
        and all(_FILE.fullmatch(name) and ".." not in name for name in files)
        and _STATE in files
        and all(isinstance(name, str) and f"{name}.safetensors" in files for name in names)
    )
    if not (sound and type(step) is int and isinstance(files, dict) and isinstance(names, list)):
        raise _damaged(path / _MANIFEST, "is damaged (an entry cannot be used)")
    return step, files, names


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
    try:
        for key, value in {**tensors, **about["values"]}.items():
            index, _, name = key.partition(".")
            state.setdefault(int(index), {})[name] = value
        groups = [
            # JSON has no tuples, and the betas must be one again.
            {key: tuple(value) if key == "betas" else value for key, value in group.items()}
            for group in about["groups"]
        ]
        counts = [len(group["params"]) for group in groups]
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise StoreError("the stored optimizer state cannot be read: delete the newest checkpoint to go on") from error
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    fits = counts == [len(g["params"]) for g in optimizer.param_groups]
    fits = fits and all(index < len(parameters) for index in state)
    fits = fits and all(
        value.ndim == 0 or value.shape == parameters[index].shape
        for index, entries in state.items()
        for name, value in entries.items()
        if isinstance(value, Tensor) and not name.startswith(_SCALES)
    )
    settings = all(
        _alike(own[key], group[key])
        for own, group in zip(optimizer.param_groups, groups, strict=fits)
        for key in own.keys() & group.keys() - {"params"}
    )
    if not fits or not settings:
        raise StoreError("the stored optimizer state belongs to other parameters: resume with the same train.lora")
    optimizer.load_state_dict({"state": state, "param_groups": groups})


def _alike(own: Any, held: Any) -> bool:
    """Whether a setting of an optimizer may be put in the place of its own."""
    if isinstance(own, tuple):
        return isinstance(held, tuple) and len(held) == len(own) and all(map(_alike, own, held))
    return not isinstance(own, int | float) or isinstance(held, int | float)


def _fill(
    unfinished: Path,
    *,
    step: int,
    tensors: Mapping[str, Mapping[str, Tensor]],
    state: Mapping[str, Any],
    extra: Callable[[Path], None] | None,
) -> None:
    """Write all files of a checkpoint and, last, its manifest."""
    for name, group in tensors.items():
        write_tensors(unfinished / f"{name}.safetensors", {key: value.detach() for key, value in group.items()})
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


def _read_json(path: Path) -> Any:
    try:
        return parse_json(read_bytes(path))
    except FileNotFoundError as error:
        raise _damaged(path, "is missing") from error
    except (OSError, ValueError) as error:
        raise _damaged(path, "cannot be read") from error


def _damaged(file: Path, what: str) -> StoreError:
    home = next((p for p in file.parents if _NAME.fullmatch(p.name)), file.parent)
    return StoreError(f"checkpoint file {file} {what}: delete {home} to resume from the checkpoint before it")
