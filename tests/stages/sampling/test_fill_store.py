"""A shard is written while the images of the next are drawn; what the writing raises ends the sampling."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from gdro_cli.config.recipe import Recipe
from gdro_cli.data.shard_times import total_time
from gdro_cli.data.store import Group, GroupStore
from gdro_cli.errors import StoreError
from gdro_cli.runtime.progress import Reporter
from gdro_cli.stages.sampling import fill_store, sample
from gdro_cli.stages.setup.session import Session

pytestmark = pytest.mark.slow

MakeRecipe = Callable[..., Recipe]
PATIENCE = 60.0
"""Seconds until a shard that waits for the next one's drawing counts as stuck."""


def test_the_next_shard_is_drawn_while_one_is_written(
    make_recipe: MakeRecipe, tmp_path: Path, quiet: Reporter, monkeypatch: pytest.MonkeyPatch
) -> None:
    shards = 3
    drawing, write, draw = threading.Semaphore(0), GroupStore.write_shard, fill_store.sample_groups

    def drawn(*arguments: Any, **options: Any) -> list[Group]:
        drawing.release()
        return draw(*arguments, **options)

    def written(store: GroupStore, number: int, groups: Sequence[Group]) -> None:
        if number + 1 < shards:
            assert all(drawing.acquire(timeout=PATIENCE) for _ in range(2)), "the next shard was not drawn meanwhile"
            drawing.release()
        write(store, number, groups)

    monkeypatch.setattr(fill_store, "sample_groups", drawn)
    monkeypatch.setattr(GroupStore, "write_shard", written)
    recipe = make_recipe(prompts={"train": {"count": shards}}, sample={"prompts_per_shard": 1})
    store = sample.run(Session(recipe, tmp_path, quiet)).store
    assert not store.missing_shards()
    assert total_time(store.path, shards=shards) is not None


@pytest.mark.parametrize("failing", [0, 2])
def test_a_shard_that_cannot_be_written_ends_the_sampling(
    failing: int, make_recipe: MakeRecipe, tmp_path: Path, quiet: Reporter, monkeypatch: pytest.MonkeyPatch
) -> None:
    write = GroupStore.write_shard

    def written(store: GroupStore, number: int, groups: Sequence[Group]) -> None:
        if number == failing:
            raise StoreError("the disk is full")
        write(store, number, groups)

    monkeypatch.setattr(GroupStore, "write_shard", written)
    recipe = make_recipe(prompts={"train": {"count": 3}}, sample={"prompts_per_shard": 1})
    with pytest.raises(StoreError, match="the disk is full"):
        sample.run(Session(recipe, tmp_path, quiet))
    (path,) = (tmp_path / "stores").iterdir()
    assert GroupStore.open(path).missing_shards() == list(range(failing, 3))
