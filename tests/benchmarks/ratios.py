"""What the tool costs beyond the model itself: ratios, each measured in one run on one machine.

    python -m tests.benchmarks.ratios            # the table of docs/performance.md, about three minutes

The two sides of a ratio alternate, so a busy machine disturbs both; the ratio is that of their medians.
"""

from __future__ import annotations

import itertools
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch

from gdro_cli.config.load import load_recipe
from gdro_cli.config.recipe import Recipe
from gdro_cli.data.dataset import GroupBatch
from gdro_cli.data.records import PromptRecord
from gdro_cli.models.adapters import reference
from gdro_cli.models.base import FlowModel
from gdro_cli.models.sampling import sample_latents
from gdro_cli.stages.sampling.fill_store import sample_groups
from gdro_cli.stages.setup.model import attach_adapter, open_model
from gdro_cli.stages.setup.reward import open_reward
from gdro_cli.stages.setup.session import Session
from gdro_cli.stages.setup.store import training_plan
from gdro_cli.stages.training.group_gradient import GroupGradient, draw_noise, loss_arguments, noisy_groups

ROUNDS = 7
SIDE = 64
"""Pixels of a side of the embedded model's images."""
LARGE = 256
"""Pixels of a side of images whose activations take more memory than everything else in a step."""


def ratio(
    ours: Callable[[], object], bare: Callable[[], object], *, rounds: int = ROUNDS
) -> tuple[float, float, float]:
    """Median seconds of both sides, alternating, and ours / bare."""
    ours(), bare()
    times: tuple[list[float], list[float]] = ([], [])
    for _ in range(rounds):
        for side, call in enumerate((ours, bare)):
            began = time.perf_counter()
            call()
            times[side].append(time.perf_counter() - began)
    a, b = (statistics.median(side) for side in times)
    return a, b, a / b


def random_batch(recipe: Recipe, model: FlowModel, *, groups: int, k: int, side: int = SIDE) -> GroupBatch:
    """Groups of noise with random rewards: speed and memory do not depend on what the images show."""
    prompts = Session(recipe, Path()).prompts("train").records[:groups]
    shape = model.latent_shape(height=side, width=side)
    rewards = torch.rand(groups, k)
    return GroupBatch(
        latents=torch.randn(groups, k, *shape),
        rewards=rewards,
        mask=torch.ones_like(rewards, dtype=torch.bool),
        weights=torch.ones(groups),
        prompts=prompts,
        image_indices=torch.arange(k).expand(groups, k),
        conditioning=tuple(model.encode([prompt.prompt for prompt in prompts])),
        visits=(0,) * groups,
    )


def group_gradient(
    recipe: Recipe, model: FlowModel, *, one_pass: bool, micro_batch: int | None, side: int = SIDE
) -> GroupGradient:
    """The gradient as ``gdro train`` computes it, without accelerate."""
    return GroupGradient(
        model=model,
        loss=loss_arguments(recipe.group_method),
        reduction=recipe.group_method.reduction,
        guidance=recipe.sample.guidance,
        size=(side, side),
        micro_batch=micro_batch,
        one_pass=one_pass,
        backward=lambda loss: loss.backward(),
    )


def train_step(recipe: Recipe) -> tuple[float, float, float]:
    """A whole step (noise, loss, metrics, AdamW) against forward + backward of the same images."""
    model = open_model(recipe)
    parameters = attach_adapter(recipe, model)
    batch = random_batch(recipe, model, groups=recipe.train.groups_per_step, k=recipe.group_method.k)
    gradient = group_gradient(recipe, model, one_pass=True, micro_batch=None)
    optimizer = torch.optim.AdamW(parameters, lr=1e-6)
    noisy = noisy_groups(model, batch, draw_noise(batch, recipe.group_method, seed=0))
    latents, target = noisy.at(slice(None))
    text = {key: value[noisy.group] for key, value in noisy.conditioning.items()}

    def ours() -> None:
        gradient(noisy_groups(model, batch, draw_noise(batch, recipe.group_method, seed=0)))
        optimizer.step()
        optimizer.zero_grad()

    def forward() -> torch.Tensor:
        return model.velocity(latents, noisy.sigma, text, guidance=1.0, height=64, width=64)

    def bare() -> None:
        with torch.no_grad(), reference(model):
            forward()
        (forward() - target).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()

    return ratio(ours, bare)


