"""Files and folders that are whole or absent.

Every file is written under a temporary name in its own folder, flushed to the disk, and only then given its
real name, so that a process that dies leaves the old file or none. What the operating system refuses (no
space, no permission) becomes one sentence.
"""

from __future__ import annotations

import contextlib
import errno
import glob
import hashlib
import json
import math
import os
import shutil
import stat
import time
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NoReturn

from gdro_cli.errors import StoreError, UserError
from gdro_cli.processes import is_running

_PARTIAL = ".partial"
_FLUSHES_AT_ONCE = 16
"""Waiting for the disk file by file made a shard of 128 small images 20 times slower to write."""
_FORGOTTEN_SECONDS = 3600.0
_NO_SPACE = {errno.ENOSPC, errno.EDQUOT}
_NO_PERMISSION = {errno.EACCES, errno.EPERM, errno.EROFS}
_NO_SECOND_NAME = {errno.EPERM, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK}
"""How disks answer on which a file cannot have two names."""
_NO_LINK = getattr(os, "O_NOFOLLOW", 0)
_NO_WAIT = getattr(os, "O_NONBLOCK", 0)
_BINARY = getattr(os, "O_BINARY", 0)


def sha256(data: bytes) -> str:
    """SHA-256 of ``data`` in hex."""
    return hashlib.sha256(data).hexdigest()


