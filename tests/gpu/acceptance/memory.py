"""Ways to save memory: text encoders that are given back, a quantised base, an 8-bit optimizer."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from gdro_cli.config.recipe import Recipe
from gdro_cli.models.base import FlowModel
from gdro_cli.runtime.checkpoint import flatten_optimizer, restore_optimizer
from gdro_cli.runtime.optimizer import make_optimizer
from gdro_cli.stages.setup.model import open_model
from gdro_cli.stages.training.estimate import Estimate
from tests.gpu.acceptance.bench import FLUX, Bench, Job, free, random_text, size_of
from tests.gpu.acceptance.rows import Section
from tests.gpu.passes import difference

DEPTHS = {"num_layers": 4, "num_single_layers": 8}
"""FLUX.1-dev with these has 2.5 billion numbers."""
LIMITS = {"int8": (0.05, 0.98), "fp8": (0.15, 0.9), "nf4": (0.3, 0.8)}
"""Largest difference of the velocity from bfloat16, and smallest cosine of the gradients."""


def text_encoders(bench: Bench, section: Section) -> None:
    """The text encoders of FLUX.1-dev encode and give their memory back."""
    recipe = bench.recipe(FLUX)
    model, estimate = bench.random_model(recipe), Estimate(recipe)
    before = bench.allocated()
    texts = model.encode([f"a sign with {number} letters" for number in range(8)])
    during = bench.allocated()
    model.release_encoders()
    after = bench.allocated()
    wanted = {key: list(shape) for key, shape in model.conditioning_shapes(model.max_sequence_length).items()}
    found = {key: list(value.shape) for key, value in texts[0].items()}
    section.check("shapes of an encoding", found == wanted, found, wanted)
    finite = all(bool(value.isfinite().all()) for text in texts for value in text.values())
    section.check("encodings are finite", finite, finite, True)
    section.near("encoders on the device, GB", gap(during, before), estimate.text_bytes / 1e9, within=0.05)
    section.at_most("left after release_encoders, GB", gap(after, before), 0.3)


def gap(after: float | None, before: float | None) -> float | None:
    return None if after is None or before is None else after - before


def quantised(bench: Bench, section: Section) -> None:
    """A base of 4 + 8 blocks in bfloat16, int8, fp8 and nf4: results, dtypes, memory; and AdamW in 8 bits."""
    folder = shallow_flux(bench)
    base: tuple[Tensor, Tensor] | None = None
    for kind in ("none", *LIMITS):
        if bench.pretended and kind != "none":
            section.skip(f"{kind}: velocity, gradient and memory")
            continue
        job, found = quantised_job(bench, section, folder, kind)
        if base is None:
            base = found
        else:
            largest, smallest = LIMITS[kind]
            section.at_most(f"{kind}: difference of the velocity", difference(found[0], base[0]), largest)
            cosine = nn.functional.cosine_similarity(found[1], base[1], dim=0)
            section.at_least(f"{kind}: cosine of the gradients", float(cosine), smallest)
        for share in (True, False):
            recipe = quantised_recipe(bench, folder, kind, f"train.gradient_checkpointing={str(share).lower()}")
            job.checkpointing(float(share))
            job.step(recipe)
            cost = bench.measure(job.step, recipe)
            wanted = Estimate(recipe).training_bytes / 1e9
            name = f"{kind}: peak memory, GB, {'all' if share else 'no'} blocks checkpointed"
            section.near(name, cost.gigabytes, wanted, within=0.05)
        del job
        free()
    eight_bit_optimizer(bench, section)


def quantised_job(bench: Bench, section: Section, folder: Path, kind: str) -> tuple[Job, tuple[Tensor, Tensor]]:
    """A training on the loaded base, and its velocity and gradient."""
    recipe = quantised_recipe(bench, folder, kind)
    model = open_model(recipe)
    cost = bench.measure(lambda: model.transformer)
    section.figure(f"{kind}: seconds to load", cost.seconds)
    velocity = one_velocity(model, recipe)
    job = bench.job(recipe, run=f"quantised-{kind}", model=model)
    job.disturb()
    dtypes, handles = set[torch.dtype](), []
    for name, layer in model.transformer.named_modules():
        if isinstance(layer, nn.Linear) and ".lora_" not in name:
            handles.append(layer.register_forward_hook(lambda _m, _i, output: dtypes.add(output.dtype)))
    gradient = job.flat_gradient(recipe)
    for handle in handles:
        handle.remove()
    names = sorted(map(str, dtypes))
    section.check(f"{kind}: linear layers answer in", names == ["torch.bfloat16"], names, ["torch.bfloat16"])
    finite = bool(velocity.isfinite().all() and gradient.isfinite().all())
    section.check(f"{kind}: velocity and gradient are finite", finite, finite, True)
    return job, (velocity, gradient)


def one_velocity(model: FlowModel, recipe: Recipe) -> Tensor:
    height, width = size_of(model, recipe)
    noise = model.noise([1, 2], height=height, width=width)
    sigma = torch.tensor([0.9, 0.3], device=noise.device)
    with torch.no_grad():
        return model.velocity(noise, sigma, random_text(model, 2), guidance=3.5, height=height, width=width)


def quantised_recipe(bench: Bench, folder: Path, kind: str, *changes: str) -> Recipe:
    usual = (f"model.path={folder}", f"model.quantization={kind}", "train.micro_batch=2", "method.k=2")
    usual += ("train.groups_per_step=2",)
    return bench.recipe(FLUX, *usual, *changes)


def shallow_flux(bench: Bench) -> Path:
    """A folder with a FLUX.1-dev of few blocks; the tiny model where the run is tiny."""
    recipe = bench.recipe(FLUX)
    if bench.tiny:
        return Path(recipe.model.path)
    folder = bench.work / "models/shallow-flux"
    if not (folder / "model_index.json").is_file():
        random = bench.random_folder(recipe, DEPTHS)
        random.load("transformer", dtype=torch.bfloat16).to("cpu").save_pretrained(folder / "transformer")
        free()
        (folder / "vae").mkdir(exist_ok=True)
        (folder / "vae/config.json").write_text(json.dumps(random.config("vae")))
        index = {"_class_name": "FluxPipeline", "transformer": ["diffusers", "FluxTransformer2DModel"]}
        (folder / "model_index.json").write_text(json.dumps(index))
    return folder


def eight_bit_optimizer(bench: Bench, section: Section) -> None:
    """Two steps of AdamW in 8 bits, the second also after a restore."""
    name = "adamw8bit: a step after a restore has the same bits"
    if bench.pretended:
        section.skip(name)
        return
    settings: dict[str, Any] = {"lr": 1e-3, "betas": (0.9, 0.999), "weight_decay": 1e-4}

    def parameter(start: Tensor) -> nn.Parameter:
        return nn.Parameter(start.clone())

    def step(optimizer: torch.optim.Optimizer, p: nn.Parameter, gradient: Tensor) -> None:
        p.grad = gradient.clone()
        optimizer.step()

    start, *gradients = (torch.randn(256, 256, device="cuda") for _ in range(3))
    first = parameter(start)
    optimizer = make_optimizer("adamw8bit", [first], **settings)
    step(optimizer, first, gradients[0])
    moved = difference(first, start)
    section.figure("adamw8bit: a step moves the parameters", moved)
    second = parameter(first.detach())
    restored = make_optimizer("adamw8bit", [second], **settings)
    restore_optimizer(restored, *flatten_optimizer(optimizer))
    step(optimizer, first, gradients[1])
    step(restored, second, gradients[1])
    same = torch.equal(first, second)
    section.check(name, same, same, True)
