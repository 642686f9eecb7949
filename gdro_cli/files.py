"""Files and folders that are whole or absent.

Every file is written under a temporary name in its own folder, flushed to the disk, and only then renamed. So a process
that dies leaves the old file or none. A refusal of the operating system (no space, no permission) becomes one sentence.
"""

from __future__ import annotations

import contextlib
import errno
import glob
import hashlib
import json
import os
import shutil
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NoReturn

from gdro_cli.errors import StoreError, UserError

_PARTIAL = ".partial"
_FLUSHES_AT_ONCE = 16
"""Flushing one file at a time made a shard of 128 small images 20 times slower to write."""
_NO_SPACE = {errno.ENOSPC, errno.EDQUOT}
_NO_PERMISSION = {errno.EACCES, errno.EPERM, errno.EROFS}
_NO_FOLDER_FLUSH = {errno.EINVAL, errno.ENOTSUP, errno.ENOSYS}
"""Answers of disks that flush files but not folders (SMB, some FUSE disks)."""


def sha256(data: bytes) -> str:
    """SHA-256 of ``data`` in hex."""
    return hashlib.sha256(data).hexdigest()


def sha256_file(path: Path) -> str:
    """SHA-256 of a file's bytes in hex, read piece by piece."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def cache_folder() -> Path:
    """The user's cache: ``$GDRO_CACHE``, else ``$XDG_CACHE_HOME/gdro_cli``, else ``~/.cache/gdro_cli``.

    Raises ``UserError`` if that names a home folder that is not known.
    """
    own = os.environ.get("GDRO_CACHE")
    if own:
        return Path(at_home(own, key="GDRO_CACHE")).absolute()
    base = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(at_home(base, key="XDG_CACHE_HOME")).absolute() / "gdro_cli"


def at_home(path: str | Path, *, key: str | None = None) -> str:
    """``path`` with a home folder in place of ``~`` or ``~name`` at its start.

    Args:
        path: a path as the user wrote it.
        key: the option, recipe key or variable that names it, for messages.

    Raises:
        UserError: that home folder is not known.
    """
    expanded = os.path.expanduser(path)
    if not expanded.startswith("~"):
        return expanded
    user = expanded.split(os.sep)[0]
    who = f"{key} names {path}, but" if key else f"{path}:"
    if user == "~":
        named = f" or {key}" if key and key.isupper() else ""
        raise UserError(f"{who} your home folder is not known: set the environment variable HOME{named} to a folder")
    raise UserError(f"{who} there is no user {user[1:]}: correct it, or write ./{path} for a file of that name")


# -- refusals of the operating system ---------------------------------------------------------------------------------


@contextlib.contextmanager
def storage_errors(path: Path) -> Iterator[None]:
    """Turn an ``OSError`` while writing ``path`` into a ``StoreError`` of one sentence."""
    try:
        yield
    except OSError as error:
        raise StoreError(f"cannot write {path}: {_explain(error)}") from error


def _explain(error: OSError) -> str:
    if error.errno in _NO_SPACE:
        return "the disk is full; free some space and run the command again, which keeps the finished parts"
    if error.errno in _NO_PERMISSION:
        return "no permission to write there; choose another folder or change its permissions"
    if error.errno == errno.ELOOP:
        return "it is a link that leads elsewhere; delete it and run the command again"
    reason = error.strerror or str(error)
    return f"{reason[:1].lower()}{reason[1:]}; check the folder and run the command again"


def refuse_links(paths: Iterable[Path]) -> None:
    """Raise ``StoreError`` if one of the paths is a link, through which a file would be written elsewhere."""
    for path in paths:
        if path.is_symlink():
            raise StoreError(f"{path} is a link that leaves its folder: delete it and run the command again")


# -- reading ----------------------------------------------------------------------------------------------------------


def read_file(path: Path, *, remedy: str, digest: str | None = None) -> bytes:
    """Return the bytes of a file.

    Args:
        path: the file.
        remedy: what the user can do about a bad file; ends the message.
        digest: the SHA-256 that the bytes must have.

    Raises:
        StoreError: the file is missing, cannot be read or has another digest.
    """
    try:
        data = path.read_bytes()
    except FileNotFoundError as error:
        raise StoreError(f"{path} is missing: {remedy}") from error
    except OSError as error:
        raise StoreError(f"{path} cannot be read ({error.strerror or error}): {remedy}") from error
    if digest is not None and sha256(data) != digest:
        raise StoreError(f"{path} is damaged (its SHA-256 differs): {remedy}")
    return data


def read_json(path: Path, *, remedy: str) -> Any:
    """Return the value in a JSON file. Raises ``StoreError`` as ``read_file``, and if the file is not JSON."""
    try:
        return parse_json(read_file(path, remedy=remedy))
    except ValueError as error:
        raise StoreError(f"{path} is damaged (it is not JSON): {remedy}") from error


def read_object(path: Path, *, remedy: str) -> dict[str, Any]:
    """Return the object in a JSON file. Raises ``StoreError`` as ``read_json``, and if the value is not an object."""
    value = read_json(path, remedy=remedy)
    if not isinstance(value, dict):
        raise StoreError(f"{path} is damaged (it is not a JSON object): {remedy}")
    return value


def parse_json(data: str | bytes) -> Any:
    """Return the value of a JSON text. Raises ValueError, also for NaN and infinities, which JSON does not have."""
    return json.loads(data, parse_constant=_not_finite)


def _not_finite(name: str) -> NoReturn:
    raise ValueError(f"{name} is not a JSON number")


# -- writing a file ---------------------------------------------------------------------------------------------------


def make_folder(path: Path) -> None:
    """Make a folder and its parents. Raises ``StoreError``."""
    with storage_errors(path):
        path.mkdir(parents=True, exist_ok=True)


def write_bytes(path: Path, data: bytes) -> None:
    """Write ``data`` so that ``path`` has all of it or does not change. Raises ``StoreError``."""
    partial = partial_name(path)
    with storage_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            partial.unlink(missing_ok=True)  # the name is predictable, so it may already be a link
            with partial.open("xb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            os.replace(partial, path)
        except BaseException:
            partial.unlink(missing_ok=True)
            raise
        sync_folder(path.parent)


def append_bytes(path: Path, data: bytes) -> None:
    """Append ``data`` to a file, which is made if missing; never through a link. Raises ``StoreError``."""
    with storage_errors(path):
        handle = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_NOFOLLOW, 0o666)
        with os.fdopen(handle, "ab") as stream:
            stream.write(data)


def write_json(path: Path, value: Any) -> None:
    """Write ``value`` as indented JSON, whole or not at all. Raises ``StoreError``."""
    write_bytes(path, json_bytes(value))


def json_bytes(value: Any) -> bytes:
    """``value`` as indented JSON with sorted keys and a final newline."""
    return f"{json.dumps(value, indent=1, sort_keys=True, allow_nan=False)}\n".encode("ascii")


def json_lines(rows: Iterable[Mapping[str, Any]]) -> bytes:
    """One JSON object per line, keys in the order given."""
    return "".join(json.dumps(row, allow_nan=False) + "\n" for row in rows).encode("ascii")


def write_tensors(path: Path, tensors: Mapping[str, Any], *, metadata: dict[str, str] | None = None) -> None:
    """Write a safetensors file, whole or not at all; equal tensors give equal bytes. Raises ``StoreError``."""
    from safetensors.torch import save

    data = save({name: value.contiguous() for name, value in tensors.items()}, metadata=metadata)
    write_bytes(path, _in_order(data) if metadata else data)


def _in_order(data: bytes) -> bytes:
    """Sort the metadata of a safetensors file by name; the library's order changes from run to run."""
    end = 8 + int.from_bytes(data[:8], "little")
    header = json.loads(data[8:end])
    header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text + data[end:]


