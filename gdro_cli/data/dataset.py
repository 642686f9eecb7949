"""The training set: the groups of a store that can teach something, in memory, drawn as whole groups.

Only latents, conditioning and rewards are read; no image is opened and no encoder is needed. Shapes: P eligible groups
of I images each in memory; a draw has B groups of K images.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Self

import torch
from torch import Tensor

from gdro_cli.core.measures import Detail
from gdro_cli.core.seeds import generator
from gdro_cli.data.records import PromptRecord
from gdro_cli.data.scores import ScoreTable
from gdro_cli.data.store import GroupStore
from gdro_cli.errors import StoreError
from gdro_cli.files import sha256
from gdro_cli.identity import digest

MAX_REDRAWS = 16
"""Draws of K images until one has spread; with one odd image of 16 and K = 6, none has in 1 of 1,800 visits."""


@dataclass(frozen=True, slots=True)
class GroupCounts:
    """How many groups the store has and why some cannot be trained on."""

    total: int
    eligible: int
    too_few_scores: int
    """Groups with fewer than k scored images."""
    no_spread: int
    """Groups with k scores or more that all lie within ``min_spread``: they hold no order to learn."""

    @property
    def dropped_share(self) -> float:
        """Share of the groups that cannot be trained on."""
        return 1 - self.eligible / self.total


@dataclass(frozen=True, slots=True)
class GroupBatch:
    """B groups of K images, ready for a training step (tensors on the CPU)."""

    latents: Tensor
    """[B, K, ...] in the stored dtype."""
    rewards: Tensor
    """[B, K] float32."""
    mask: Tensor
    """[B, K] bool, True where there is a reward (everywhere, as only scored images are drawn)."""
    prompts: tuple[PromptRecord, ...]
    image_indices: Tensor
    """[B, K] int64 numbers of the images in their groups."""
    conditioning: tuple[dict[str, Tensor], ...]
    """Text-encoder outputs of each group's prompt, without a batch dimension."""
    visits: tuple[int, ...]
    """How often each group has been drawn before: its epoch."""

    def share(self, rank: int, world: int) -> Self:
        """The groups of process ``rank`` of ``world``: every world-th from its rank on."""
        own = slice(rank, None, world)
        return type(self)(
            latents=self.latents[own],
            rewards=self.rewards[own],
            mask=self.mask[own],
            prompts=self.prompts[own],
            image_indices=self.image_indices[own],
            conditioning=self.conditioning[own],
            visits=self.visits[own],
        )