def sha256_file(path: Path) -> str:
    """SHA-256 of a file's bytes in hex, read piece by piece."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def working_folder() -> Path:
    """The folder that relative paths begin at. Raises ``UserError`` if it has been deleted."""
    try:
        return Path.cwd()
    except FileNotFoundError as error:
        raise UserError("The working folder no longer exists: cd to another one and run the command again.") from error


def read_bytes(path: Path) -> bytes:
    """The bytes of an ordinary file; a pipe or a device, which may never come to an end, is refused. Raises OSError."""
    handle = os.open(path, os.O_RDONLY | _NO_WAIT | _BINARY)
    try:
        kind = os.fstat(handle).st_mode
        if not stat.S_ISREG(kind):
            number = errno.EISDIR if stat.S_ISDIR(kind) else errno.EINVAL
            raise OSError(number, "it is no ordinary file", str(path))
        with os.fdopen(handle, "rb", closefd=False) as file:
            return file.read()
    finally:
        os.close(handle)


def make_folder(path: Path) -> None:
    """Make a folder and its parents. Raises ``StoreError``."""
    with storage_errors(path):
        path.mkdir(parents=True, exist_ok=True)


@contextlib.contextmanager
def storage_errors(path: Path) -> Iterator[None]:
    """Turn an ``OSError`` met while writing ``path`` into a ``StoreError`` of one sentence."""
    try:
        yield
    except OSError as error:
        raise cannot_write(path, error) from error


@contextlib.contextmanager
def reading(path: Path) -> Iterator[None]:
    """Turn an ``OSError`` met while reading ``path`` into a ``StoreError`` of one sentence."""
    try:
        yield
    except OSError as error:
        raise StoreError(f"{path} cannot be read: {error.strerror or error}; check its permissions") from error


def cannot_write(path: Path, error: OSError) -> StoreError:
    """Say in one sentence why ``path`` was not written and what to do."""
    return StoreError(_explain(path, error))


def _explain(path: Path, error: OSError) -> str:
    if error.errno in _NO_SPACE:
        return (
            f"cannot write {path}: the disk is full; free some space and run the command again, finished parts are kept"
        )
    if error.errno in _NO_PERMISSION:
        return f"cannot write {path}: no permission to write there; choose another folder or change its permissions"
    if error.errno == errno.ELOOP:
        return f"cannot write {path}: it is a link that leads elsewhere; delete it and run the command again"
    reason = error.strerror or str(error)
    return f"cannot write {path}: {reason[:1].lower()}{reason[1:]}; check the folder and run the command again"


def write_bytes(path: Path, data: bytes) -> None:
    """Write ``data`` so that ``path`` holds all of it or is as it was. Raises ``StoreError``."""
    partial = partial_name(path)
    with storage_errors(path):
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            _write_through(partial, data)
            os.replace(partial, path)
            sync_folder(path.parent)
        except BaseException:
            with contextlib.suppress(OSError):
                partial.unlink()
            raise


def write_new_bytes(path: Path, data: bytes) -> bool:
    """Write ``data`` if nothing has that name: of several processes that write it at once, one does.

    Returns False, and leaves what is there, if there is something. Raises ``StoreError``.
    """
    partial = partial_name(path)
    with storage_errors(path):
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            _write_through(partial, data)
            try:
                os.link(partial, path)
            except FileExistsError:
                return False
            except OSError as error:
                if error.errno not in _NO_SECOND_NAME or os.path.lexists(path):
                    raise
                os.replace(partial, path)
            sync_folder(path.parent)
        finally:
            with contextlib.suppress(OSError):
                partial.unlink()
    return True


def append_bytes(path: Path, data: bytes) -> None:
    """Add ``data`` to the end of a file, made if it is missing, never through a link. Raises ``StoreError``."""
    with storage_errors(path):
        handle = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | _NO_LINK | _NO_WAIT, 0o666)
        with os.fdopen(handle, "ab") as stream:
            stream.write(data)


def refuse_links(paths: Iterable[Path]) -> None:
    """Raise ``StoreError`` if one of the paths is a link: what is written there would leave its folder."""
    for path in paths:
        if path.is_symlink():
            raise StoreError(f"{path} is a link that leaves its folder: delete it and run the command again")


def write_json(path: Path, value: Any) -> None:
    """Write ``value`` as indented JSON, whole or not at all. Raises ``StoreError``."""
    write_bytes(path, json_bytes(value))


def json_bytes(value: Any) -> bytes:
    """``value`` as indented JSON with sorted keys and a final newline."""
    text = json.dumps(value, indent=1, sort_keys=True, ensure_ascii=True, allow_nan=False)
    return f"{text}\n".encode("ascii")


def parse_json(data: str | bytes) -> Any:
    """The value of a JSON text that this tool could have written.

    Raises:
        ValueError: it is no JSON, nested too deeply, or holds a number that is not finite, an integer of more than 64
            bits or half a character.
    """
    text = data.decode(json.detect_encoding(data)) if isinstance(data, bytes) else data
    try:
        value = json.loads(text, parse_constant=_not_finite, parse_float=_finite, parse_int=small_integer)
    except RecursionError as error:
        raise ValueError("the JSON is nested too deeply") from error
    if not text.isascii() or "\\ud" in text or "\\uD" in text:  # others hold none
        refuse_half_characters(value)
    return value


def refuse_half_characters(value: Any) -> None:
    r"""Raise ValueError if a text of a JSON value holds half of a surrogate pair: it can be neither shown nor written.

    JSON can name one half alone, as in ``"\ud800"``.
    """
    try:
        json.dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
        raise ValueError("the JSON holds half a character") from error
    except RecursionError as error:
        raise ValueError("the JSON is nested too deeply") from error


def _not_finite(name: str) -> NoReturn:
    raise ValueError(f"{name} is not a JSON number")


def _finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"{text[:20]} is too large a number")
    return value


def small_integer(text: str) -> int:
    """The integer, if 64 bits hold it; for ``json.loads``. Raises ValueError."""
    value = int(text)
    if abs(value) >= 2**64:
        raise ValueError(f"{text[:20]} is too large a number")
    return value


def write_tensors(path: Path, tensors: Mapping[str, Any], *, metadata: dict[str, str] | None = None) -> None:
    """Write tensors as a safetensors file, whole or not at all; equal ones give equal bytes. Raises ``StoreError``."""
    from safetensors.torch import save

    data = save({name: value.contiguous() for name, value in tensors.items()}, metadata=metadata)
    write_bytes(path, _in_order(data) if metadata is not None and len(metadata) > 1 else data)


def _in_order(data: bytes) -> bytes:
    """A safetensors file with its metadata in the order of their names; the library's order changes from run to run."""
    end = 8 + int.from_bytes(data[:8], "little")
    header = json.loads(data[8:end])
    header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text + data[end:]


def json_lines(rows: Iterable[Mapping[str, Any]]) -> bytes:
    """One JSON object per line, keys in the order given."""
    return "".join(json.dumps(row, ensure_ascii=True, allow_nan=False) + "\n" for row in rows).encode("ascii")


