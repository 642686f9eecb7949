"""A small complete store with scores and reference errors, and what a training reads of it."""

from __future__ import annotations

from pathlib import Path

import torch
from PIL import Image

from gdro_cli.data.records import PromptRecord, PromptSet
from gdro_cli.data.references import ReferenceErrors
from gdro_cli.data.scores import ScoreRow, ScoreTable
from gdro_cli.data.store import Group, GroupStore

PROMPTS = PromptSet.of(PromptRecord.of(f'a sign that says "{word}"', target=word) for word in ("ONE", "TWO", "THREE"))
IDENTITY = {"model": {"path": "tiny"}, "steps": 3}


def make(path: Path) -> Path:
    """Three prompts with two images each, in two shards."""
    store = open_store(path)
    for number, prompts in enumerate(store.shards):
        store.write_shard(number, [_group(prompt) for prompt in prompts])
    table = open_table(store)
    for number in table.missing_shards():
        table.write_shard(number, [ScoreRow(i.prompt.id, i.index, 0.5) for i in store.images(number)])
    ReferenceErrors(store, {"seed": 0}).add([(PROMPTS.records[0].id, 0, 0)], torch.tensor([0.25]))
    return path


def open_store(path: Path) -> GroupStore:
    return GroupStore.create_or_open(path, identity=IDENTITY, prompts=PROMPTS, images_per_prompt=2, prompts_per_shard=2)


def open_table(store: GroupStore) -> ScoreTable:
    return ScoreTable.create_or_open(store, "ocr", provenance={"rule": "substring"})


def use(path: Path) -> None:
    """Everything that a training reads of a store; it must be as it was made."""
    store = open_store(path)
    store.missing_shards()
    for number in range(len(store.shards)):
        store.read_shard(number)
        store.images(number)
    table = open_table(store)
    assert table.missing_shards() == []
    assert [row.value for row in table.rows()] == [0.5] * 6
    assert ReferenceErrors(store, {"seed": 0}).lookup([(PROMPTS.records[0].id, 0, 0)]).tolist() == [0.25]


def _group(prompt: PromptRecord) -> Group:
    picture = Image.new("RGB", (8, 8))
    return Group(
        prompt, torch.ones(2, 3, 2), {"embeds": torch.ones(4, 2)}, [picture, picture], [{"seed": 1}, {"seed": 2}]
    )
