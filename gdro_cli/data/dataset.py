"""The training set: the eligible groups of a store, in memory, drawn as whole groups.

Only latents, conditioning and rewards are read; no image is opened and no encoder is needed. Shapes: P eligible groups
in memory, of at most I images; a draw has B groups of K images.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from functools import cached_property, lru_cache
from itertools import compress, islice
from typing import Literal, Self

import torch
from torch import Tensor
from torch.nn import functional
from torch.nn.utils.rnn import pad_sequence

from gdro_cli.core.measures import Detail
from gdro_cli.core.seeds import generator
from gdro_cli.data.records import PromptRecord
from gdro_cli.data.scores import ScoreTable
from gdro_cli.data.store import GroupStore
from gdro_cli.errors import StoreError
from gdro_cli.files import sha256
from gdro_cli.identity import digest

EMPTY = -1
"""Index of an image that a smaller group does not have."""

KPolicy = Literal["drop", "whole"]

MAX_REDRAWS = 16
"""Attempts to draw K images with spread. If one image of 16 differs and K = 6, all fail in 1 of 1,800 visits."""


@dataclass(frozen=True, slots=True)
class GroupCounts:
    """How many groups the store has, and why some cannot be trained on."""

    total: int
    eligible: int
    too_few_scores: int
    """Groups with too few scored images."""
    no_spread: int
    """Groups with enough scores but no spread above ``min_spread``, and so no order to learn."""
    whole: int
    """Eligible groups with fewer than k scored images, which are drawn whole."""

    @property
    def dropped_share(self) -> float:
        """Share of the groups that cannot be trained on."""
        return 1 - self.eligible / self.total


@dataclass(frozen=True, slots=True)
class GroupBatch:
    """B groups of K images, ready for a training step (tensors on the CPU).

    A group with fewer images leaves its last places empty: latents 0, reward nan, mask False, index ``EMPTY``.
    """

    latents: Tensor
    """[B, K, ...] in the stored dtype."""
    rewards: Tensor
    """[B, K] float32."""
    mask: Tensor
    """[B, K] bool, True for images with a reward: all but empty places, because only scored images are drawn."""
    weights: Tensor
    """[B] float32 weights of the groups; their mean over the eligible groups is 1."""
    prompts: tuple[PromptRecord, ...]
    image_indices: Tensor
    """[B, K] int64 indices of the images in their groups."""
    conditioning: tuple[dict[str, Tensor], ...]
    """Text-encoder outputs of each group's prompt, without a batch dimension."""
    visits: tuple[int, ...]
    """How often each group has been drawn before: its epoch."""

    def share(self, rank: int, world: int) -> Self:
        """The groups of process ``rank`` of ``world``: every world-th, starting at its rank."""
        return type(self)(**{field.name: getattr(self, field.name)[rank::world] for field in fields(self)})


