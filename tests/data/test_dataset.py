"""The training set: eligible groups, draws, and shuffled rewards."""

from __future__ import annotations

import math
import shutil
from collections import Counter
from collections.abc import Callable

import pytest
import torch

from gdro_cli.data.dataset import GroupCounts, GroupDataset
from gdro_cli.data.scores import ScoreRow, ScoreTable
from gdro_cli.data.store import Group, GroupStore
from gdro_cli.errors import StoreError

Load = Callable[..., GroupDataset]

REWARDS: list[list[float | None]] = [
    [0.0, 0.25, 0.5, 1.0],
    [0.5, 0.5, 0.5, 0.5],  # no spread
    [0.0, None, 1.0, 0.0],  # three scored
    [None, None, 1.0, 0.0],  # two scored
    [0.5, 0.5, 0.5, 0.625],  # spread 1/8, from one image
]


@pytest.fixture
def load(store: GroupStore) -> Load:
    """Score the five groups of the store and load them."""

    def load_them(rewards: list[list[float | None]] = REWARDS, **options: float) -> GroupDataset:
        table = ScoreTable.create_or_open(store, "test", provenance={"rewards": rewards})
        values = {prompt.id: row for prompt, row in zip(store.prompts, rewards, strict=True)}
        for number in table.missing_shards():
            slots = [(prompt.id, index) for prompt in store.shards[number] for index in range(4)]
            rows = [(name, index, values[name][index]) for name, index in slots]
            table.write_shard(
                number,
                [ScoreRow(name, index, value, "x" if value is None else None) for name, index, value in rows],
            )
        return GroupDataset.load(store, table, **options)  # type: ignore[arg-type]

    return load_them


@pytest.mark.parametrize(
    ("k", "min_spread", "eligible", "too_few", "no_spread"),
    [
        (2, 0.0, (0, 2, 3, 4), 0, 1),
        (3, 0.0, (0, 2, 4), 1, 1),
        (4, 0.0, (0, 4), 2, 1),
        (3, 0.125, (0, 2), 1, 2),
    ],
)
def test_eligible_groups(
    load: Load, k: int, min_spread: float, eligible: tuple[int, ...], too_few: int, no_spread: int
) -> None:
    """Spread must exceed ``min_spread``: 1/8 does not exceed 1/8."""
    data = load(k=k, min_spread=min_spread)
    assert data.prompt_indices == eligible
    assert data.counts == GroupCounts(5, len(eligible), too_few, no_spread)


def test_a_draw_has_the_content_of_the_store(load: Load, store: GroupStore, make_group: Callable[..., Group]) -> None:
    batch = load(k=3).draw(0, groups=3, seed=0)
    assert batch.latents.shape == (3, 3, 3, 2) and batch.latents.dtype == torch.bfloat16
    assert batch.rewards.shape == batch.mask.shape == batch.image_indices.shape == (3, 3)
    assert batch.rewards.dtype == torch.float32 and bool(batch.mask.all())
    for row, prompt in enumerate(batch.prompts):
        rewards = REWARDS[store.prompts.index(prompt)]
        images = batch.image_indices[row].tolist()
        assert len(set(images)) == 3
        written = make_group(prompt)
        assert torch.equal(batch.latents[row], written.latents[images])
        assert batch.rewards[row].tolist() == [rewards[image] for image in images]
        assert torch.equal(batch.conditioning[row]["prompt_embeds"], written.conditioning["prompt_embeds"])


def test_the_shares_of_two_processes_are_every_second_group(load: Load) -> None:
    batch = load(k=2).draw(0, groups=3, seed=0)
    for rank, own in ((0, [0, 2]), (1, [1])):
        share = batch.share(rank, 2)
        assert share.prompts == tuple(batch.prompts[row] for row in own)
        assert torch.equal(share.latents, batch.latents[own]) and torch.equal(share.rewards, batch.rewards[own])
        assert len(share.conditioning) == len(share.visits) == len(share.mask) == len(own)


