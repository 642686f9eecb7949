"""What the checks work with: recipes and random models of full or tiny size, training jobs, and what a piece of work
costs on the device.
"""

from __future__ import annotations

import gc
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gdro_cli.config.load import load_recipe
from gdro_cli.config.recipe import Recipe
from gdro_cli.core.footprint import USABLE
from gdro_cli.core.seeds import generator
from gdro_cli.data.dataset import GroupBatch
from gdro_cli.data.records import PromptRecord
from gdro_cli.models.base import Conditioning, FlowModel
from gdro_cli.models.folder import PipelineFolder
from gdro_cli.models.memory import checkpoint_blocks
from gdro_cli.models.meta_model import open_folder
from gdro_cli.models.sampling import sample_latents
from gdro_cli.runtime.run import RunFolder
from gdro_cli.stages.setup.model import open_model
from gdro_cli.stages.setup.session import Session
from gdro_cli.stages.training.batch_sizes import takes_one_pass
from gdro_cli.stages.training.group_gradient import GroupGradient, draw_noise, loss_arguments, noisy_groups
from gdro_cli.stages.training.state import TrainingState
from tests.gpu.passes import FAMILIES
from tests.support.tiny_families import SIZE, T5_TOKENS, clip_tokenizer, t5_tokenizer

ROOT = Path(__file__).parents[3]
TINY = {"flux-geneval": "flux-dev", "sd35-geneval": "sd3"}
"""Recipe -> the tiny model that takes the place of the recipe's."""
FLUX, SD35 = TINY
LIMIT = 400.0
"""Seconds for a command."""


@dataclass(frozen=True)
class Cost:
    """What a piece of work gave and took. Seconds and bytes are None on a pretended device, which has neither."""

    result: Any
    seconds: float | None
    peak: int | None
    """The most bytes of tensors on the device at once, weights included."""

    @property
    def gigabytes(self) -> float | None:
        return None if self.peak is None else self.peak / 1e9

    def rate(self, work: float) -> float | None:
        """Work per second."""
        return None if self.seconds is None else work / self.seconds

    def milliseconds(self, count: int = 1) -> float | None:
        """Time of each of ``count`` equal parts."""
        return None if self.seconds is None else 1000 * self.seconds / count


class RandomFolder(PipelineFolder):
    """A pipeline folder whose networks get random numbers; no weights are read.

    Args:
        folder: gives classes and configurations.
        device: where the numbers are made.
        changes: other values in the transformer's configuration.
    """

    def __init__(self, folder: PipelineFolder, device: torch.device, changes: dict[str, Any] | None = None) -> None:
        vars(self).update(vars(folder))
        self._original, self._device, self._changes = folder, device, changes or {}

    def config(self, name: str, *, file: str = "config.json") -> dict[str, Any]:
        return self._original.config(name, file=file) | (self._changes if name == "transformer" else {})

    def load(self, name: str, *, dtype: torch.dtype | None = None, quantization: Any = None) -> Any:
        if name == "scheduler":
            from diffusers import FlowMatchEulerDiscreteScheduler

            return FlowMatchEulerDiscreteScheduler.from_config(self.config(name, file="scheduler_config.json"))
        if name.startswith("tokenizer"):  # few words, each with an id that the real encoders have
            return t5_tokenizer() if "T5" in self._encoder_of(name) else clip_tokenizer(length=77)
        cls = self.component_class(name)
        config = {key: value for key, value in self.config(name).items() if not key.startswith("_")}
        transformers, usual = getattr(cls, "config_class", None), torch.get_default_dtype()
        torch.set_default_dtype(dtype)
        try:
            with self._device:
                torch.manual_seed(0)
                module = cls.from_config(config) if transformers is None else cls(transformers.from_dict(config))
        finally:
            torch.set_default_dtype(usual)
        return torch.nn.Module.to(module, dtype=dtype)

    def _encoder_of(self, tokenizer: str) -> str:
        return self.components[tokenizer.replace("tokenizer", "text_encoder")]


