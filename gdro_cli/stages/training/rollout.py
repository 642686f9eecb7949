"""Rollouts: images that the current policy draws with a stochastic sampler, and the steps that led to them.

Image k of a visit to a prompt depends only on the policy's weights and on (seed, prompt, visit, k): batches, processes
and restarts change only the rounding.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple, Self

import torch
from torch import Tensor

from gdro_cli.config.methods import DanceGrpoMethod, FlowGrpoMethod, OnlineMethod
from gdro_cli.config.recipe import Recipe
from gdro_cli.core.flow import euler_step
from gdro_cli.core.sde import SdeStep, flow_grpo_coefficient, log_prob, sde_step
from gdro_cli.core.seeds import generator, seed_for
from gdro_cli.data.records import PromptRecord
from gdro_cli.models.base import Conditioning, FlowModel
from gdro_cli.models.sampling import away_from, guided_velocity


class RolloutImage(NamedTuple):
    """The name of an image of a rollout."""

    prompt: PromptRecord
    visit: int
    """How often the prompt was visited before."""
    image: int
    """0 .. group_size - 1."""


@dataclass(frozen=True, slots=True)
class Policy:
    """The model as the online methods see it; they get every velocity here."""

    model: FlowModel
    method: OnlineMethod
    guidance: float
    size: tuple[int, int]
    """Height and width in pixels."""

    def schedule(self) -> Tensor:
        """Noise levels [T + 1] of a rollout of T steps; the first T - 1 steps are stochastic."""
        return self.model.sigmas(self.method.train_sample_steps, height=self.size[0], width=self.size[1])

    def velocity(self, latents: Tensor, sigma: Tensor, conditioning: Conditioning) -> Tensor:
        """The velocity [N, ...] of latents [N, ...] at noise levels [N], with guidance as in sampling."""
        (height, width), guidance = self.size, self.guidance
        away = away_from(self.model, conditioning, guidance=guidance)
        return guided_velocity(
            self.model, latents, sigma, conditioning, away, guidance=guidance, height=height, width=width
        )

    def step(self, latents: Tensor, steps: Tensor, conditioning: Conditioning) -> SdeStep:
        """The distribution of the latents after stochastic steps ``steps`` [N] of the schedule, 0 .. T - 2."""
        schedule = self.schedule()
        sigmas = schedule.to(latents.device)
        sigma, following = sigmas[steps], sigmas[steps + 1]
        coefficient = diffusion_coefficient(self.method, sigma, sigma_second=float(schedule[1]))
        velocity = self.velocity(latents, sigma, conditioning)
        return sde_step(latents, velocity, sigma, following, coefficient=coefficient)


def policy_guidance(recipe: Recipe, method: OnlineMethod) -> float:
    """Guidance scale of rounds and updates."""
    return recipe.sample.guidance if method.guidance is None else method.guidance


def diffusion_coefficient(method: OnlineMethod, sigma: Tensor, *, sigma_second: float) -> Tensor:
    """The method's diffusion coefficient [N] at noise levels [N]; ``sigma_second`` is the schedule's second value."""
    if isinstance(method, FlowGrpoMethod):
        return flow_grpo_coefficient(sigma, noise_level=method.noise_level, sigma_second=sigma_second)
    if isinstance(method, DanceGrpoMethod):
        return torch.full_like(sigma, method.eta)
    raise TypeError(f"{method.name} has no sampler")


@dataclass(frozen=True, slots=True)
class Rollout:
    """N images of this process; float32, on the model's device."""

    states: Tensor
    """Latents [N, T, ...] at the first T noise levels, beginning with the initial noise."""
    log_probs: Tensor
    """Log-probability [N, T - 1] of each stochastic step under the policy that took it."""
    clean: Tensor
    """Latents of the finished images [N, ...]."""

    @classmethod
    def joined(cls, parts: Sequence[Self]) -> Self:
        """Several rollouts as one."""
        return cls(*(torch.cat([getattr(part, name) for part in parts]) for name in ("states", "log_probs", "clean")))


def roll_out(
    policy: Policy, names: Sequence[RolloutImage], conditioning: Sequence[Conditioning], *, seed: int
) -> Rollout:
    """Draw the batch of N images with these names and conditionings; ``seed`` is that of all their noise.

    The last step goes to sigma 0 without noise, so that the reward sees a finished image.
    """
    model, (height, width) = policy.model, policy.size
    stochastic = policy.method.train_sample_steps - 1
    sigmas = policy.schedule().tolist()
    start = model.noise([_start_seed(policy.method, name, seed) for name in names], height=height, width=width)
    noise = torch.stack([_step_noise(name, (stochastic, *start.shape[1:]), seed) for name in names])
    # Made outside inference mode, so that the updates can differentiate through functions of them.
    states = torch.empty((len(names), stochastic + 1, *start.shape[1:]), device=model.device)
    log_probs, clean = states.new_empty(len(names), stochastic), states.new_empty(start.shape)
    with torch.inference_mode():
        text = model.batch_conditioning(list(conditioning))
        states[:, 0] = start.to(model.device)
        for i in range(stochastic):
            step = policy.step(states[:, i], torch.full((len(names),), i, device=model.device), text)
            states[:, i + 1] = step.draw(noise[:, i].to(model.device))
            log_probs[:, i] = log_prob(states[:, i + 1], step)
        level = torch.full((len(names),), sigmas[stochastic], device=model.device)
        velocity = policy.velocity(states[:, -1], level, text)
        clean.copy_(euler_step(states[:, -1], velocity, sigmas[stochastic], sigmas[-1]))
    return Rollout(states, log_probs, clean)


def trained_steps(method: OnlineMethod, names: Sequence[RolloutImage], *, seed: int) -> Tensor:
    """The stochastic steps of each image that are trained, in random order [N, M]."""
    stochastic = method.train_sample_steps - 1
    orders = [
        torch.randperm(stochastic, generator=generator(seed, "trained steps", name.prompt.id, name.visit, name.image))
        for name in names
    ]
    return torch.stack(orders)[:, : method.trained_sample_steps]


def prompts_of_round(
    prompts: Sequence[PromptRecord], number: int, *, count: int, seed: int
) -> list[tuple[PromptRecord, int]]:
    """The prompts of a round and how often each was visited before.

    Rounds walk through one endless sequence of epochs; each epoch is a new permutation of the prompts.
    """
    visits = [divmod(number * count + i, len(prompts)) for i in range(count)]
    return [(prompts[_permutation(len(prompts), seed, epoch)[i]], epoch) for epoch, i in visits]


@lru_cache(maxsize=4)
def _permutation(count: int, seed: int, epoch: int) -> list[int]:
    order: list[int] = torch.randperm(count, generator=generator(seed, "order of prompts", epoch)).tolist()
    return order


def _start_seed(method: OnlineMethod, name: RolloutImage, seed: int) -> int:
    keys = (name.prompt.id, name.visit)
    return seed_for(seed, "rollout start", *(keys if method.share_initial_noise else (*keys, name.image)))


def _step_noise(name: RolloutImage, shape: tuple[int, ...], seed: int) -> Tensor:
    return torch.randn(shape, generator=generator(seed, "rollout steps", name.prompt.id, name.visit, name.image))
