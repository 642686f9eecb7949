"""Sampling with FLUX.1-dev of random numbers: memory and speed, attention kernels, compilation."""

from __future__ import annotations

import logging
from typing import Any

import torch

from gdro_cli.models.backends import Attention, ComputeOptions, prepare_transformer
from gdro_cli.stages.training.estimate import Estimate, forward_work
from tests.gpu.acceptance.bench import FLUX, Bench, random_text, sampler, size_of
from tests.gpu.acceptance.rows import NOT_HERE, Section
from tests.gpu.passes import difference

KERNELS: tuple[Attention, ...] = ("native_math", "native_flash", "native_cudnn", "native_efficient")
STEPS = 4


def sampling(bench: Bench, section: Section) -> None:
    """Four Euler steps of 8 and of 16 images: memory against the dry-run, images and operations per second."""
    recipe = bench.recipe(FLUX)
    estimate, model = Estimate(recipe), bench.random_model(recipe)
    for images in (8, 16):
        draw = sampler(model, recipe, images)
        draw(1)
        cost = bench.measure(draw, STEPS)
        finite = bool(cost.result.isfinite().all())
        section.check(f"{images} images: latents are finite", finite, finite, True)
        weights, work = estimate.transformer_bytes / 1e9, forward_work(estimate.shape, images).peak / 1e9
        section.at_most(f"{images} images: peak memory, GB", cost.gigabytes, 1.1 * (weights + work))
        beside = None if cost.gigabytes is None else cost.gigabytes - weights
        section.figure(f"{images} images: memory beside the weights, GB", beside, note=f"the dry-run says {work:.4g}")
        section.figure(f"{images} images: images per second at {STEPS} steps", cost.rate(images))
        work = images * STEPS * estimate.reference_flops / 1e12
        section.figure(f"{images} images: TFLOP/s", cost.rate(work))


def attention(bench: Bench, section: Section) -> None:
    """PyTorch's attention kernels, each against its own choice."""
    recipe, images = bench.recipe(FLUX), 8
    model: Any = bench.random_model(recipe)
    height, width = size_of(model, recipe)
    text, noise = random_text(model, images), model.noise(range(images), height=height, width=width)
    sigma = torch.linspace(0.1, 0.9, images, device=noise.device)

    @torch.inference_mode()
    def velocity() -> torch.Tensor:
        return model.velocity(noise, sigma, text, guidance=3.5, height=height, width=width)

    wanted = velocity()
    section.figure("PyTorch's choice: milliseconds per pass", bench.measure(velocity).milliseconds())
    for kernel in KERNELS:
        if bench.pretended and kernel != "native_math":
            section.skip(f"{kernel}: difference")
            continue
        prepare_transformer(model.transformer, ComputeOptions(attention=kernel))
        try:
            error = difference(velocity(), wanted)
        except RuntimeError as refused:  # this kernel only; the others must still be tried
            section.check(f"{kernel}: difference", False, str(refused).splitlines()[0][:200], "no error")
            continue
        section.at_most(f"{kernel}: difference", error, 0.05)
        section.figure(f"{kernel}: milliseconds per pass", bench.measure(velocity).milliseconds())
    prepare_transformer(model.transformer, ComputeOptions())


def compilation(bench: Bench, section: Section) -> None:
    """``model.compile``: sampling, then training as a job does it; no version of a block may be left uncompiled."""
    names = ("sampling: milliseconds per step", "training step: milliseconds")
    if bench.pretended:
        for name in (*names, "recompilation limits"):
            section.skip(name, NOT_HERE)
        return
    eager = _times(bench, compiled=False)
    with Warnings("torch._dynamo") as warnings:
        compiled = _times(bench, compiled=True)
    limits = [message for message in warnings.messages if "recompile_limit" in message]
    section.check("recompilation limits", not limits, limits[:1] or 0, 0)
    section.figure("compiled graphs", float(torch._dynamo.utils.counters["stats"]["unique_graphs"]))
    for name, with_it, without in zip(names, compiled, eager, strict=True):
        section.figure(f"{name}, eager", without)
        section.at_most(f"{name}, compiled", with_it, without)


def _times(bench: Bench, *, compiled: bool) -> tuple[float, float]:
    """Milliseconds of a sampling step of 8 images, and of a training step of two groups, both warmed up."""
    recipe = bench.recipe(FLUX, f"model.compile={str(compiled).lower()}", "train.groups_per_step=2")
    model = bench.random_model(recipe)
    sampler(model, recipe, 4)(1)
    draw = sampler(model, recipe, 8)
    draw(1)
    drawing = bench.measure(draw, STEPS)
    job = bench.job(recipe, run=f"compiled-{compiled}", model=model)
    job.checkpointing(1)
    job.step()
    training = bench.measure(job.step)
    return drawing.milliseconds(STEPS) or 0.0, training.milliseconds() or 0.0


class Warnings(logging.Handler):
    """Keeps what a logger says inside the block."""

    def __init__(self, logger: str) -> None:
        super().__init__(logging.WARNING)
        self.logger, self.messages = logging.getLogger(logger), list[str]()

    def emit(self, record: logging.LogRecord) -> None:
        self.messages.append(record.getMessage())

    def __enter__(self) -> Warnings:
        self.logger.addHandler(self)
        return self

    def __exit__(self, *error: object) -> None:
        self.logger.removeHandler(self)