def write_folder(path: Path, files: Mapping[str, bytes], *, last: str) -> None:
    """Make the folder ``path`` appear with all ``files`` (relative names) in it, or not at all.

    The files are written into a temporary folder beside it, ``last`` after all others are on the disk, and
    the folder is renamed. Whatever stood at ``path`` before is replaced. Raises ``StoreError``.
    """
    partial = partial_name(path)
    with storage_errors(path):
        try:
            remove_partials(path)
            folders = {(partial / name).parent for name in files} | {partial}
            for folder in folders:
                folder.mkdir(parents=True, exist_ok=True)
            with ThreadPoolExecutor(_FLUSHES_AT_ONCE) as pool:
                others = [name for name in files if name != last]
                list(pool.map(lambda name: _write_through(partial / name, files[name]), others))
            _write_through(partial / last, files[last])
            for folder in folders:
                sync_folder(folder)
            if os.path.lexists(path):  # moved aside first: a folder that is half removed must not be seen
                os.replace(path, partial_name(path.with_name(f"{path.name}.old")))
            os.replace(partial, path)
            sync_folder(path.parent)
            remove_partials(path)
        except BaseException:
            shutil.rmtree(partial, ignore_errors=True)
            raise


@contextlib.contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """A temporary folder beside ``path`` for the block to fill; at its end it gets its name, on an error it goes.

    ``path`` must be missing or empty. Raises ``StoreError`` when the disk refuses.
    """
    partial = partial_name(path)
    with storage_errors(path):
        try:
            remove_abandoned(path)
            partial.mkdir(parents=True)
            yield partial
            for each in [*partial.rglob("*"), partial]:
                (sync_folder if each.is_dir() else sync_file)(each)
            if path.exists():
                path.rmdir()
            os.rename(partial, path)
            sync_folder(path.parent)
        except BaseException:
            shutil.rmtree(partial, ignore_errors=True)
            raise


def partial_name(path: Path) -> Path:
    """The temporary name, beside ``path``, under which this process writes it."""
    return path.with_name(f".{path.name}.{os.getpid()}{_PARTIAL}")


def remove_partials(path: Path) -> None:
    """Remove what processes that died have left of ``path`` under temporary names, where a lock keeps others out."""
    for left in _partials(path):
        remove_tree(left)


def remove_abandoned(path: Path) -> None:
    """Remove what is left of ``path`` under the temporary names of processes that no longer run here, and of this one.

    For what no lock guards: another process of this machine that is writing the same keeps its own.
    """
    for left in _partials(path):
        number = left.name.removesuffix(_PARTIAL).rpartition(".")[2]
        if left == partial_name(path) or (number.isdecimal() and not is_running(int(number))):
            remove_tree(left)


def _partials(path: Path) -> list[Path]:
    return list(path.parent.glob(f".{glob.escape(path.name)}.*{_PARTIAL}"))


def remove_forgotten(folder: Path) -> None:
    """Remove temporary files, in a folder and those right below it, that have lain there for an hour.

    Writing one takes seconds: what is that old was left by a process that died. Whether its number is still in use says
    nothing on a disk that machines share.
    """
    oldest = time.time() - _FORGOTTEN_SECONDS
    for pattern in (f".*{_PARTIAL}", f"*/.*{_PARTIAL}"):
        for left in folder.glob(pattern):
            with contextlib.suppress(OSError):
                if left.lstat().st_mtime < oldest:
                    remove_tree(left)


def remove_tree(path: Path) -> None:
    """Remove a file, a link (not what it points to) or a folder; nothing happens when there is none."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def sync_file(path: Path) -> None:
    """Flush a file's bytes to the disk."""
    with path.open("rb") as file:
        os.fsync(file.fileno())


def sync_folder(folder: Path) -> None:
    """Flush a folder's entries to the disk; nothing outside POSIX, where a folder cannot be opened."""
    if os.name != "posix":
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _write_through(path: Path, data: bytes) -> None:
    path.unlink(missing_ok=True)  # its name can be foreseen, and what lies there may be a link
    with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | _NO_LINK, 0o666), "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
