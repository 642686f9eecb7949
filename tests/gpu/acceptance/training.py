"""Training an adapter of FLUX.1-dev of random numbers: memory against the dry-run, one pass against two, a resume."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor

from gdro_cli.models import adapters
from gdro_cli.runtime.checkpoint import flatten_optimizer
from gdro_cli.stages.training.estimate import Estimate
from tests.gpu.acceptance.bench import FLUX, Bench, Job, free, sampler
from tests.gpu.acceptance.rows import Section
from tests.gpu.passes import difference

TWO_GROUPS = "train.groups_per_step=2"
STEPS = 2
CASES = (
    ("micro-batches of 6, no block checkpointed", ("train.micro_batch=6", "train.gradient_checkpointing=false")),
    ("micro-batches of 6, 3 of 4 blocks", ("train.micro_batch=6", "train.gradient_checkpointing=0.75")),
    ("micro-batches of 6, all blocks", ("train.micro_batch=6", "train.gradient_checkpointing=true")),
    ("micro-batches of 4, no block checkpointed", ("train.micro_batch=4", "train.gradient_checkpointing=false")),
    ("micro-batches of 4, all blocks", ("train.micro_batch=4", "train.gradient_checkpointing=true")),
)
"""A micro-batch of 6 is a whole group, and so takes one pass; 4 take two."""


def memory(bench: Bench, section: Section) -> None:
    """A whole step, reference, gradient, AdamW and average, at several micro-batches: peak, seconds, TFLOP/s."""
    job = bench.job(bench.recipe(FLUX, TWO_GROUPS), run="memory")
    job.disturb()
    for name, changes in CASES:
        recipe = bench.recipe(FLUX, TWO_GROUPS, *changes)
        estimate = Estimate(recipe)
        if not bench.has_room(estimate.training_bytes):
            section.skip(name, f"it needs {estimate.training_bytes / 1e9:.1f} GB")
            continue
        job.checkpointing(float(recipe.train.gradient_checkpointing))
        job.step(recipe)  # makes the optimizer's moments
        cost = bench.measure(job.step, recipe)
        section.check(f"{name}: the loss is finite", math.isfinite(cost.result), cost.result, "finite")
        section.near(f"{name}: peak memory, GB", cost.gigabytes, estimate.training_bytes / 1e9, within=0.05)
        images = recipe.train.groups_per_step * recipe.group_method.k
        section.figure(f"{name}: seconds per image", None if cost.seconds is None else cost.seconds / images)
        section.figure(f"{name}: TFLOP/s", cost.rate(estimate.step_flops / 1e12))


def passes(bench: Bench, section: Section) -> None:
    """One pass per group against two, and sampling with the adapter merged and not."""
    recipe = bench.recipe(FLUX, TWO_GROUPS)
    job, found = bench.job(recipe, run="passes"), dict[str, Tensor]()
    job.disturb(0.1 if bench.tiny else 0.02)  # about as large as the weights
    job.checkpointing(1)
    for kind in ("one_pass", "two_pass"):
        changed = bench.recipe(FLUX, TWO_GROUPS, f"train.group_gradient={kind}")
        found[kind] = job.flat_gradient(changed)
        cost = bench.measure(job.flat_gradient, changed)
        section.figure(f"{kind}: milliseconds per step", cost.milliseconds())
    error = difference(found["one_pass"], found["two_pass"])
    section.at_most("one pass: difference of the gradient from two passes", error, 1e-2)
    draw = sampler(job.model, recipe, 8)
    drawn = draw(STEPS)
    with adapters.reference(job.model):
        effect = difference(drawn, draw(STEPS))
    section.figure("adapter: difference of the latents from the base", effect)
    section.figure(
        "adapter not merged: milliseconds per step of 8 images", bench.measure(draw, STEPS).milliseconds(STEPS)
    )
    merged = getattr(adapters, "merged", None)
    if merged is None:
        section.skip("adapter merged: difference of the latents", "gdro_cli.models.adapters has no merged()")
        return
    with merged(job.model):
        section.at_most("adapter merged: difference of the latents", difference(draw(STEPS), drawn), effect / 2)
        section.figure(
            "adapter merged: milliseconds per step of 8 images", bench.measure(draw, STEPS).milliseconds(STEPS)
        )
    section.at_most("adapter after merging: difference of the latents", difference(draw(STEPS), drawn), 0.0)


def resume(bench: Bench, section: Section) -> None:
    """A checkpoint of the full-size adapter, read into a new model: the same state, and the same next step."""
    recipe = bench.recipe(FLUX, TWO_GROUPS)
    with deterministic():
        first = bench.job(recipe, run="resume")
        first.disturb()
        first.checkpointing(1)
        first.step(seed=1)
        cost = bench.measure(first.state.save)
        section.figure("seconds to write a checkpoint", cost.seconds)
        (checkpoint,) = (first.state.folder.path / "checkpoints").glob("step-*")
        # the adapter and its average, each twice (once in diffusers' format), and two moments
        wanted = 6 * 4 * Estimate(recipe).adapter_values
        section.near("gigabytes of a checkpoint", folder_bytes(checkpoint) / 1e9, wanted / 1e9, within=0.05)
        saved = contents(first)
        first.step(seed=2)
        after = contents(first)
        del first
        free()
        second = bench.job(bench.recipe(FLUX, TWO_GROUPS, "train.seed=1"), run="resume")
        other = not equal(contents(second), saved)
        section.check("the new adapter differs before", other, other, True)
        second.checkpointing(1)
        cost = bench.measure(second.state.resume)
        section.figure("seconds to read a checkpoint", cost.seconds)
        section.check("step that it continues from", second.state.step == 1, second.state.step, 1)
        same = equal(contents(second), saved)
        section.check("adapter, average and moments have the same bits", same, same, True)
        second.step(seed=2)
        same = equal(contents(second), after)
        section.check("the next step has the same bits", same, same, True)


def contents(job: Job) -> dict[str, Tensor]:
    """All that a step changes, on the CPU."""
    moments, _ = flatten_optimizer(job.state.optimizer)
    return {**adapters.lora_state(job.model), **job.state.ema.state(), **moments}


def equal(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def folder_bytes(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())


@contextmanager
def deterministic() -> Iterator[None]:
    """Kernels whose sums have one order, where PyTorch has them."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)
