"""The gradient of one training step: noisy latents, velocity errors, and the group loss in one pass or two.

Shapes: B groups of K images, N = B * K images in all; latents [N, ...].
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from gdro_cli.config.methods import GroupMethod
from gdro_cli.core.flow import Reduction, interpolate, velocity_error, velocity_target
from gdro_cli.core.loss_output import LossOutput
from gdro_cli.core.losses import DEVIATION_LOSSES, group_loss, image_weights
from gdro_cli.core.seeds import generator
from gdro_cli.data.dataset import GroupBatch
from gdro_cli.models.adapters import reference
from gdro_cli.models.base import Conditioning, FlowModel


def loss_arguments(method: GroupMethod) -> dict[str, Any]:
    """The arguments that ``group_loss`` and ``image_weights`` take from a recipe's method section."""
    settings = {key: getattr(method, key) for key in method.loss_settings}
    return {"method": method.name, "beta": method.beta, "gamma": method.gamma, **settings}


@dataclass(frozen=True, slots=True)
class NoisyGroups:
    """A batch of groups and its noise, on the model's device; the images of a group are next to each other.

    ``at`` makes noisy latents and targets part by part: whole, they would take most of a step's memory beside the
    activations of a micro-batch.
    """

    clean: Tensor
    """x0 [N, ...] in float32."""
    noise: Tensor
    """[N, ...] in float32, or [B, ...] if the images of a group share it."""
    sigma: Tensor
    """[N] float32."""
    conditioning: Conditioning
    """Batched by group: each tensor has a leading B."""
    group: Tensor
    """[N] group of each image."""
    rewards: Tensor
    """[B, K]."""
    mask: Tensor
    """[B, K] bool."""
    weights: Tensor
    """[B] weights of the groups."""
    reference: Tensor | None = None
    """[N, ...] velocities of the reference, for a loss that takes the policy's deviations from them."""

    def at(self, part: slice | Tensor) -> tuple[Tensor, Tensor]:
        """x_sigma and the velocity target noise - x0 of some of the N images, each [n, ...] in float32."""
        clean = self.clean[part]
        noise = self.noise[part] if len(self.noise) == len(self.clean) else self.noise[self.group[part]]
        return interpolate(clean, noise, self.sigma[part]), velocity_target(clean, noise)


def noise_draw(method: GroupMethod, visit: int) -> int:
    """The number of the draw of noise for a group's visit: the visit's own, or one of the bank's."""
    return visit if method.noise_bank is None else visit % method.noise_bank


def draw_noise(batch: GroupBatch, method: GroupMethod, *, seed: int) -> tuple[Tensor, Tensor]:
    """Noise levels [B, K], uniform in [sigma_min, sigma_max), and noise [B, K or 1, ...], both float32 on the CPU.

    With ``share_sigma`` and ``share_noise`` a group has one of each. (The losses see only differences of implicit
    rewards, and sharing lowers their variance.) Both depend on (seed, prompt, draw, image), where ``noise_draw`` gives
    the draw, not on the group's position in the batch or the number of processes.
    """
    shape = batch.latents.shape
    sigma = torch.empty(shape[:2])
    noise = torch.empty(shape[0], 1 if method.share_noise else shape[1], *shape[2:])
    for b, (prompt, visit) in enumerate(zip(batch.prompts, batch.visits, strict=True)):
        group = (prompt.id, noise_draw(method, visit))
        for k, image in enumerate(batch.image_indices[b].tolist()):
            level = group if method.share_sigma else (*group, image)
            sigma[b, k] = torch.rand((), generator=generator(seed, "training sigma", *level))
            if k < noise.shape[1]:
                name = group if method.share_noise else (*group, image)
                noise[b, k] = torch.randn(shape[2:], generator=generator(seed, "training noise", *name))
    return method.sigma_min + (method.sigma_max - method.sigma_min) * sigma, noise


def noisy_groups(model: FlowModel, batch: GroupBatch, noise: tuple[Tensor, Tensor]) -> NoisyGroups:
    """Move a batch and what ``draw_noise`` drew for it to the model's device, from pinned memory without waiting."""
    levels, draws = noise
    b, k = batch.rewards.shape
    return NoisyGroups(
        clean=batch.latents.flatten(0, 1).to(model.device, non_blocking=True).float(),
        noise=draws.flatten(0, 1).to(model.device, non_blocking=True),
        sigma=levels.flatten().to(model.device, non_blocking=True),
        conditioning=model.batch_conditioning(list(batch.conditioning)),
        group=torch.arange(b, device=model.device).repeat_interleave(k),
        rewards=batch.rewards.to(model.device),
        mask=batch.mask.to(model.device),
        weights=batch.weights.to(model.device),
    )