@dataclass(frozen=True, slots=True)
class GroupDataset:
    """Every eligible group of a store, in memory."""

    k: int
    """K, images per draw."""
    min_spread: float
    """A group or draw has spread when its highest reward exceeds its lowest by more than this."""
    latents: Tensor
    """[P, I, ...] in the stored dtype."""
    rewards: Tensor
    """[P, I] float32, nan where the score is missing."""
    conditioning: tuple[dict[str, Tensor], ...]
    prompts: tuple[PromptRecord, ...]
    prompt_indices: tuple[int, ...]
    """Number of each eligible group's prompt in ``store.prompts``."""
    counts: GroupCounts

    @classmethod
    def load(
        cls, store: GroupStore, table: ScoreTable, *, k: int, min_spread: float = 0.0, detail: Detail = None
    ) -> Self:
        """Read the groups that have at least ``k`` scored images and reward spread above ``min_spread``.

        ``detail`` says which number of a score's row is the reward.

        Raises StoreError when scores or shards are missing or damaged, the table belongs to another store,
        the latents differ in shape, or no group is left; ValueError when ``k`` is not between 2 and the
        images per prompt.
        """
        if not 2 <= k <= store.images_per_prompt:
            raise ValueError(f"k must be between 2 and the {store.images_per_prompt} images per prompt, not {k}")
        if table.store.digest != store.digest:
            raise StoreError(
                f"the score table {table.path} belongs to another store than {store.path}: run `{table.command}`"
            )
        values = [math.nan if (value := row.measured(detail)) is None else value for row in table.rows()]
        rewards = torch.tensor(values, dtype=torch.float32).reshape(len(store.prompts), store.images_per_prompt)
        enough = rewards.isfinite().sum(dim=1) >= k
        spread = _spread(rewards) > min_spread
        eligible = enough & spread
        counts = GroupCounts(
            total=len(rewards),
            eligible=int(eligible.sum()),
            too_few_scores=int((~enough).sum()),
            no_spread=int((enough & ~spread).sum()),
        )
        if not counts.eligible:
            raise StoreError(
                f"no group of the store {store.path} can be trained on: of {counts.total} groups, "
                f"{counts.too_few_scores} have fewer than {k} scored images and {counts.no_spread} have no reward "
                f"spread above {min_spread:g}; sample more prompts, lower k or min_spread, or choose another reward"
            )
        latents, conditioning = _read_tensors(store, eligible.tolist())
        indices = tuple(int(index) for index in eligible.nonzero().flatten())
        prompts = tuple(store.prompts[index] for index in indices)
        return cls(k, min_spread, latents, rewards[eligible], conditioning, prompts, indices, counts)

    def __len__(self) -> int:
        return len(self.prompts)

    @property
    def digest(self) -> str:
        """Of all that decides which groups and images are drawn together."""
        return digest([self.k, self.min_spread, list(self.prompt_indices), sha256(self.rewards.numpy().tobytes())])

    def draw(self, step: int, *, groups: int, seed: int) -> GroupBatch:
        """The ``groups`` groups of step ``step`` (from 0): a function of the arguments alone.

        Steps walk through one endless sequence of epochs; each epoch is a fresh permutation of the groups.
        For each visit K scored images are drawn at random, again up to ``MAX_REDRAWS`` times until their
        rewards have spread, after that with the group's best and worst image among them.
        """
        if step < 0 or groups < 1:
            raise ValueError(f"a draw needs a step from 0 and at least one group, not step {step} and {groups} groups")
        visits = [divmod(step * groups + index, len(self)) for index in range(groups)]
        chosen = [_permutation(len(self), seed, epoch)[place] for epoch, place in visits]
        images = torch.stack(
            [self._draw_images(group, epoch, seed) for group, (epoch, _) in zip(chosen, visits, strict=True)]
        )
        rows = torch.tensor(chosen)[:, None]
        rewards = self.rewards[rows, images]
        return GroupBatch(
            latents=self.latents[rows, images],
            rewards=rewards,
            mask=rewards.isfinite(),
            prompts=tuple(self.prompts[group] for group in chosen),
            image_indices=images,
            conditioning=tuple(self.conditioning[group] for group in chosen),
            visits=tuple(epoch for epoch, _ in visits),
        )

    def with_shuffled_rewards(self, seed: int) -> Self:
        """The control experiment: the same groups, with the rewards permuted among each group's scored images."""
        rewards = self.rewards.clone()
        for row, prompt in zip(rewards, self.prompts, strict=True):
            scored = row.isfinite().nonzero().flatten()
            order = torch.randperm(len(scored), generator=generator(seed, "shuffled rewards", prompt.id))
            row[scored] = row[scored[order]]
        return replace(self, rewards=rewards)

    def _draw_images(self, group: int, epoch: int, seed: int) -> Tensor:
        rewards = self.rewards[group]
        scored = rewards.isfinite().nonzero().flatten()
        stream = generator(seed, "images of a group", self.prompts[group].id, epoch)
        for _ in range(MAX_REDRAWS):
            drawn = scored[torch.randperm(len(scored), generator=stream)[: self.k]]
            if _spread(rewards[drawn]) > self.min_spread:
                return drawn
        ends = torch.stack([scored[rewards[scored].argmax()], scored[rewards[scored].argmin()]])
        return torch.cat([ends, drawn[~torch.isin(drawn, ends)]])[: self.k]


def _spread(rewards: Tensor) -> Tensor:
    """Highest minus lowest finite reward over the last dimension; ``-inf`` where there is none."""
    missing = ~rewards.isfinite()
    return rewards.masked_fill(missing, -math.inf).amax(-1) - rewards.masked_fill(missing, math.inf).amin(-1)


@lru_cache(maxsize=4)
def _permutation(count: int, seed: int, epoch: int) -> list[int]:
    order: list[int] = torch.randperm(count, generator=generator(seed, "order of groups", epoch)).tolist()
    return order


def _read_tensors(store: GroupStore, eligible: Sequence[bool]) -> tuple[Tensor, tuple[dict[str, Tensor], ...]]:
    latents: Tensor | None = None
    conditioning: list[dict[str, Tensor]] = []
    first = 0
    for number, prompts in enumerate(store.shards):
        wanted = eligible[first : first + len(prompts)]
        first += len(prompts)
        if not any(wanted):
            continue
        for group, keep in zip(store.read_shard(number), wanted, strict=True):
            if not keep:
                continue
            if latents is None:
                latents = group.latents.new_empty((sum(eligible), *group.latents.shape))
            if group.latents.shape != latents.shape[1:] or group.latents.dtype != latents.dtype:
                raise StoreError(
                    f"shard {number:05d} of the store {store.path} has latents {list(group.latents.shape)} of "
                    f"{group.latents.dtype}, the shards before {list(latents.shape[1:])} of {latents.dtype}: "
                    f"delete the store and make it again with `{store.command}`"
                )
            latents[len(conditioning)] = group.latents
            conditioning.append(group.conditioning)
    if latents is None:
        raise ValueError("no group is eligible")
    return latents, tuple(conditioning)
