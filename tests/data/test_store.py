"""The group store: what is written is read back, and other or damaged stores are refused."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from gdro_cli.data.prompts import PromptRecord, PromptSet
from gdro_cli.data.store import Group, GroupStore
from gdro_cli.errors import StoreError
from gdro_cli.identity import digest

Open = Callable[..., GroupStore]
Make = Callable[..., Group]


def test_in_a_new_store_every_shard_is_missing(open_store: Open, prompts: PromptSet) -> None:
    store = open_store()
    assert store.missing_shards() == [0, 1, 2]
    assert [len(shard) for shard in store.shards] == [2, 2, 1]
    assert store.prompts == prompts.records
    assert GroupStore.open(store.path) == store


def test_a_written_store_is_read_back(store: GroupStore, make_group: Make) -> None:
    assert store.missing_shards() == []
    for number, shard in enumerate(store.shards):
        for group, prompt in zip(store.read_shard(number), shard, strict=True):
            written = make_group(prompt)
            assert group.prompt == prompt and group.origins == tuple({"seed": seed} for seed in (0, 10, 20, 30))
            assert group.latents.dtype == torch.bfloat16 and torch.equal(group.latents, written.latents)
            assert set(group.conditioning) == {"prompt_embeds", "mask"}
            for name, tensor in written.conditioning.items():
                assert group.conditioning[name].dtype == tensor.dtype
                assert torch.equal(group.conditioning[name], tensor)
        for image in store.images(number):
            assert Image.open(image.path).tobytes() == make_group(image.prompt).images[image.index].tobytes()


def test_the_files_have_the_documented_names(store: GroupStore) -> None:
    folder = store.path / "shards" / "00001"
    names = [prompt.id for prompt in store.shards[1]]
    assert sorted(entry.name for entry in folder.iterdir()) == [
        "images", "index.jsonl", "manifest.json", "tensors.safetensors"
    ]  # fmt: skip
    assert (folder / "images" / f"{names[1]}-003.png").is_file()
    keys = {f"{name}/{key}" for name in names for key in ("latents", "conditioning/prompt_embeds", "conditioning/mask")}
    assert set(load_file(folder / "tensors.safetensors")) == keys
    rows = [json.loads(line) for line in (folder / "index.jsonl").read_text().splitlines()]
    assert rows[5] == {"prompt_id": names[1], "index": 1, "seed": 10, "file": f"images/{names[1]}-001.png"}


def test_webp_is_lossless(open_store: Open, make_group: Make) -> None:
    store = open_store(image_format="webp")
    store.write_shard(2, [make_group(prompt) for prompt in store.shards[2]])
    image = store.images(2)[3]
    assert image.path.suffix == ".webp"
    assert Image.open(image.path).convert("RGB").tobytes() == make_group(image.prompt).images[3].tobytes()


def test_views_of_one_tensor_are_stored_whole(open_store: Open, make_group: Make) -> None:
    """Slices of one batch share memory, which safetensors refuses unless they are copied."""
    store = open_store()
    batch = torch.arange(48.0).reshape(8, 3, 2).transpose(1, 2)
    groups = [
        dataclasses.replace(make_group(prompt), latents=latents)
        for prompt, latents in zip(store.shards[0], batch.split(4), strict=True)
    ]
    store.write_shard(0, groups)
    assert torch.equal(torch.cat([group.latents for group in store.read_shard(0)]), batch)


def test_writing_again_gives_the_same_bytes(store: GroupStore, make_group: Make) -> None:
    before = store.shard_digest(1)
    shutil.rmtree(store.path / "shards" / "00001")
    assert store.missing_shards() == [1]
    store.write_shard(1, [make_group(prompt) for prompt in store.shards[1]])
    assert store.shard_digest(1) == before


def test_a_store_is_opened_again_with_another_shard_size(store: GroupStore, open_store: Open) -> None:
    again = open_store(prompts_per_shard=5)
    assert again == store and again.missing_shards() == []


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"identity": {"model": {"path": "tiny"}, "sample": {"steps": 20, "guidance": 1.0}}}, "sample.steps: 8 -> 20"),
        ({"identity": {"model": {"path": "tiny"}}}, 'sample: {"guidance": 1.0, "steps": 8} -> (absent)'),
        ({"images_per_prompt": 2}, "images_per_prompt: 4 -> 2"),
        ({"prompts": PromptSet.of([PromptRecord.of('"X"', target="X")])}, "prompt_set.count: 5 -> 1"),
    ],
)
def test_a_store_with_another_identity_is_refused_with_the_difference(
    store: GroupStore, open_store: Open, changes: dict[str, Any], expected: str
) -> None:
    with pytest.raises(StoreError) as caught:
        open_store(**changes)
    assert expected in str(caught.value)
    assert str(store.path) in str(caught.value) and "gdro sample" in str(caught.value)


def test_a_long_list_of_differences_is_shortened(store: GroupStore, open_store: Open) -> None:
    with pytest.raises(StoreError, match="and 7 more"):
        open_store(identity={f"key{number}": number for number in range(13)})


def test_wrong_groups_are_programming_errors(open_store: Open, make_group: Make) -> None:
    store = open_store()
    first, second = (make_group(prompt) for prompt in store.shards[0])
    for groups in (
        [second, first],
        [first],
        [first, make_group(second.prompt, images=3)],
        [first, dataclasses.replace(second, origins=[{"seed": 1}])],
    ):
        with pytest.raises(ValueError):
            store.write_shard(0, groups)
    assert store.missing_shards() == [0, 1, 2]


def test_latents_that_are_not_finite_are_refused(open_store: Open, make_group: Make) -> None:
    store = open_store()
    groups = [make_group(prompt) for prompt in store.shards[0]]
    groups[1].latents[2, 0, 0] = float("nan")
    with pytest.raises(StoreError, match=rf"{groups[1].prompt.id}.* not finite"):
        store.write_shard(0, groups)
    assert store.missing_shards() == [0, 1, 2]


def forge(path: Path, **changes: Any) -> None:
    """Edit the store's manifest and correct its digest, as an attacker would."""
    content = json.loads(path.read_text()) | changes
    del content["digest"]
    path.write_text(json.dumps(content | {"digest": digest(content)}))