class Bench:
    """One run of the acceptance.

    Args:
        work: folder of stores, runs and models.
        pretended: whether the device is a pretended GPU.
        tiny: tiny models in place of full-size ones.
    """

    def __init__(self, work: Path, *, pretended: bool, tiny: bool) -> None:
        self.work, self.pretended, self.tiny = work.resolve(), pretended, tiny

    # -- the device ---------------------------------------------------------------------------------------------

    def measure(self, work: Callable[..., Any], *arguments: Any, **named: Any) -> Cost:
        """Do the work with these arguments, and say what it took."""
        if self.pretended:
            return Cost(work(*arguments, **named), None, None)
        gc.collect()  # nothing that is no longer used may count; the allocator's cache stays, as it does in a job
        torch.cuda.reset_peak_memory_stats()
        torch.cuda.synchronize()
        began = time.perf_counter()
        result = work(*arguments, **named)
        torch.cuda.synchronize()
        return Cost(result, time.perf_counter() - began, torch.cuda.max_memory_allocated())

    def allocated(self) -> float | None:
        """Gigabytes of tensors on the device now."""
        return None if self.pretended else torch.cuda.memory_allocated() / 1e9

    def has_room(self, needed: int) -> bool:
        """Whether the device has these bytes, by the dry-run's rule."""
        return self.pretended or needed <= USABLE * torch.cuda.get_device_properties(0).total_memory

    # -- recipes and models -------------------------------------------------------------------------------------

    def recipe(self, name: str, *changes: str) -> Recipe:
        """A GPU recipe without evaluation points, on a tiny model if the run is tiny."""
        usual = ["train.eval_every=0"]
        if self.tiny:
            usual += [f"model.path={self.tiny_folder(TINY[name])}", f"model.max_sequence_length={T5_TOKENS}"]
            usual += [f"sample.{side}={pixels}" for side, pixels in SIZE.items()]
        return load_recipe(name, overrides=[*usual, *changes])

    def tiny_folder(self, family: str) -> Path:
        """The tiny random pipeline of a family, made at its first use."""
        folder = self.work / "models" / family
        return folder if (folder / "model_index.json").is_file() else FAMILIES[family](folder)

    def random_model(self, recipe: Recipe) -> FlowModel:
        """The recipe's model with random numbers, on the device."""
        return open_model(recipe, folder=self.random_folder(recipe))

    def random_folder(self, recipe: Recipe, changes: dict[str, Any] | None = None) -> RandomFolder:
        """The recipe's model folder with random numbers, made on the device, or on the CPU for a pretended one, whose
        parameters would pass for quantised ones.
        """
        device = torch.device("cpu") if self.pretended else torch.device("cuda", 0)
        return RandomFolder(open_folder(recipe.model.path), device, changes)

    def job(self, recipe: Recipe, *, run: str, model: FlowModel | None = None) -> Job:
        """A training of the recipe in the run folder of that name, on a random model unless one is given."""
        return Job(recipe, self.work / "runs" / run, self.random_model(recipe) if model is None else model)

    # -- the command line ---------------------------------------------------------------------------------------

    def gdro(self, *arguments: str | Path) -> subprocess.Popen[str]:
        """Start ``gdro`` with these arguments."""
        return start("-m", "tests.gpu.acceptance.gdro" if self.pretended else "gdro_cli", *arguments)

    @property
    def geneval(self) -> list[str]:
        """The settings that make ``geneval-fast`` tiny; none unless the run is."""
        small = ["prompts.train.count=12", "prompts.validation.count=2", "prompts.eval.count=4", "judge.kind=none"]
        small += ["sample.images_per_prompt=6", "reward.workers=1", "eval.images_per_prompt=1", "eval.bootstrap=100"]
        return sets(*small, "train.steps=4", "train.groups_per_step=2", "train.eval_every=0") if self.tiny else []


def start(*arguments: str | Path) -> subprocess.Popen[str]:
    """Start Python with these arguments."""
    command = [sys.executable, *map(str, arguments)]
    return subprocess.Popen(command, cwd=ROOT, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)


def end(process: subprocess.Popen[str]) -> tuple[int, str]:
    """Wait for a process: its exit code, and what it printed."""
    try:
        said, _ = process.communicate(timeout=LIMIT)
    finally:
        process.kill()
    return process.returncode, said


def sets(*changes: str) -> list[str]:
    """Recipe changes as options of the command line."""
    return [part for change in changes for part in ("--set", change)]