def sampling(recipe: Recipe, *, against_pipeline: bool) -> tuple[float, float, float]:
    """Latents of 32 images against a loop of bare transformer calls, or against ``FluxPipeline.__call__``."""
    import importlib

    from diffusers import FluxPipeline

    from gdro_cli.embedded import tiny_model_path

    model = open_model(recipe)
    prompts = Session(recipe, Path()).prompts("train").records[:32]
    texts = model.encode([prompt.prompt for prompt in prompts])
    text = model.batch_conditioning(texts)
    noise = model.noise(list(range(32)), height=64, width=64)
    steps = recipe.sample.steps
    sigmas = model.sigmas(steps, height=64, width=64)
    importlib.import_module("gdro_cli.tiny.autoencoder")  # where diffusers looks for the class
    pipeline = FluxPipeline.from_pretrained(tiny_model_path(), dtype=torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    ids = {"img_ids": pipeline._prepare_latent_image_ids(1, 4, 4, "cpu", torch.float32)}
    ids["txt_ids"] = torch.zeros(text["prompt_embeds"].shape[1], 3)

    def ours() -> None:
        sample_latents(model, noise, texts, steps=steps, guidance=1.0, height=64, width=64, batch_size=32)

    def bare() -> None:
        state = noise
        with torch.inference_mode():
            for now, then in itertools.pairwise(sigmas):
                velocity = model.transformer(
                    hidden_states=state,
                    encoder_hidden_states=text["prompt_embeds"],
                    pooled_projections=text["pooled_prompt_embeds"],
                    timestep=now.expand(32),
                    return_dict=False,
                    **ids,
                )[0]
                state = state + (then - now) * velocity

    def whole_pipeline() -> None:
        pipeline(
            prompt_embeds=text["prompt_embeds"],
            pooled_prompt_embeds=text["pooled_prompt_embeds"],
            height=64,
            width=64,
            num_inference_steps=steps,
            output_type="latent",
        )

    return ratio(ours, whole_pipeline if against_pipeline else bare)


def scoring(recipe: Recipe) -> tuple[float, float, float]:
    """96 images on one worker against two, after both pools have loaded; the ratio is the speed-up."""
    from gdro_cli.rewards.pool import ScoringPool

    model = open_model(recipe)
    prompts: tuple[PromptRecord, ...] = Session(recipe, Path()).prompts("train").records[:12]
    groups = sample_groups(model, prompts, training_plan(Session(recipe, Path(), model=model)), batch_size=32)
    pairs = [(image, group.prompt) for group in groups for image in group.images][:96]
    images, texts = [image for image, _ in pairs], [prompt for _, prompt in pairs]
    with ScoringPool(open_reward(recipe), workers=1) as one, ScoringPool(open_reward(recipe), workers=2) as two:
        return ratio(lambda: one.score(images, texts), lambda: two.score(images, texts), rounds=3)


def peak_memory(recipe: Recipe, k: int) -> float:
    """MB by which a two-pass step of two groups in micro-batches of 2 raises the memory of a process of its own.

    Images have 256 pixels a side: their activations take most of a step's memory, as with real models. Two groups are
    at least two micro-batches, so that gradients add up for either K. Freed memory goes back to the system at once;
    otherwise the high-water mark would show how the heap is fragmented.
    """
    command = [sys.executable, __file__, "--memory", str(k)]
    heap = {"MALLOC_MMAP_THRESHOLD_": "16384", "MALLOC_TRIM_THRESHOLD_": "0", "MALLOC_TOP_PAD_": "0"}
    done = subprocess.run(command, check=True, capture_output=True, text=True, env={**os.environ, **heap})
    return float(done.stdout)


def measure_memory(recipe: Recipe, k: int) -> None:
    """Print by how much the peak exceeds the memory before the first step."""
    model = open_model(recipe)
    attach_adapter(recipe, model)
    gradient = group_gradient(recipe, model, one_pass=False, micro_batch=2, side=LARGE)
    batch = random_batch(recipe, model, groups=2, k=k, side=LARGE)
    before = resident("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the high-water mark starts again at the present size
    gradient(noisy_groups(model, batch, draw_noise(batch, recipe.group_method, seed=0)))
    print(resident("VmHWM") - before)


def resident(field: str) -> float:
    """VmRSS or VmHWM of this process in MB."""
    lines = Path("/proc/self/status").read_text().splitlines()
    (line,) = [line for line in lines if line.startswith(field)]
    return int(line.split()[1]) / 1024


def help_page() -> tuple[float, float, float]:
    """``gdro --help`` against a Python that does nothing."""

    def call(*arguments: str) -> Callable[[], object]:
        return lambda: subprocess.run([sys.executable, *arguments], check=True, capture_output=True)

    return ratio(call("-m", "gdro_cli", "--help"), call("-c", "pass"))


def main() -> None:
    """Print the table."""
    recipe = load_recipe("ocr")
    rows = []
    ours, bare, factor = train_step(recipe)
    rows.append(("train step / bare forward and backward (reference forward on both sides)", ours, bare, factor))
    ours, bare, factor = sampling(recipe, against_pipeline=False)
    rows.append(("sampling / bare transformer loop", ours, bare, factor))
    ours, bare, factor = sampling(recipe, against_pipeline=True)
    rows.append(("sampling / FluxPipeline.__call__", ours, bare, factor))
    ours, bare, factor = scoring(recipe)
    rows.append(("scoring, one worker / two workers", ours, bare, factor))
    ours, bare, factor = help_page()
    rows.append(("`gdro --help` / `python -c pass`", ours, bare, factor))
    print("| what | ours | against | ratio |\n|---|---|---|---|")
    for name, a, b, factor in rows:
        print(f"| {name} | {a:.3f} s | {b:.3f} s | {factor:.2f} |")
    small, large = peak_memory(recipe, 2), peak_memory(recipe, 16)
    print(
        f"| peak memory of a two-pass step of two groups, K = 16 / K = 2, micro-batch 2, {LARGE} pixels"
        f" | {large:.0f} MB | {small:.0f} MB |",
        end="",
    )
    print(f" {large / small:.2f} |")


if __name__ == "__main__":
    if sys.argv[1:2] == ["--memory"]:
        measure_memory(load_recipe("ocr"), int(sys.argv[2]))
    else:
        main()