@dataclass(frozen=True, slots=True)
class GroupGradient:
    """Adds the gradient of the group loss to that of the adapter's parameters.

    The reference is the same transformer with its adapter off, on the same x_sigma.
    """

    model: FlowModel
    loss: dict[str, Any]
    """From ``loss_arguments``."""
    reduction: Reduction
    guidance: float
    size: tuple[int, int]
    """Height and width in pixels."""
    micro_batch: int | None
    """Images per forward; None = all."""
    one_pass: bool
    """Whether the activations of whole groups are kept, as many groups at a time as ``micro_batch`` has room for."""
    backward: Callable[[Tensor], None]
    between_micro_batches: Callable[[], None] = lambda: None
    """May raise to abandon the step; not called when only its last backward pass is done."""

    def reference_errors(self, groups: NoisyGroups, known: Tensor | None = None) -> Tensor:
        """Velocity errors [B, K] of the untrained model; only those that are nan in ``known`` [B, K] are computed."""
        with torch.no_grad(), reference(self.model):
            if known is None:
                return self._errors(groups)[0]
            errors = known.to(groups.rewards.device, copy=True)
            unknown = errors.flatten().isnan().nonzero().flatten()
            for part in unknown.split(self.micro_batch or len(unknown)) if len(unknown) else ():
                errors.view(-1)[part] = self._part_errors(groups, part)[0]
            return errors

    def _with_reference(self, groups: NoisyGroups) -> tuple[NoisyGroups, Tensor]:
        """The groups with the velocities of the untrained model, and its velocity errors [B, K]."""
        velocities, errors = [], []
        with torch.no_grad(), reference(self.model):
            for part in self._parts(0, groups.rewards.numel()):
                velocity, target = self._velocity(groups, part)
                velocities.append(velocity)
                errors.append(velocity_error(velocity, target, reduction=self.reduction))
        return replace(groups, reference=torch.cat(velocities)), torch.cat(errors).view_as(groups.rewards)

    def __call__(self, groups: NoisyGroups, reference_errors: Tensor | None = None) -> LossOutput:
        """Add the gradient of the mean loss over B groups to the parameters; the output is detached.

        ``reference_errors`` [B, K] are computed if they are not given, or if the loss takes the velocities themselves.
        """
        if self.loss["method"] in DEVIATION_LOSSES:
            groups, reference_errors = self._with_reference(groups)
        elif reference_errors is None:
            reference_errors = self.reference_errors(groups)
        names = ("rewards", "mask", "weights")
        given = {"reference_errors": reference_errors, **{name: getattr(groups, name) for name in names}}
        if self.one_pass:
            errors = self._backward_by_group(groups, given)
        else:  # first the weight of each image's error, then the images again, one micro-batch at a time
            with torch.no_grad():
                errors = self._errors(groups)
            weights = image_weights(**_named(errors), **given, **self.loss).view(len(errors), -1)
            for part in self._parts(0, weights.shape[1]):
                if part.start:
                    self.between_micro_batches()
                self.backward((weights[:, part] * self._part_errors(groups, part)).sum())
        with torch.no_grad():
            return group_loss(**_named(errors), **given, **self.loss)

    def _backward_by_group(self, groups: NoisyGroups, given: dict[str, Any]) -> Tensor:
        """Backward of the loss, some groups at a time; returns the errors [1 or 2, B, K], as ``_part_errors`` does."""
        count, k = groups.rewards.shape
        at_once = count if self.micro_batch is None else max(1, self.micro_batch // k)
        errors = []
        for first in range(0, count, at_once):
            if first:
                self.between_micro_batches()
            rows = slice(first, min(first + at_once, count))
            part = self._errors(groups, rows)
            output = group_loss(**_named(part), **{name: value[rows] for name, value in given.items()}, **self.loss)
            self.backward(output.loss * (part.shape[1] / count))  # the loss is a mean over groups
            errors.append(part.detach())
        return torch.cat(errors, dim=1)

    def _parts(self, start: int, end: int) -> list[slice]:
        """The micro-batches of consecutive images."""
        size = self.micro_batch or end - start
        return [slice(first, min(first + size, end)) for first in range(start, end, size)]

    def _errors(self, groups: NoisyGroups, rows: slice = slice(None)) -> Tensor:
        """Those of ``_part_errors`` [1 or 2, b, K] of some of the groups."""
        start, end, _ = rows.indices(len(groups.rewards))
        k = groups.rewards.shape[1]
        parts = [self._part_errors(groups, part) for part in self._parts(start * k, end * k)]
        return torch.cat(parts, dim=1).view(-1, end - start, k)

    def _part_errors(self, groups: NoisyGroups, part: slice | Tensor) -> Tensor:
        """Velocity errors of some of the N images and, beside a reference, deviations from it: [1 or 2, n]."""
        velocity, target = self._velocity(groups, part)
        others = [target] if groups.reference is None else [target, groups.reference[part]]
        return torch.stack([velocity_error(velocity, other, reduction=self.reduction) for other in others])

    def _velocity(self, groups: NoisyGroups, part: slice | Tensor) -> tuple[Tensor, Tensor]:
        """The model's velocity at some of the N images, and its target: each [n, ...]."""
        group = groups.group[part]
        conditioning = {key: value[group] for key, value in groups.conditioning.items()}
        latents, target = groups.at(part)
        velocity = self.model.velocity(
            latents,
            groups.sigma[part],
            conditioning,
            guidance=self.guidance,
            height=self.size[0],
            width=self.size[1],
        )
        if not torch.is_grad_enabled():
            self.between_micro_batches()
        return velocity, target


def _named(errors: Tensor) -> dict[str, Any]:
    """Errors [1 or 2, B, K] by the names that the losses give them."""
    return dict(zip(("errors", "deviations"), errors, strict=False))
