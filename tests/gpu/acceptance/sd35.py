"""Stable Diffusion 3.5 medium of random numbers: sampling, micro-batches, and a round of an online method."""

from __future__ import annotations

import math

import torch
from PIL import Image
from torch import Tensor

from gdro_cli.stages.training.estimate import Estimate, forward_work
from gdro_cli.stages.training.online import OnlineSteps
from gdro_cli.stages.training.rollout import RolloutImage
from tests.gpu.acceptance.bench import SD35, Bench, random_text, sampler
from tests.gpu.acceptance.rows import Section

STEPS = 4
GROUP, PROMPTS = 4, 2
"""Of the round."""


def speed(bench: Bench, section: Section) -> None:
    """Sampling with classifier-free guidance, and training in micro-batches of 4 and of 16."""
    groups = ("method.k=4", "train.groups_per_step=4")
    recipe = bench.recipe(SD35, *groups)
    estimate = Estimate(recipe)
    job = bench.job(recipe, run="sd35")
    images = 8
    draw = sampler(job.model, recipe, images)
    draw(1)
    cost = bench.measure(draw, STEPS)
    section.figure(f"images per second at {STEPS} steps, guidance {recipe.sample.guidance:g}", cost.rate(images))
    weights = estimate.transformer_bytes + estimate.adapter.total
    section.at_most(
        "sampling: peak memory, GB", cost.gigabytes, 1.1 * (weights + forward_work(estimate.shape, images).peak) / 1e9
    )
    times = []
    job.checkpointing(float(recipe.train.gradient_checkpointing))
    for micro in (4, 16):
        changed = bench.recipe(SD35, *groups, f"train.micro_batch={micro}")
        job.step(changed)
        cost = bench.measure(job.step, changed)
        wanted = Estimate(changed).training_bytes / 1e9
        section.near(f"micro-batches of {micro}: peak memory, GB", cost.gigabytes, wanted, within=0.05)
        section.figure(f"micro-batches of {micro}: milliseconds per image", cost.milliseconds(16))
        times.append(cost.seconds)
    ratio = None if None in times else times[1] / times[0]
    section.figure("milliseconds per image, micro-batches of 16 / of 4", ratio, note="below 0.8: bound by launches")


class InventedRewards(OnlineSteps):
    """Rounds whose rewards are made up, so that no scoring process is needed."""

    def _rewards(self, names: list[RolloutImage], images: list[Image.Image | None], number: int) -> Tensor:
        if None in images or len(images) != GROUP * PROMPTS:
            raise ValueError(f"{images.count(None)} of {len(images)} images are not finite")
        return torch.rand(PROMPTS, GROUP, generator=torch.Generator().manual_seed(number), dtype=torch.float64)


def online(bench: Bench, section: Section) -> None:
    """A round of Flow-GRPO and its two updates; in the first the policy is the one that drew the images."""
    recipe = bench.recipe(
        SD35,
        "method.name=flow-grpo",
        f"method.group_size={GROUP}",
        f"method.prompts_per_round={PROMPTS}",
        "method.updates_per_round=2",
        f"method.train_sample_steps={STEPS}",
        f"prompts.train.count={PROMPTS}",
        "train.micro_batch=4",
    )
    job = bench.job(recipe, run="online")
    job.checkpointing(1)
    source = InventedRewards(job.session)
    texts = random_text(job.model, PROMPTS + 1)
    source.conditioning = {prompt.id: text for prompt, text in zip(source.prompts, texts, strict=False)}
    job.model._unconditional = texts[-1]
    cost = bench.measure(source.prepare, 0)
    section.figure("seconds of a round of 8 images, decoded", cost.seconds)
    for update in range(2):
        cost = bench.measure(source.gradient, update)
        norm = job.state.update(recipe.train.lr)
        metrics = dict(cost.result.metrics)
        if update == 0:
            away = abs(metrics["ratio_mean"] - 1)
            section.at_most("first update: distance of the likelihood ratio from 1", away, 1e-4)
            section.at_most("first update: clipped share", metrics["clip_fraction"], 0.0)
        finite = math.isfinite(norm) and all(math.isfinite(value) for value in metrics.values())
        section.check(f"update {update + 1}: metrics and gradient are finite", finite, metrics, "finite")
        section.check(f"update {update + 1}: norm of the gradient", norm > 0, norm, "above 0")
        section.figure(f"update {update + 1}: seconds", cost.seconds)