# -- writing a folder -------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def new_folder(path: Path, *, replace: bool = False) -> Iterator[Path]:
    """Write a folder that appears whole: the block fills a temporary folder, which is then renamed to ``path``.

    An error or a signal removes the temporary folder. The next call removes what a killed process left.

    Args:
        path: the folder; missing or empty unless ``replace`` is set.
        replace: whether to replace a folder of that name.

    Raises:
        StoreError: the disk refuses, or ``path`` is not empty.
    """
    partial = partial_name(path)
    with storage_errors(path):
        remove_partials(path.parent, glob.escape(path.name))
        try:
            partial.mkdir(parents=True)
            yield partial
            _sync_tree(partial)
            if replace and os.path.lexists(path):  # moved first: no reader may see a half-removed folder
                os.replace(path, partial.with_suffix(f".old{_PARTIAL}"))
            os.replace(partial, path)
        except BaseException:
            shutil.rmtree(partial, ignore_errors=True)
            raise
        sync_folder(path.parent)
        remove_partials(path.parent, glob.escape(path.name))


def partial_name(path: Path) -> Path:
    """Return the temporary name, beside ``path``, under which this process writes it."""
    return path.with_name(f".{path.name}.{os.getpid()}{_PARTIAL}")


def remove_partials(folder: Path, pattern: str) -> None:
    """Remove the temporary files and folders for names of this pattern from a folder."""
    for partial in folder.glob(f".{pattern}.[0-9]*{_PARTIAL}"):
        if partial.is_dir() and not partial.is_symlink():
            shutil.rmtree(partial)
        else:
            partial.unlink()


def sync_folder(folder: Path) -> None:
    """Flush a folder's entries to the disk, if the disk can flush folders."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError as error:
        if error.errno not in _NO_FOLDER_FLUSH:
            raise
    finally:
        os.close(handle)


def _sync_tree(folder: Path) -> None:
    """Flush all files of a folder, several at a time, and then the folders."""
    paths = [folder, *folder.rglob("*")]
    with ThreadPoolExecutor(_FLUSHES_AT_ONCE) as pool:
        list(pool.map(_sync_file, (path for path in paths if path.is_file())))
    for path in paths:
        if path.is_dir():
            sync_folder(path)


def _sync_file(path: Path) -> None:
    with path.open("rb") as file:
        os.fsync(file.fileno())