@dataclass(frozen=True)
class GroupDataset:
    """Every eligible group of a store, in memory."""

    k: int
    """K, images per draw."""
    min_spread: float | None
    """A group or draw has spread if its highest reward exceeds its lowest by more than this. None: it needs none."""
    latents: tuple[Tensor, ...]
    """P tensors [images of the group, ...] in the stored dtype."""
    rewards: Tensor
    """[P, I] float32, nan for missing scores and beyond a group's images."""
    weights: Tensor
    """[P] float32, mean 1."""
    conditioning: tuple[dict[str, Tensor], ...]
    prompts: tuple[PromptRecord, ...]
    prompt_indices: tuple[int, ...]
    """Index of each eligible group's prompt in ``store.prompts``."""
    counts: GroupCounts

    @classmethod
    def load(
        cls,
        store: GroupStore,
        table: ScoreTable,
        *,
        k: int,
        k_policy: KPolicy = "drop",
        min_spread: float | None = 0.0,
        detail: Detail = None,
    ) -> Self:
        """Read the groups that have at least ``k`` scored images and a spread of rewards above ``min_spread``.

        Args:
            store: the store.
            table: its scores.
            k: images per draw; at most those of the largest group.
            k_policy: whether a group with fewer scored images is left out, or drawn whole if it can teach anything.
            min_spread: spread that a group must exceed; None if the method learns from equal rewards.
            detail: which number of a score is the reward.

        Raises:
            StoreError: scores or shards are missing or damaged, or no group is eligible.
        """
        values = (math.nan if (value := row.measured(detail)) is None else value for row in table.rows())
        sizes = [store.sizes[prompt.id] for prompt in store.prompts]
        groups = [torch.tensor(list(islice(values, size)), dtype=torch.float32) for size in sizes]
        rewards = pad_sequence(groups, batch_first=True, padding_value=math.nan)
        if k_policy == "whole":
            k = min(k, max(sizes))
        fewest = k if k_policy == "drop" else 1 if min_spread is None else 2
        scored = rewards.isfinite().sum(dim=1)
        enough = scored >= fewest
        spread = torch.ones_like(enough) if min_spread is None else _spread(rewards) > min_spread
        eligible = enough & spread
        counts = GroupCounts(
            total=len(rewards),
            eligible=int(eligible.sum()),
            too_few_scores=int((~enough).sum()),
            no_spread=int((enough & ~spread).sum()),
            whole=int((eligible & (scored < k)).sum()),
        )
        if not counts.eligible:
            raise StoreError(
                f"no group of the store {store.path} can be trained on (of {counts.total} groups, "
                f"{counts.too_few_scores} have fewer than {fewest} scored images and {counts.no_spread} have no reward "
                f"spread above {min_spread or 0:g}): add prompts, lower k or min_spread, or choose another reward"
            )
        latents, conditioning = _read_tensors(store, eligible.tolist())
        indices = tuple(int(index) for index in eligible.nonzero().flatten())
        prompts = tuple(store.prompts[index] for index in indices)
        weights = torch.tensor([store.weights.get(prompt.id, 1.0) for prompt in prompts])
        return cls(
            k, min_spread, latents, rewards[eligible], weights / weights.mean(), conditioning, prompts, indices, counts
        )

    def __len__(self) -> int:
        return len(self.prompts)

    @property
    def digest(self) -> str:
        """Short digest of everything that determines which groups and images are drawn together."""
        return digest([self.k, self.min_spread, list(self.prompt_indices), sha256(self.rewards.numpy().tobytes())])

    def draw(self, step: int, *, groups: int, seed: int) -> GroupBatch:
        """The ``groups`` groups of ``step`` (from 0), which depend only on the arguments.

        Steps take groups from one endless sequence of epochs; each epoch is a fresh permutation of the groups. If no
        order is needed, an epoch visits a group as often as it has K images, other images each time. Otherwise each
        visit draws K random scored images, up to ``MAX_REDRAWS`` times until their rewards have spread. If none of
        these draws has spread, the group's best and worst image are among the K. A group with fewer scored images is
        drawn whole.
        """
        places = self._places
        visits = [divmod(step * groups + index, len(places)) for index in range(groups)]
        drawn = [places[_permutation(len(places), seed, epoch)[position]] for epoch, position in visits]
        chosen = [group for group, _ in drawn]
        images = torch.stack(
            [self._draw_images(*place, epoch, seed) for place, (epoch, _) in zip(drawn, visits, strict=True)]
        )
        rows, present = torch.tensor(chosen), images != EMPTY
        rewards = self.rewards[rows[:, None], images].masked_fill(~present, math.nan)
        latents = torch.stack([self.latents[group][row] for group, row in zip(chosen, images, strict=True)])
        latents[~present] = 0
        return GroupBatch(
            latents=latents,
            rewards=rewards,
            mask=present,
            weights=self.weights[rows],
            prompts=tuple(self.prompts[group] for group in chosen),
            image_indices=images,
            conditioning=tuple(self.conditioning[group] for group in chosen),
            visits=tuple(epoch for epoch, _ in visits),
        )

    def with_shuffled_rewards(self, seed: int) -> Self:
        """The same groups, with the rewards permuted among each group's scored images: a control experiment."""
        rewards = self.rewards.clone()
        for row, prompt in zip(rewards, self.prompts, strict=True):
            scored = row.isfinite().nonzero().flatten()
            order = torch.randperm(len(scored), generator=generator(seed, "shuffled rewards", prompt.id))
            row[scored] = row[scored[order]]
        return replace(self, rewards=rewards)

    @cached_property
    def _places(self) -> list[tuple[int, int]]:
        """The visits of an epoch: a group, and how many of its visits in the epoch come before."""
        if self.min_spread is not None:
            return [(group, 0) for group in range(len(self))]
        counts = (self.rewards.isfinite().sum(dim=1) // self.k).clamp_min(1).tolist()
        return [(group, part) for group, count in enumerate(counts) for part in range(count)]

    def _draw_images(self, group: int, part: int, epoch: int, seed: int) -> Tensor:
        rewards = self.rewards[group]
        scored = rewards.isfinite().nonzero().flatten()
        stream = generator(seed, "images of a group", self.prompts[group].id, epoch)
        for _ in range(MAX_REDRAWS):
            drawn = scored[torch.randperm(len(scored), generator=stream)[self.k * part : self.k * (part + 1)]]
            if self.min_spread is None or _spread(rewards[drawn]) > self.min_spread:
                return functional.pad(drawn, (0, self.k - len(drawn)), value=EMPTY)
        ends = torch.stack([scored[rewards[scored].argmax()], scored[rewards[scored].argmin()]])
        return torch.cat([ends, drawn[~torch.isin(drawn, ends)]])[: self.k]


def _spread(rewards: Tensor) -> Tensor:
    """Highest minus lowest finite reward over the last dimension; ``-inf`` if there is none."""
    missing = ~rewards.isfinite()
    return rewards.masked_fill(missing, -math.inf).amax(-1) - rewards.masked_fill(missing, math.inf).amin(-1)


@lru_cache(maxsize=4)
def _permutation(count: int, seed: int, epoch: int) -> list[int]:
    order: list[int] = torch.randperm(count, generator=generator(seed, "order of groups", epoch)).tolist()
    return order


def _read_tensors(
    store: GroupStore, eligible: Sequence[bool]
) -> tuple[tuple[Tensor, ...], tuple[dict[str, Tensor], ...]]:
    latents: list[Tensor] = []
    conditioning: list[dict[str, Tensor]] = []
    remaining = iter(eligible)
    for number, prompts in enumerate(store.shards):
        selected = list(islice(remaining, len(prompts)))
        for group in compress(store.read_shard(number), selected) if any(selected) else ():
            latents.append(group.latents)
            conditioning.append(group.conditioning)
    return tuple(latents), tuple(conditioning)