class Job:
    """A training as ``gdro train`` has it, but on invented groups.

    Args:
        recipe: what is trained, and how.
        run: the run folder.
        model: the recipe's model.
    """

    def __init__(self, recipe: Recipe, run: Path, model: FlowModel) -> None:
        run.mkdir(parents=True, exist_ok=True)
        self.recipe, self.model = recipe, model
        self.session = Session(recipe, run.parent, model=model)
        self.state = TrainingState(self.session, RunFolder(run))

    @cached_property
    def batch(self) -> GroupBatch:
        """The groups of a step."""
        return random_batch(self.session)

    @property
    def parameters(self) -> list[torch.nn.Parameter]:
        return self.state.parameters

    def disturb(self, size: float = 0.02) -> None:
        """Add random numbers to the adapter, which changes nothing when it is new."""
        with torch.no_grad():
            for number, p in enumerate(self.parameters):
                p.add_(size * torch.randn(p.shape, generator=generator(0, "adapter", number)).to(p.device))

    def gradient(self, recipe: Recipe | None = None, *, seed: int = 0) -> Tensor:
        """Add the gradient of a step, with the settings of ``recipe`` in place of the job's; returns the loss."""
        recipe = recipe or self.recipe
        step = GroupGradient(
            model=self.model,
            loss=loss_arguments(recipe.group_method),
            reduction=recipe.group_method.reduction,
            guidance=recipe.sample.guidance,
            size=self.session.image_size,
            micro_batch=recipe.train.micro_batch,
            one_pass=takes_one_pass(recipe),
            backward=self.session.engine.backward,
        )
        noise = draw_noise(self.batch, recipe.group_method, seed=seed)
        return step(noisy_groups(self.model, self.batch, noise)).loss

    def step(self, recipe: Recipe | None = None, *, seed: int = 0) -> float:
        """A whole optimizer step; returns the loss."""
        loss = self.gradient(recipe, seed=seed)
        self.state.update(self.recipe.train.lr)
        self.state.step += 1
        return float(loss)

    def flat_gradient(self, recipe: Recipe | None = None) -> Tensor:
        """The gradient of a step as one vector; the parameters have none afterwards."""
        self.gradient(recipe)
        flat = torch.cat([p.grad.flatten() for p in self.parameters if p.grad is not None])
        self.state.optimizer.zero_grad(set_to_none=True)
        return flat

    def checkpointing(self, share: float) -> None:
        """Recompute this share of the transformer's blocks in the backward pass."""
        transformer: Any = self.model.transformer
        transformer.disable_gradient_checkpointing()
        checkpoint_blocks(transformer, share)


def random_text(model: FlowModel, count: int) -> list[Conditioning]:
    """Conditionings as a store has them, of random numbers."""
    shapes = model.conditioning_shapes(model.max_sequence_length)
    return [
        {
            key: torch.randn(shape, generator=generator(number, "text", key)).to(model.dtype)
            for key, shape in shapes.items()
        }
        for number in range(count)
    ]


def random_batch(session: Session) -> GroupBatch:
    """Groups of random images, texts and rewards."""
    recipe, model, (height, width) = session.recipe, session.model, session.image_size
    groups, k = recipe.train.groups_per_step, recipe.group_method.k
    shape = (groups, k, *model.latent_shape(height=height, width=width))
    return GroupBatch(
        latents=torch.randn(shape, generator=generator(0, "latents")).to(model.dtype),
        rewards=torch.rand(groups, k, generator=generator(0, "rewards")),
        mask=torch.ones(groups, k, dtype=torch.bool),
        weights=torch.ones(groups),
        prompts=tuple(PromptRecord(id=str(number), prompt=f"prompt {number}") for number in range(groups)),
        image_indices=torch.arange(k).repeat(groups, 1),
        visits=(0,) * groups,
        conditioning=tuple(random_text(model, groups)),
    )


def sampler(model: FlowModel, recipe: Recipe, images: int) -> Callable[[int], Tensor]:
    """A function that draws the latents of a batch of images of random texts in a number of steps."""
    height, width = size_of(model, recipe)
    text, noise = random_text(model, images), model.noise(range(images), height=height, width=width)
    if model.guidance_kind == "cfg":
        model._unconditional = text[0]  # in place of the encoded empty prompt
    options = {"guidance": recipe.sample.guidance, "height": height, "width": width, "batch_size": images}
    return lambda steps: sample_latents(model, noise, text, steps=steps, **options)


def size_of(model: FlowModel, recipe: Recipe) -> tuple[int, int]:
    """Height and width in pixels."""
    height, width = recipe.sample.height, recipe.sample.width
    return model.default_size if height is None or width is None else (height, width)


def free() -> None:
    """Free the memory of models that are no longer used."""
    gc.collect()
    torch.cuda.empty_cache()
