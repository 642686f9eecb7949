"""Faults of files on shared machines: truncated, changed, lost and linked files, and disks that refuse."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from gdro_cli.data.store import Group, GroupStore
from gdro_cli.errors import StoreError
from tests.support.faulty import largest_file

Open = Callable[..., GroupStore]
Make = Callable[..., Group]
REMEDY = r"/shards/00001/.*: delete the folder .*/shards/00001 and run `gdro sample`, which makes it again"


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
    return {"tensors": shard(store) / "tensors.safetensors", "index": shard(store) / "index.jsonl", "image": image}


@pytest.mark.parametrize("name", ["tensors", "index", "image"])
@pytest.mark.parametrize("harm", [cut, Path.unlink, lambda path: path.write_bytes(b"")])
def test_truncated_or_lost_files_are_noticed_without_reading_them(
    store: GroupStore, name: str, harm: Callable[[Path], object]
) -> None:
    harm(files(store)[name])
    with pytest.raises(StoreError, match=REMEDY):
        store.missing_shards()


@pytest.mark.parametrize("name", ["tensors", "index", "image"])
def test_changed_bytes_are_noticed_when_they_are_read(store: GroupStore, name: str) -> None:
    flip(files(store)[name])
    read = store.images if name == "image" else store.read_shard
    with pytest.raises(StoreError, match=REMEDY):
        read(1)
    read(0)


@pytest.mark.parametrize("text", ["", "[]", "\x80", '{"schema": 1}'])
def test_a_damaged_shard_manifest(store: GroupStore, text: str) -> None:
    (shard(store) / "manifest.json").write_text(text, encoding="latin-1")
    for read in (lambda: store.missing_shards(), lambda: store.read_shard(1), lambda: store.images(1)):
        with pytest.raises(StoreError, match=REMEDY):
            read()


def test_a_forged_shard_manifest_cannot_name_files_outside(store: GroupStore) -> None:
    path = shard(store) / "manifest.json"
    manifest = json.loads(path.read_text())
    manifest["files"]["../../../outside"] = {"bytes": 1, "sha256": "0"}
    path.write_text(json.dumps(manifest))
    with pytest.raises(StoreError, match="lists other files than those of the shard"):
        store.missing_shards()


@pytest.mark.parametrize("what", [".", "images", ".."])
def test_links_out_of_the_store_are_not_followed(
    store: GroupStore, make_group: Make, tmp_path: Path, what: str
) -> None:
    inside = Path(os.path.normpath(shard(store) / what))
    shutil.move(inside, tmp_path / "outside")
    inside.symlink_to(tmp_path / "outside")
    before = sorted((tmp_path / "outside").rglob("*"))
    for use in (lambda: store.missing_shards(), lambda: store.read_shard(1)):
        with pytest.raises(StoreError, match=f"{inside} is a link that leaves its folder: delete it"):
            use()
    groups = [make_group(prompt) for prompt in store.shards[1]]
    if what == "..":
        with pytest.raises(StoreError, match="is a link that leaves its folder"):
            store.write_shard(1, groups)
    else:
        store.write_shard(1, groups)  # replaces the link
    assert sorted((tmp_path / "outside").rglob("*")) == before


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


def test_if_the_disk_refuses_nothing_half_written_remains(open_store: Open, make_group: Make) -> None:
    store = open_store()
    groups = [make_group(prompt) for prompt in store.shards[0]]
    with largest_file(300), pytest.raises(StoreError, match=r"cannot write .*/shards/00000: file too large"):
        store.write_shard(0, groups)
    assert os.listdir(store.path / "shards") == []
    store.write_shard(0, groups)
    assert store.missing_shards() == [1, 2]


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


def test_a_path_below_a_file(tmp_path: Path, open_store: Open) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(StoreError, match=r"cannot write .*: not a directory"):
        open_store(tmp_path / "file" / "store")