def test_a_missing_store_and_the_manifest_of_something_else(tmp_path: Path, open_store: Open) -> None:
    with pytest.raises(StoreError, match=r"none/manifest.json is missing: .* run `gdro sample --recipe x`"):
        GroupStore.open(tmp_path / "none", command="gdro sample --recipe x")
    (tmp_path / "store").mkdir()
    (tmp_path / "store" / "manifest.json").write_text('{"kind": "cake"}')
    with pytest.raises(StoreError, match="is not the manifest of a group store"):
        open_store()


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", "is not JSON"),
        ("[]", "not a JSON object"),
        ('{"kind": "gdro group store", "schema": 99}', "has schema 99, but this version reads 1"),
        ('{"kind": "gdro group store", "schema": 1, "digest": "0"}', "does not match its digest"),
    ],
)
def test_a_damaged_store_manifest(store: GroupStore, text: str, expected: str) -> None:
    (store.path / "manifest.json").write_text(text, encoding="latin-1")
    with pytest.raises(StoreError, match=expected):
        GroupStore.open(store.path)


@pytest.mark.parametrize(
    "changes",
    [
        {"shards": [["../../../etc/passwd"]]},
        {"prompts": [{"id": "../../x", "prompt": "p", "target": None, "metadata": {}}], "shards": [["../../x"]]},
        {"prompts": 3},
        {"image_format": "/../../x"},
        {"image_format": ["png"]},
    ],
)
def test_a_forged_store_manifest(store: GroupStore, changes: dict[str, Any]) -> None:
    forge(store.path / "manifest.json", **changes)
    with pytest.raises(StoreError, match="damaged"):
        GroupStore.open(store.path)


def test_shards_of_another_store_are_refused(store: GroupStore) -> None:
    forge(store.path / "manifest.json", identity={"other": 1})
    with pytest.raises(StoreError, match=r"00000/manifest.json has another store than the store"):
        GroupStore.open(store.path).missing_shards()
