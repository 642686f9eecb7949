"""What a job needs of a GPU, from shapes alone: memory of sampling and training, operations, GPU hours.

Weights are counted on the real classes at full size, activations and operations on their real forward and backward
passes, all without numbers (``models.trace``); ``core.footprint`` has the arithmetic. docs/hardware.md says what is
counted and what is not.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from dataclasses import dataclass
from functools import cache, cached_property
from typing import Literal

import torch

from gdro_cli.config.recipe import Recipe
from gdro_cli.core.footprint import (
    AdapterBytes,
    Storage,
    Weights,
    adapter_bytes,
    group_step_flops,
    weight_bytes,
)
from gdro_cli.core.losses import DEVIATION_LOSSES
from gdro_cli.models.adapters import attach_lora
from gdro_cli.models.base import FlowModel, takes_two_passes
from gdro_cli.models.diffusers_flow import DtypeName
from gdro_cli.models.initial_adapter import InitialAdapter
from gdro_cli.models.latents import decoded_at_once
from gdro_cli.models.meta_model import MetaModel, ShallowModel, meta_model, open_folder, trace_decoding
from gdro_cli.models.trace import Update, Work, mixed_update, trace_forward, trace_update, whole_update, whole_work
from gdro_cli.stages.setup.model import EMBEDDED, initial_adapter, model_folder
from gdro_cli.stages.training.batch_sizes import images_at_once, micro_batches, takes_one_pass
from gdro_cli.stages.training.rollout import policy_guidance

Targets = tuple[str, ...] | Literal["auto", "all-linear"]

_MASKED_TOKENS = 60
"""Text tokens of a prompt, for models that store each prompt at its own length."""


@dataclass(frozen=True, slots=True)
class Shape:
    """What the traces depend on. Recipes of the same shape share them, since a trace takes seconds."""

    model: tuple[str, DtypeName, int | None, Storage]
    """Path, dtype, longest prompt in tokens, and how the linear layers are stored."""
    size: tuple[int, int]
    """Height and width in pixels."""
    guidance: float

    def text(self) -> dict[str, tuple[int, ...]]:
        """Shapes of one prompt's conditioning."""
        flow = without_adapter(*self.model).flow
        tokens = flow.max_sequence_length if flow.pads_text else _MASKED_TOKENS
        return flow.sized_shapes(tokens, height=self.size[0], width=self.size[1])


@cache
def without_adapter(path: str, dtype: DtypeName, tokens: int | None, storage: Storage) -> MetaModel:
    """The model on the meta device."""
    return meta_model(open_folder(path), dtype=dtype, max_sequence_length=tokens, storage=storage)


@cache
def with_adapter(
    path: str, dtype: DtypeName, tokens: int | None, storage: Storage, rank: int, targets: Targets
) -> tuple[tuple[ShallowModel, list[torch.nn.Parameter]], ...]:
    """Other shallow models of it, with the parameters of their adapters, whose scale does not matter here."""
    model = meta_model(open_folder(path), dtype=dtype, max_sequence_length=tokens, storage=storage)
    return tuple((part, attach_lora(part.flow, rank=rank, alpha=rank, targets=targets)) for part in model.parts)


def autocast(flow: FlowModel) -> torch.dtype | None:
    """The dtype of autocast, as ``FlowModel.autocasts`` has it on a GPU."""
    return torch.bfloat16 if flow.autocast and flow.dtype == torch.bfloat16 else None


@cache
def forward_work(shape: Shape, images: int) -> Work:
    """A sampling pass."""
    text, parts = shape.text(), without_adapter(*shape.model).parts
    return whole_work(
        (
            part.times,
            trace_forward(
                part.flow, images, text, guidance=shape.guidance, size=shape.size, autocast=autocast(part.flow)
            ),
        )
        for part in parts
    )


@cache
def decoding_work(shape: Shape, images: int) -> Work | None:
    """A pass through the autoencoder's decoder."""
    return trace_decoding(without_adapter(*shape.model), images, height=shape.size[0], width=shape.size[1])


@cache
def update_work(shape: Shape, rank: int, targets: Targets, images: int, checkpointing: bool) -> Update:
    """A forward and backward pass of one micro-batch."""

    def traced(flow: FlowModel, parameters: list[torch.nn.Parameter]) -> Update:
        return trace_update(
            flow,
            parameters,
            images,
            shape.text(),
            guidance=shape.guidance,
            size=shape.size,
            checkpointing=checkpointing,
            autocast=autocast(flow),
        )

    parts = with_adapter(*shape.model, rank, targets)
    return whole_update((part.times, traced(part.flow, parameters)) for part, parameters in parts)


