"""What befalls files on shared machines: cut, changed, lost, linked, refused, killed."""

from __future__ import annotations

import errno
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from gdro_cli.data.store import Group, GroupStore
from gdro_cli.errors import StoreError
from gdro_cli.files import storage_errors, write_bytes, write_folder, write_json

Open = Callable[..., GroupStore]
Make = Callable[..., Group]
REMEDY = r"shard 00001 of the store .* is damaged \(.*\): delete the folder .*/shards/00001 and run `gdro sample`"


def shard(store: GroupStore, number: int = 1) -> Path:
    return store.path / "shards" / f"{number:05d}"


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def files(store: GroupStore) -> dict[str, Path]:
    image = next((shard(store) / "images").iterdir())
    return {
        "tensors": shard(store) / "tensors.safetensors",
        "index": shard(store) / "index.jsonl",
        "image": image,
    }


@pytest.mark.parametrize("name", ["tensors", "index", "image"])
@pytest.mark.parametrize("harm", [cut, Path.unlink, lambda path: path.write_bytes(b"")])
def test_cut_or_lost_files_are_seen_without_reading_them(
    store: GroupStore, name: str, harm: Callable[[Path], object]
) -> None:
    harm(files(store)[name])
    with pytest.raises(StoreError, match=REMEDY):
        store.missing_shards()


@pytest.mark.parametrize("name", ["tensors", "index", "image"])
def test_changed_bytes_are_seen_when_read(store: GroupStore, name: str) -> None:
    flip(files(store)[name])
    read = store.images if name == "image" else store.read_shard
    with pytest.raises(StoreError, match=REMEDY):
        read(1)
    read(0)


def test_reading_latents_opens_no_picture(store: GroupStore) -> None:
    shutil.rmtree(shard(store) / "images")
    assert len(store.read_shard(1)) == 2


@pytest.mark.parametrize("text", ["", "{", "[]", "\x80", '{"schema": 1}', "[" * 100_000])
def test_damaged_shard_manifest(store: GroupStore, text: str) -> None:
    (shard(store) / "manifest.json").write_text(text, encoding="latin-1")
    for read in (lambda: store.missing_shards(), lambda: store.read_shard(1), lambda: store.images(1)):
        with pytest.raises(StoreError, match=REMEDY):
            read()


def test_forged_shard_manifest_cannot_name_files_outside(store: GroupStore, tmp_path: Path) -> None:
    path = shard(store) / "manifest.json"
    manifest = json.loads(path.read_text())
    manifest["files"]["../../../outside"] = {"bytes": 1, "sha256": "0"}
    path.write_text(json.dumps(manifest))
    with pytest.raises(StoreError, match="lists other files"):
        store.missing_shards()
    entries: list[object] = [None, [], {"index.jsonl": 3}]
    for files_entry in entries:
        path.write_text(json.dumps(manifest | {"files": files_entry}))
        with pytest.raises(StoreError, match=REMEDY):
            store.missing_shards()
    manifest["files"].pop("../../../outside")
    manifest["files"]["index.jsonl"] = "x"
    path.write_text(json.dumps(manifest))
    with pytest.raises(StoreError, match=REMEDY):
        store.missing_shards()


@pytest.mark.parametrize("what", [".", "images", "tensors.safetensors"])
def test_links_are_not_followed_out_of_the_store(store: GroupStore, tmp_path: Path, what: str) -> None:
    inside = shard(store) / what
    outside = tmp_path / "outside"
    shutil.move(inside, outside)
    Path(os.path.normpath(inside)).symlink_to(outside)
    with pytest.raises(StoreError, match=REMEDY):
        store.missing_shards()
    with pytest.raises(StoreError, match=REMEDY):
        store.read_shard(1)


def test_a_half_written_shard_is_missing_and_made_again(store: GroupStore, make_group: Make) -> None:
    before = store.shard_digest(1)
    (shard(store) / "manifest.json").unlink()
    cut(shard(store) / "tensors.safetensors")
    (store.path / "shards" / ".00001.4711.partial" / "images").mkdir(parents=True)
    assert store.missing_shards() == [1]
    with pytest.raises(StoreError, match=r"shard 00001 of the store .* is missing: run `gdro sample`"):
        store.read_shard(1)
    store.write_shard(1, [make_group(prompt) for prompt in store.shards[1]])
    assert store.missing_shards() == [] and store.shard_digest(1) == before
    assert sorted(os.listdir(store.path / "shards")) == ["00000", "00001", "00002"]


