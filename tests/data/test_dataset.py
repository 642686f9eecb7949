"""The training set: eligible groups, draws, and shuffled rewards."""

from __future__ import annotations

import math
import shutil
from collections import Counter
from collections.abc import Callable

import pytest
import torch

from gdro_cli.data.dataset import EMPTY, GroupCounts, GroupDataset
from gdro_cli.data.records import PromptSet
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
    assert data.counts == GroupCounts(5, len(eligible), too_few, no_spread, whole=0)


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
        assert all(torch.equal(one, two) for one, two in zip(other.latents, data.latents, strict=True))
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


def unequal(
    open_store: Callable[..., GroupStore],
    make_group: Callable[..., Group],
    rewards: list[list[float]],
    **weights: float,
) -> tuple[GroupStore, ScoreTable]:
    """A store with groups of as many images as they have rewards, and its scores."""
    sizes = [len(group) for group in rewards]
    store = open_store(images_per_prompt=sizes, **({"weights": weights} if weights else {}))
    table = ScoreTable.create_or_open(store, "test", provenance={})
    values = {prompt.id: row for prompt, row in zip(store.prompts, rewards, strict=True)}
    for number in store.missing_shards():
        store.write_shard(
            number, [make_group(prompt, images=store.sizes[prompt.id]) for prompt in store.shards[number]]
        )
        rows = [ScoreRow(p.id, i, value) for p in store.shards[number] for i, value in enumerate(values[p.id])]
        table.write_shard(number, rows)
    return store, table


UNEQUAL = [[0.1, 0.9], [0.5, 0.2, 0.3, 0.8, 0.1], [1.0], [0.4, 0.4, 0.1], [0.3, 0.3]]


def test_smaller_groups_are_left_out_or_drawn_whole_and_never_padded_with_copies(
    open_store: Callable[..., GroupStore], make_group: Callable[..., Group]
) -> None:
    store, table = unequal(open_store, make_group, UNEQUAL)
    dropped = GroupDataset.load(store, table, k=3)
    assert dropped.prompt_indices == (1, 3) and dropped.counts == GroupCounts(5, 2, 3, 0, whole=0)

    data = GroupDataset.load(store, table, k=3, k_policy="whole")
    assert data.prompt_indices == (0, 1, 3) and data.counts == GroupCounts(5, 3, 1, 1, whole=1)
    for step in range(4):
        batch = data.draw(step, groups=3, seed=0)
        assert batch.latents.shape == (3, 3, 3, 2)
        for row, prompt in enumerate(batch.prompts):
            size, images = store.sizes[prompt.id], batch.image_indices[row]
            present = images[images != EMPTY].tolist()
            assert len(present) == len(set(present)) == min(3, size)
            assert batch.mask[row].tolist() == [True] * len(present) + [False] * (3 - len(present))
            written, own = make_group(prompt, images=size), UNEQUAL[store.prompts.index(prompt)]
            assert torch.equal(batch.latents[row, : len(present)], written.latents[present])
            assert not batch.latents[row, len(present) :].any()
            assert batch.rewards[row, : len(present)].tolist() == pytest.approx([own[image] for image in present])
            assert bool(batch.rewards[row, len(present) :].isnan().all())


def test_k_is_at_most_the_largest_group(
    open_store: Callable[..., GroupStore], make_group: Callable[..., Group]
) -> None:
    store, table = unequal(open_store, make_group, [[0.1, 0.9], [0.5, 0.2], [1.0, 0.0], [0.4, 0.1], [0.3, 0.2]])
    batch = GroupDataset.load(store, table, k=6, k_policy="whole").draw(0, groups=2, seed=0)
    assert batch.rewards.shape == (2, 2) and bool(batch.mask.all())
    with pytest.raises(StoreError, match="5 have fewer than 6 scored images"):
        GroupDataset.load(store, table, k=6)


def test_a_method_that_needs_no_order_learns_from_equal_rewards_and_single_images(
    open_store: Callable[..., GroupStore], make_group: Callable[..., Group]
) -> None:
    store, table = unequal(open_store, make_group, UNEQUAL)
    data = GroupDataset.load(store, table, k=1, min_spread=None)
    assert len(data) == 5 and data.draw(0, groups=5, seed=0).image_indices.shape == (5, 1)


def test_weights_of_groups_have_a_mean_of_one(
    open_store: Callable[..., GroupStore], make_group: Callable[..., Group], prompts: PromptSet
) -> None:
    weights = {prompts.records[0].id: 3.0, prompts.records[4].id: 0.5}
    rewards = [[0.1, 0.9], [0.5, 0.2], [1.0, 0.0], [0.4, 0.4], [0.3, 0.2]]  # the fourth cannot be trained on
    store, table = unequal(open_store, make_group, rewards, **weights)
    batch = GroupDataset.load(store, table, k=2).draw(0, groups=4, seed=0)
    own = dict(zip([prompt.id for prompt in batch.prompts], batch.weights.tolist(), strict=True))
    assert own == {
        prompt.id: pytest.approx(weights.get(prompt.id, 1.0) / (5.5 / 4))
        for prompt in prompts.records[:3] + prompts.records[4:]
    }


def test_an_epoch_of_a_method_that_needs_no_order_visits_every_image(
    open_store: Callable[..., GroupStore], make_group: Callable[..., Group]
) -> None:
    store, table = unequal(open_store, make_group, UNEQUAL)  # 2 + 5 + 1 + 3 + 2 images
    data = GroupDataset.load(store, table, k=1, min_spread=None)
    for epoch in range(2):
        batches = [data.draw(13 * epoch + step, groups=1, seed=0) for step in range(13)]
        drawn = {(batch.prompts[0].id, int(batch.image_indices[0, 0])) for batch in batches}
        assert len(drawn) == 13 and {batch.visits for batch in batches} == {(epoch,)}
    pairs = GroupDataset.load(store, table, k=2, k_policy="whole", min_spread=None)
    sizes = [int(pairs.draw(0, groups=6, seed=0).mask[row].sum()) for row in range(6)]
    assert sorted(sizes) == [1, 2, 2, 2, 2, 2]  # 5 images are two visits, and one of them is left out