class Estimate:
    """The needs of a recipe: memory of one GPU, operations of the whole job. Each is counted at its first use.

    Args:
        recipe: of the job.
        world: number of processes that share it, each with a GPU.
    """

    def __init__(self, recipe: Recipe, *, world: int = 1) -> None:
        self.recipe, self.world = recipe, world
        section = recipe.model
        dtype: DtypeName = section.dtype
        if dtype == "auto" and (torch.cuda.is_available() or section.path != EMBEDDED):
            dtype = "bfloat16"
        model = model_folder(recipe), dtype, section.max_sequence_length, section.quantization
        self.model = without_adapter(*model)
        height, width = recipe.sample.height, recipe.sample.width
        size = self.model.flow.default_size if height is None or width is None else (height, width)
        self.shape = Shape(model, size, recipe.sample.guidance)
        self.width = self.model.flow.dtype.itemsize
        """Bytes of a number that is not quantised."""

    # -- weights ------------------------------------------------------------------------------------------------

    @cached_property
    def initial(self) -> InitialAdapter | None:
        """The adapter that the training starts from. Raises as ``initial_adapter``."""
        return initial_adapter(self.recipe, open_folder(self.shape.model[0]))

    @property
    def transformer_bytes(self) -> int:
        """The frozen transformer, as it is stored, and the initial adapter, whose operations are not counted."""
        initial = 0 if self.initial is None else weight_bytes(Weights(self.initial.values), width=4)
        return initial + weight_bytes(self.model.transformer, width=self.width, storage=self.recipe.model.quantization)

    @property
    def text_bytes(self) -> int:
        """The text encoders; 0 if they are not known."""
        return weight_bytes(self.model.text or Weights(0), width=self.width)

    @property
    def vae_bytes(self) -> int:
        """The autoencoder; 0 if it is not known."""
        return weight_bytes(self.model.vae or Weights(0), width=self.width)

    @cached_property
    def adapter_values(self) -> int:
        """Numbers of the adapter."""
        lora = self.recipe.train.lora
        parts = with_adapter(*self.shape.model, lora.rank, lora.targets)
        return sum(part.times * sum(value.numel() for value in parameters) for part, parameters in parts)

    @property
    def adapter(self) -> AdapterBytes:
        """The adapter with its gradients, average and optimizer."""
        return adapter_bytes(self.adapter_values, eight_bit=self.recipe.train.optimizer == "adamw8bit")

    @cached_property
    def text_per_prompt(self) -> int:
        """Bytes of one prompt's encoding."""
        return sum(math.prod(shape) for shape in self.shape.text().values()) * self.width

    # -- memory -------------------------------------------------------------------------------------------------

    @cached_property
    def at_work(self) -> int:
        """Bytes that sampling needs beside weights: a pass of the transformer, or of the decoder."""
        forward = forward_work(self.shape, self.recipe.sample.batch_size)
        images = 1 if self.recipe.model.vae_slicing else decoded_at_once(*self.shape.size)
        decoding = decoding_work(self.shape, min(images, self.recipe.sample.batch_size))
        return max(forward.peak, 0 if decoding is None else decoding.peak)

    @property
    def sampling_bytes(self) -> int:
        """Memory of sampling: all parts, or with ``model.offload`` the largest of them, and what is at work."""
        parts = self.text_bytes, self.transformer_bytes, self.vae_bytes
        return (max(parts) if self.recipe.model.offload else sum(parts)) + self.at_work

    @property
    def images_at_once(self) -> int:
        """Images whose activations one process keeps at once in training."""
        return images_at_once(self.recipe, self.world)

    @property
    def two_pass(self) -> bool:
        """Whether training first computes the images' weights (stored groups only)."""
        return not takes_one_pass(self.recipe)

    def update(self, *, checkpointing: float | None = None, images: int | None = None) -> Update:
        """A micro-batch's forward and backward pass.

        ``checkpointing`` replaces the recipe's share of the blocks, ``images`` its micro-batch.
        """
        train = self.recipe.train
        share = float(train.gradient_checkpointing if checkpointing is None else checkpointing)
        job = self.shape, train.lora.rank, train.lora.targets, images or self.images_at_once
        if share in (0, 1):
            return update_work(*job, share == 1)
        return mixed_update(update_work(*job, False), update_work(*job, True), share)

    def activation_bytes(self, *, checkpointing: float | None = None, images: int | None = None) -> int:
        """What a micro-batch needs beside weights; twice that if online training takes two passes."""
        update = self.update(checkpointing=checkpointing, images=images)
        return update.peak * (self.passes if self.recipe.online_method else 1)

    @property
    def batch_bytes(self) -> int:
        """What a process keeps on its device of a step's groups, or of a round's rollouts, beside a micro-batch."""
        recipe, online = self.recipe, self.recipe.online_method
        latent = 4 * math.prod(self.model.flow.latent_shape(height=self.shape.size[0], width=self.shape.size[1]))
        if online is not None:
            images = math.ceil(online.prompts_per_round * online.group_size / self.world)
            return images * (self.text_per_prompt + (online.train_sample_steps + 1) * latent)
        method = recipe.group_method
        noises = 1 if method.share_noise else method.k
        copies = method.k + noises + (method.k if method.name in DEVIATION_LOSSES else 0)
        return recipe.train.groups_per_step // self.world * (self.text_per_prompt + copies * latent)

    @property
    def training_bytes(self) -> int:
        """Memory of training: transformer, adapter and all that belongs to it, a batch, and a micro-batch at work.

        With evaluation points or rollouts the autoencoder stays, and at the start the text encoders are beside the
        transformer, unless ``model.offload`` moves them away.
        """
        beside, start = self._beside_activations
        return max(beside + self.activation_bytes(), start)

    @property
    def _beside_activations(self) -> tuple[int, int]:
        """Bytes of training without a micro-batch at work, and those at the start."""
        recipe, weights = self.recipe, self.transformer_bytes + self.adapter.total
        work = weights + self.batch_bytes
        if recipe.model.offload or not (recipe.train.eval_every or recipe.online_method):
            return work, 0
        return work + self.vae_bytes, weights + self.text_bytes

    def largest_micro_batch(self, room: float) -> int | None:
        """The most images at once with which the steps of a training take at most ``room`` bytes; None if none fit.

        A peak is the highest of counts that are affine in the images, so it lies on or below the line between those of
        the fewest and of the most images: two traces are enough for any card, and the choice is never too large.
        """
        sizes = micro_batches(self.recipe, self.world)
        low, high = (self.activation_bytes(images=size) for size in (sizes[0], sizes[-1]))
        slope = (high - low) / max(1, sizes[-1] - sizes[0])
        beside, _ = self._beside_activations
        count = bisect_right(sizes, room, key=lambda size: beside + low + slope * (size - sizes[0]))
        return sizes[count - 1] if count else None

    # -- operations ---------------------------------------------------------------------------------------------

    @property
    def passes(self) -> int:
        """Forward passes per sampling step: 2 with classifier-free guidance."""
        online = self.recipe.online_method
        scale = self.recipe.sample.guidance if online is None else policy_guidance(self.recipe, online)
        return 2 if takes_two_passes(self.model.flow, scale) else 1

    @cached_property
    def reference_flops(self) -> float:
        """Operations of one image's forward pass without the adapter."""
        images = self.recipe.sample.batch_size
        return forward_work(self.shape, images).flops / images

    def drawing_flops(self, images: int, *, steps: int, passes: int) -> float:
        """Operations to sample and decode images with the base model."""
        drawn = images * steps * passes * self.reference_flops
        decoding = decoding_work(self.shape, 1)
        return drawn + (0 if decoding is None else images * decoding.flops)

    def store_flops(self, prompts: int) -> float:
        """Operations to sample the groups of this number of prompts, in all rounds."""
        sample = self.recipe.sample
        images = prompts * sample.images_per_prompt
        return self.recipe.train.rounds * self.drawing_flops(images, steps=sample.steps, passes=self.passes)

    @property
    def step_flops(self) -> float:
        """Operations of an optimizer step on stored groups."""
        train, update, at_once = self.recipe.train, self.update(), self.images_at_once
        return group_step_flops(
            images=train.groups_per_step * self.recipe.group_method.k,
            reference=self.reference_flops,
            policy=update.forward / at_once,
            update=update.flops / at_once,
            two_pass=self.two_pass,
        )

    @property
    def online_flops(self) -> tuple[float, float]:
        """Operations of an online training: of its rollouts and of its updates."""
        method = self.recipe.online_method
        if method is None:
            raise TypeError(f"{self.recipe.method.name} is not an online method")
        rounds = math.ceil(self.recipe.train.steps / method.steps_per_round)
        images = rounds * method.prompts_per_round * method.group_size
        drawing = self.drawing_flops(images, steps=method.train_sample_steps, passes=self.passes)
        return drawing, images * method.inner_epochs * self.image_flops

    @property
    def image_flops(self) -> float:
        """Operations with which an optimizer step learns from one image."""
        method = self.recipe.online_method
        if method is None:
            return self.step_flops / (self.recipe.train.groups_per_step * self.recipe.group_method.k)
        step = self.update().flops / self.images_at_once + (self.reference_flops if method.beta_kl > 0 else 0.0)
        return method.trained_sample_steps * self.passes * step


def image_flops(recipe: Recipe, world: int) -> float:
    """``Estimate.image_flops`` of a job of ``world`` processes."""
    return Estimate(recipe, world=world).image_flops