def test_a_draw_depends_only_on_seed_and_step(load: Load) -> None:
    data, again = load(k=2), load(k=2)
    for step in (7, 0, 7, 3):
        one, two = data.draw(step, groups=3, seed=5), again.draw(step, groups=3, seed=5)
        assert one.prompts == two.prompts and torch.equal(one.image_indices, two.image_indices)
        assert torch.equal(one.latents, two.latents)
    drawn = [data.draw(step, groups=3, seed=seed) for seed in (5, 6) for step in range(8)]
    assert len({(batch.prompts, tuple(batch.image_indices.flatten().tolist())) for batch in drawn}) > 8


def test_an_epoch_visits_every_group_once_for_any_batch_size(load: Load) -> None:
    data = load(k=2)
    ones = [data.draw(step, groups=1, seed=1) for step in range(12)]
    order = [batch.prompts[0].id for batch in ones]
    assert all(len(set(order[first : first + 4])) == 4 for first in (0, 4, 8))
    assert [batch.visits[0] for batch in ones] == [0] * 4 + [1] * 4 + [2] * 4
    threes = [data.draw(step, groups=3, seed=1) for step in range(4)]
    assert [prompt.id for batch in threes for prompt in batch.prompts] == order
    images = torch.cat([batch.image_indices for batch in threes])
    assert torch.equal(images, torch.cat([batch.image_indices for batch in ones]))


def test_each_epoch_has_a_new_permutation(load: Load) -> None:
    data = load(k=2)
    orders = {data.draw(epoch, groups=4, seed=0).prompts for epoch in range(12)}
    assert len(orders) > 4  # of 24


def test_every_draw_has_spread_and_all_images_are_drawn(load: Load) -> None:
    """One image of group 4 differs; with K = 2 only draws with that image (one in two) have spread."""
    data = load(k=2)
    seen: Counter[tuple[int, int]] = Counter()
    for step in range(200):
        batch = data.draw(step, groups=4, seed=0)
        assert bool((batch.rewards.amax(1) > batch.rewards.amin(1)).all())
        for prompt, images in zip(batch.prompts, batch.image_indices.tolist(), strict=True):
            seen.update((data.prompt_indices[data.prompts.index(prompt)], image) for image in images)
    assert seen[4, 3] == 200
    # The partner is one of three, each 1/3: 67 with a standard deviation of 6.7.
    assert all(abs(seen[4, image] - 66.7) < 30 for image in range(3))
    # Group 0, K = 2 of 4: each image in half of the draws, standard deviation 7.
    assert all(abs(seen[0, image] - 100) < 32 for image in range(4))
    assert not {(2, 1), (3, 0), (3, 1)} & set(seen)


def test_a_draw_has_spread_even_if_no_attempt_had(load: Load, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gdro_cli.data.dataset.MAX_REDRAWS", 1)
    data = load(k=3)
    for step in range(40):
        batch = data.draw(step, groups=3, seed=0)
        assert bool((batch.rewards.amax(1) > batch.rewards.amin(1)).all())
        assert all(len(set(images)) == 3 for images in batch.image_indices.tolist())


def test_shuffled_rewards_remain_in_their_group_and_missing_ones_missing(load: Load) -> None:
    data = load(k=2)
    shuffled = [data.with_shuffled_rewards(seed) for seed in range(20)]
    for other in shuffled:
        assert torch.equal(other.latents, data.latents)
        assert torch.equal(other.rewards.isnan(), data.rewards.isnan())
        for before, after in zip(data.rewards.nan_to_num(-1), other.rewards.nan_to_num(-1), strict=True):
            assert torch.equal(before.sort().values, after.sort().values)
    assert len({tuple(other.rewards[0].tolist()) for other in shuffled}) > 8  # of 24 orders
    assert torch.equal(shuffled[0].rewards.nan_to_num(), data.with_shuffled_rewards(0).rewards.nan_to_num())
    assert math.isnan(data.rewards[1, 1])  # the data set itself is unchanged


def test_images_are_never_opened(load: Load, store: GroupStore) -> None:
    for number in range(len(store.shards)):
        shutil.rmtree(store.path / "shards" / f"{number:05d}" / "images")
    assert len(load(k=2)) == 4


def test_a_store_without_eligible_groups_is_refused(load: Load) -> None:
    expected = "of 5 groups, 2 have fewer than 4 scored images and 3 have no reward spread above 2"
    with pytest.raises(StoreError, match=expected):
        load(k=4, min_spread=2.0)
