"""Gradients from stored groups: GDRO and its relatives align the adapter's implicit rewards with the explicit ones.

What differs from the GDRO paper (arXiv 2601.02036): the reference is the same transformer with its adapter off, never a
second copy; the group gradient may be computed in two passes, which is exact and needs the memory of one micro-batch;
sigma and noise are drawn from named streams, so a resumed run continues bit-exactly on the CPU; K images of a group are
drawn again until their rewards differ (``GroupDataset.draw``); sigma and noise are shared within a group. Everything
else follows the recipe, and the recipe's header says where its numbers come from.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from gdro_cli.config.recipe import Recipe
from gdro_cli.data.dataset import GroupBatch, GroupDataset
from gdro_cli.data.references import ErrorKey, ReferenceErrors
from gdro_cli.data.scores import ScoreTable
from gdro_cli.models.adapters import Ema, reference
from gdro_cli.models.base import FlowModel
from gdro_cli.runtime.distributed import Engine
from gdro_cli.runtime.interrupt import StopFlag
from gdro_cli.runtime.progress import Reporter
from gdro_cli.runtime.run import RunFolder
from gdro_cli.stages.runs.store_times import batch_of, note_batch
from gdro_cli.stages.setup.rewards import trained_detail
from gdro_cli.stages.setup.workspace import image_size, precision
from gdro_cli.stages.training.batch_sizes import check_shares, takes_one_pass
from gdro_cli.stages.training.group_gradient import (
    GroupGradient,
    NoisyGroups,
    draw_noise,
    loss_arguments,
    noise_draw,
    noisy_groups,
)
from gdro_cli.stages.training.prefetch import Ahead
from gdro_cli.stages.training.trainer import StepGradient


def training_set(recipe: Recipe, table: ScoreTable) -> GroupDataset:
    """Load the training groups of a complete store and its scores into memory."""
    method, detail = recipe.group_method, trained_detail(recipe)
    dataset = GroupDataset.load(table.store, table, k=method.k, min_spread=method.min_spread, detail=detail)
    if recipe.train.shuffle_rewards:
        dataset = dataset.with_shuffled_rewards(recipe.train_seed)
    return dataset


class GroupSteps:
    """Each step draws groups from the store; a ``StepSource``."""

    shown: Mapping[str, str] = {"loss": "loss", "implicit_accuracy": "accuracy", "top1_error_gap": "top1_gap"}
    remedy = "lower train.lr or method.beta"

    def __init__(self, recipe: Recipe, model: FlowModel, table: ScoreTable, engine: Engine, reporter: Reporter) -> None:
        section, method = recipe.train, recipe.group_method
        check_shares(recipe, engine.world)
        model.release_encoders()
        model.release_decoder()
        self.recipe, self.model, self.table, self.engine = recipe, model, table, engine
        self.dataset = training_set(recipe, table)
        if self.dataset.counts.dropped_share:
            reporter.say(_told(self.dataset))
        self.method = method
        self._gradient = GroupGradient(
            model=model,
            loss=loss_arguments(method),
            reduction=method.reduction,
            guidance=recipe.sample.guidance,
            size=image_size(recipe, model),
            micro_batch=section.micro_batch,
            one_pass=takes_one_pass(recipe, engine.world),
            reference=lambda: reference(model),
            autocast=engine.autocast,
            backward=lambda loss: engine.backward(loss / engine.world),  # gradients are summed over processes
        )

        self._ahead = Ahead(self._draw, steps=section.steps if section.prefetch else 0)
        shared = section.cache_reference and recipe.model.sharding == "none"  # a shard's passes are all processes' work
        self._known = ReferenceErrors(table.store, self._reference_settings()) if shared else None

    def open(self, stack: ExitStack, folder: RunFolder, ema: Ema) -> None:
        """Only notes what the store has cost."""
        stack.callback(self.close)
        with self.engine.together():
            if self.engine.is_main:
                note_batch(folder, batch_of(self.table, step=0), step=0)

    def needs_weights_of(self, steps: int) -> bool:
        """The store was made before the training."""
        return False

    def prepare(self, step: int, stop: StopFlag) -> bool:
        """Nothing is to be made: the store is complete."""
        return True

    def can_go_on_after(self, steps: int) -> bool:
        """Every step is a function of its number."""
        return True

    def gradient(self, step: int) -> StepGradient:
        """The gradient of this process's share of the step's groups."""
        batch, drawn = self._ahead.take(step)
        groups = noisy_groups(self.model, batch, self.method, seed=self.recipe.train_seed, drawn=drawn)
        output = self._gradient(groups, self._reference_errors(batch, groups))
        metrics = averages(self.engine, {"loss": output.loss, **output.metrics})
        return StepGradient({**metrics, "dropped_groups_share": self.dataset.counts.dropped_share})

    def close(self) -> None:
        """End the thread that draws ahead."""
        self._ahead.close()

    def _draw(self, step: int) -> tuple[GroupBatch, tuple[Tensor, Tensor]]:
        """This process's share of the step's groups, with its noise, where copying it to the device is fast."""
        seed = self.recipe.train_seed
        batch = self.dataset.draw(step, groups=self.recipe.train.groups_per_step, seed=seed)
        batch = batch.share(self.engine.rank, self.engine.world)
        sigma, noise = draw_noise(batch, self.method, seed=seed)
        if self.engine.device.type == "cuda":
            return replace(batch, latents=batch.latents.pin_memory()), (sigma.pin_memory(), noise.pin_memory())
        return batch, (sigma, noise)

    def _reference_errors(self, batch: GroupBatch, groups: NoisyGroups) -> Tensor:
        if self._known is None:
            return self._gradient.reference_errors(groups)
        places = self._places(batch)
        known = self._known.lookup(places).view(groups.rewards.shape)
        errors = self._gradient.reference_errors(groups, known)
        if known.isnan().any():
            self._known.add(places, errors.flatten())
        return errors

    def _places(self, batch: GroupBatch) -> list[ErrorKey]:
        """What the reference error of each of the N images is known by."""
        return [
            (prompt.id, noise_draw(self.method, visit), image)
            for prompt, visit, images in zip(batch.prompts, batch.visits, batch.image_indices.tolist(), strict=True)
            for image in images
        ]

    def _reference_settings(self) -> dict[str, Any]:
        """What reference errors depend on beside the store.

        Also which images are computed together, so that known errors are the same bit for bit; but with a bank of noise
        an image meets its draws in changing company, and they are the same up to rounding.
        """
        recipe, method = self.recipe, self.method
        keys = ("reduction", "share_noise", "share_sigma", "sigma_min", "sigma_max", "noise_bank")
        return {
            "seed": recipe.train_seed,
            "guidance": recipe.sample.guidance,
            "method": {key: getattr(method, key) for key in keys},
            "draws": self.dataset.digest,
            "batches": [recipe.train.groups_per_step, recipe.train.micro_batch, self.engine.world],
            "device": self.engine.device.type,
            "precision": precision(recipe),
            "compute": [recipe.model.compile, recipe.model.attention],
        }


def _told(dataset: GroupDataset) -> str:
    """Which groups are not trained on."""
    counts = dataset.counts
    reasons = {
        f"with no spread of rewards above {dataset.min_spread:g}": counts.no_spread,
        f"with fewer than {dataset.k} scored images": counts.too_few_scores,
    }
    left_out = ", ".join(f"{count} {why}" for why, count in reasons.items() if count)
    return f"{counts.eligible} of {counts.total} groups can be trained on; left out: {left_out}"


def averages(engine: Engine, metrics: dict[str, Tensor]) -> dict[str, float]:
    """Means over the processes, in one message.

    Exact for everything that is a mean over groups; a share of pairs (``implicit_accuracy``) becomes the mean of the
    processes' shares.
    """
    values = torch.stack([value.detach().float() for value in metrics.values()])
    means = (engine.sum(values) / engine.world if engine.world > 1 else values).tolist()
    return dict(zip(metrics, means, strict=True))
