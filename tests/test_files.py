"""Files and folders are whole or absent, whatever the disk and other processes do."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from gdro_cli.errors import StoreError
from gdro_cli.files import (
    append_bytes,
    new_folder,
    parse_json,
    partial_name,
    read_file,
    read_json,
    read_object,
    sha256,
    storage_errors,
    sync_folder,
    write_bytes,
    write_json,
)
from tests.support.faulty import largest_file


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.mark.parametrize(
    ("number", "expected"),
    [
        (errno.ENOSPC, "the disk is full; free some space"),
        (errno.EDQUOT, "the disk is full; free some space"),
        (errno.EROFS, "no permission to write there"),
        (errno.EACCES, "no permission to write there"),
        (errno.EIO, "input/output error; check the folder"),
    ],
)
def test_each_refusal_is_one_sentence(tmp_path: Path, number: int, expected: str) -> None:
    with pytest.raises(StoreError, match=f"cannot write {tmp_path}: {expected}"), storage_errors(tmp_path):
        raise OSError(number, os.strerror(number))


# -- reading ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (None, "is missing: "),
        ("folder", r"cannot be read \(Is a directory\): "),
        (b"", r"is damaged \(it is not JSON\): "),
        (b'{"a": 1', r"is damaged \(it is not JSON\): "),
        (b'{"a": NaN}', r"is damaged \(it is not JSON\): "),
        (b'{"a": "\xff"}', r"is damaged \(it is not JSON\): "),
        (b"[1]", r"is damaged \(it is not a JSON object\): "),
    ],
)
def test_a_bad_json_file_is_one_sentence(data: bytes | str | None, words: str, tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    if isinstance(data, bytes):
        path.write_bytes(data)
    elif data == "folder":
        path.mkdir()
    with pytest.raises(StoreError, match=f"{path} {words}delete it"):
        read_object(path, remedy="delete it")


def test_a_written_file_is_read_with_its_digest(tmp_path: Path) -> None:
    write_json(tmp_path / "a.json", {"a": [1, None, "ü"]})
    assert read_json(tmp_path / "a.json", remedy="") == {"a": [1, None, "ü"]}
    data = (tmp_path / "a.json").read_bytes()
    assert read_file(tmp_path / "a.json", digest=sha256(data), remedy="") == data
    with pytest.raises(StoreError, match=r"a\.json is damaged \(its SHA-256 differs\): delete it"):
        read_file(tmp_path / "a.json", digest=sha256(data + b" "), remedy="delete it")


@pytest.mark.parametrize("text", ["NaN", "[-Infinity]", '{"a": Infinity}', "{", ""])
def test_json_has_no_nan_and_no_infinities(text: str) -> None:
    with pytest.raises(ValueError):
        parse_json(text)


# -- files ------------------------------------------------------------------------------------------------------------


def test_a_file_is_replaced_as_a_whole_or_stays(tmp_path: Path) -> None:
    path = tmp_path / "folder" / "file.json"
    write_json(path, {"a": 1})
    with largest_file(100), pytest.raises(StoreError, match="cannot write"):
        write_bytes(path, b"x" * 1000)
    assert json.loads(path.read_text()) == {"a": 1}
    assert names(path.parent) == ["file.json"]


def test_nothing_is_written_through_a_link(tmp_path: Path) -> None:
    """Neither at the name itself nor at the temporary name, which is predictable."""
    victim, folder = tmp_path / "victim", tmp_path / "run"
    victim.write_bytes(b"precious\n")
    folder.mkdir()
    for link in (folder / "card", partial_name(folder / "card"), folder / "times.jsonl"):
        link.symlink_to(victim)
    (folder / "new.jsonl").symlink_to(tmp_path / "nowhere")
    write_bytes(folder / "card", b"card")
    for name in ("times.jsonl", "new.jsonl"):
        with pytest.raises(StoreError, match=rf"cannot write .*{name}: it is a link that leads elsewhere; delete it"):
            append_bytes(folder / name, b"row\n")
    assert victim.read_bytes() == b"precious\n" and not (tmp_path / "nowhere").exists()
    assert (folder / "card").read_bytes() == b"card" and not (folder / "card").is_symlink()
    assert names(folder) == ["card", "new.jsonl", "times.jsonl"]


@pytest.mark.parametrize("number", [errno.EINVAL, errno.ENOTSUP, errno.ENOSYS, errno.EIO])
def test_a_disk_that_cannot_flush_folders_is_accepted(
    number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """SMB and some FUSE disks refuse to; an input/output error stays an error."""

    def refuse(handle: int) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "fsync", refuse)
    if number == errno.EIO:
        with pytest.raises(OSError, match="Input/output"):
            sync_folder(tmp_path)
    else:
        sync_folder(tmp_path)


# -- folders ----------------------------------------------------------------------------------------------------------


def test_a_new_folder_appears_whole(tmp_path: Path) -> None:
    with new_folder(tmp_path / "deep" / "out") as unfinished:
        (unfinished / "a").write_text("first")
        assert not (tmp_path / "deep" / "out").exists()
    with (
        pytest.raises(StoreError, match=r"cannot write .*/out: directory not empty"),
        new_folder(tmp_path / "deep" / "out"),
    ):
        pass
    with pytest.raises(KeyError), new_folder(tmp_path / "deep" / "out", replace=True) as unfinished:
        (unfinished / "b").write_text("half")
        raise KeyError
    assert names(tmp_path / "deep") == ["out"] and names(tmp_path / "deep" / "out") == ["a"]
    with new_folder(tmp_path / "deep" / "out", replace=True) as unfinished:
        (unfinished / "b").write_text("second")
    assert names(tmp_path / "deep") == ["out"] and names(tmp_path / "deep" / "out") == ["b"]


@pytest.mark.parametrize("name", ["out", "out[1-9]*"])
def test_a_new_folder_removes_what_killed_processes_left_and_nothing_else(name: str, tmp_path: Path) -> None:
    """The name is not read as a pattern."""
    partial, others = [f".{name}.12.partial", f".{name}.13.old.partial"], [f".{name}.notes.partial", ".out3.12.partial"]
    for entry in (*partial, *others):
        (tmp_path / entry / "deep").mkdir(parents=True)
    with new_folder(tmp_path / name):
        pass
    assert names(tmp_path) == sorted([name, *others])


def test_everything_is_on_the_disk_before_a_folder_gets_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    flushed, flush = set(), os.fsync

    def record(handle: int) -> None:
        flushed.add(Path(os.readlink(f"/proc/self/fd/{handle}")).name)
        flush(handle)

    def replace(source: Path, target: Path) -> None:
        assert flushed == {"a", "b", "images", source.name}
        os.rename(source, target)

    monkeypatch.setattr(os, "fsync", record)
    monkeypatch.setattr(os, "replace", replace)
    with new_folder(tmp_path / "x") as unfinished:
        (unfinished / "images").mkdir()
        (unfinished / "images" / "a").touch()
        (unfinished / "b").touch()
    assert tmp_path.name in flushed and names(tmp_path / "x") == ["b", "images"]


WRITER = """
import sys
from pathlib import Path
from gdro_cli.files import new_folder
print("ready", flush=True)
while True:
    for number in range(4):
        with new_folder(Path(sys.argv[1]) / f"{number:05d}", replace=True) as unfinished:
            for image in range(30):
                (unfinished / str(image)).write_bytes(bytes(5000))
"""


@pytest.mark.slow
def test_killed_at_any_moment_no_folder_is_half_written(tmp_path: Path) -> None:
    for kill in range(8):
        writer = subprocess.Popen([sys.executable, "-c", WRITER, str(tmp_path)], stdout=subprocess.PIPE)
        assert writer.stdout is not None
        writer.stdout.readline()
        time.sleep(0.003 + 0.031 * kill)
        writer.kill()
        writer.communicate()
        for folder in tmp_path.glob("[0-9]*"):
            assert [path.stat().st_size for path in folder.iterdir()] == [5000] * 30
    assert list(tmp_path.glob("[0-9]*"))