def test_the_manifest_is_on_the_disk_after_everything_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    order: list[str] = []
    flush = os.fsync

    def noting(handle: int) -> None:
        order.append(os.readlink(f"/proc/self/fd/{handle}").rsplit("/", 1)[-1])
        flush(handle)

    monkeypatch.setattr(os, "fsync", noting)
    write_folder(tmp_path / "x", {"manifest.json": b"m", "images/a": b"a", "b": b"b"}, last="manifest.json")
    assert sorted(order[:2]) == ["a", "b"] and order[2] == "manifest.json"


@contextmanager
def largest_file(size: int) -> Iterator[None]:
    """The operating system refuses to let any file grow beyond ``size`` bytes, as a full disk would."""
    _, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    ignored = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))
        signal.signal(signal.SIGXFSZ, ignored)


def test_a_disk_that_refuses_leaves_nothing_half_written(open_store: Open, make_group: Make) -> None:
    store = open_store()
    groups = [make_group(prompt) for prompt in store.shards[0]]
    with largest_file(300), pytest.raises(StoreError, match=r"cannot write .*/shards/00000: file too large"):
        store.write_shard(0, groups)
    assert os.listdir(store.path / "shards") == []
    store.write_shard(0, groups)
    assert store.missing_shards() == [1, 2]


def test_a_file_is_replaced_as_a_whole_or_stays(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "file.json"
    write_json(path, {"a": 1})
    with largest_file(100), pytest.raises(StoreError, match="cannot write"):
        write_bytes(path, b"x" * 1000)
    assert json.loads(path.read_text()) == {"a": 1}
    assert os.listdir(path.parent) == ["file.json"]


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


def test_read_only_folder(
    open_folder: Path, open_store: Open, make_group: Make, unprivileged: Callable[[], Any]
) -> None:
    store = open_store(open_folder / "store")
    groups = [make_group(prompt) for prompt in store.shards[0]]
    (open_folder / "store").chmod(0o555)
    with unprivileged():
        with pytest.raises(StoreError, match=r"cannot write .*/shards/00000: no permission to write there"):
            store.write_shard(0, groups)
        with pytest.raises(StoreError, match=r"cannot write .*: no permission to write there"):
            open_store(open_folder / "another")
        assert open_store(open_folder / "store").missing_shards() == [0, 1, 2]
    assert os.listdir(open_folder / "store") == ["manifest.json"]


def test_a_folder_nobody_may_enter(open_folder: Path, open_store: Open, unprivileged: Callable[[], Any]) -> None:
    store = open_store(open_folder / "store")
    store.path.chmod(0)
    with unprivileged():
        with pytest.raises(StoreError, match="cannot be read: Permission denied"):
            GroupStore.open(store.path)
        with pytest.raises(StoreError, match="no permission"):
            open_store(store.path)


def test_a_path_below_a_file(tmp_path: Path, open_store: Open) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(StoreError, match=r"cannot write .*: not a directory"):
        open_store(tmp_path / "file" / "store")


WRITER = """
import sys
from pathlib import Path
from gdro_cli.files import write_folder
print("ready", flush=True)
while True:
    for number in range(4):
        folder = Path(sys.argv[1]) / f"{number:05d}"
        files = {f"images/{image}": bytes(5000) for image in range(30)} | {"manifest.json": b"{}"}
        write_folder(folder, files, last="manifest.json")
"""


def test_killed_at_any_moment_no_half_shard_has_a_manifest(tmp_path: Path) -> None:
    for kill in range(8):
        writer = subprocess.Popen([sys.executable, "-c", WRITER, str(tmp_path)], stdout=subprocess.PIPE)
        assert writer.stdout is not None
        writer.stdout.readline()
        time.sleep(0.003 + 0.031 * kill)
        writer.kill()
        writer.communicate()
        for folder in tmp_path.glob("[0-9]*"):
            assert (folder / "manifest.json").exists()
            sizes = {path.stat().st_size for path in (folder / "images").iterdir()}
            assert sizes == {5000} and len(list((folder / "images").iterdir())) == 30
