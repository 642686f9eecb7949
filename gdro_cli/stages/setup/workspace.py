"""The folder that all stages share (``--out``), and how a recipe's inputs are found in it.

    <out>/stores/<task>-<digest>/    groups of images; named by what the images depend on
    <out>/runs/<recipe>-<digest>/    one training run; named by what the training depends on

So recipes that sample the same share one store, and no recipe can ever meet the store of another.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from gdro_cli.config.base import digest
from gdro_cli.config.recipe import Recipe
from gdro_cli.config.sections import PromptSource
from gdro_cli.core.seeds import seed_for
from gdro_cli.data.prompts import PromptSet, load_prompts
from gdro_cli.data.store import GroupStore
from gdro_cli.errors import UserError
from gdro_cli.models.backends import ComputeOptions
from gdro_cli.models.base import FlowModel
from gdro_cli.models.diffusers_flow import load_flow_model
from gdro_cli.models.folder import PipelineFolder
from gdro_cli.models.memory import MemoryOptions
from gdro_cli.runtime.distributed import Engine, Precision, make_engine
from gdro_cli.stages.setup.rewards import known_classes
from gdro_cli.tiny.assets import tiny_model_path

EMBEDDED = "tiny"


@dataclass(frozen=True, slots=True)
class SamplingPlan:
    """Everything that the images of a store depend on, beside the model and the prompts."""

    seed: int
    images_per_prompt: int
    steps: int
    guidance: float
    height: int
    width: int

    def image_seed(self, prompt_id: str, index: int) -> int:
        """Seed of the noise of image ``index`` of a prompt: no batch, shard or process enters it."""
        return seed_for(self.seed, "image", prompt_id, index)


def open_engine(recipe: Recipe, *, trackers: Sequence[str] = (), out: Path | None = None) -> Engine:
    """Join the processes of the job; see ``make_engine``."""
    return make_engine(trackers=trackers, out=out, precision=precision(recipe))


def precision(recipe: Recipe) -> Precision:
    """What matrix products are computed in: bfloat16 on CUDA unless the recipe says otherwise, float32 elsewhere."""
    return "bf16" if torch.cuda.is_available() and recipe.model.dtype in ("auto", "bfloat16") else "no"


def open_model(
    recipe: Recipe, *, device: str | None = None, engine: Engine | None = None, folder: PipelineFolder | None = None
) -> FlowModel:
    """Open the recipe's model, on the GPU if there is one; nothing is loaded until it is used.

    Args:
        recipe: names the model.
        device: where to run it instead.
        engine: the job's processes: the model runs on this one's device, sharded where the recipe says so.
        folder: the model's, where it has been opened already.

    Raises:
        PrerequisiteError: the model is not there.
        EndedElsewhere: the same, in another process.
    """
    if engine is not None:
        device = str(engine.device)
    with nullcontext() if engine is None else engine.together():
        model = load_flow_model(
            PipelineFolder(model_folder(recipe)) if folder is None else folder,
            dtype=recipe.model.dtype,
            device=device or ("cuda" if torch.cuda.is_available() else "cpu"),
            max_sequence_length=recipe.model.max_sequence_length,
            memory=memory_options(recipe),
            compute=ComputeOptions(recipe.model.compile, recipe.model.attention),
        )
    if engine is not None and recipe.model.sharding == "fsdp":
        model.place_transformer = engine.shard
    return model


def model_folder(recipe: Recipe) -> str:
    """Folder or Hub id of the recipe's model."""
    return str(tiny_model_path()) if recipe.model.path == EMBEDDED else recipe.model.path


def memory_options(recipe: Recipe) -> MemoryOptions:
    """What the recipe's model gives up for less memory."""
    model = recipe.model
    return MemoryOptions(model.quantization, model.offload, model.vae_slicing, model.vae_tiling)


def open_prompts(recipe: Recipe, source: PromptSource) -> PromptSet:
    """Load a prompt source of the recipe. Raises UserError for prompts that its reward cannot judge."""
    return load_prompts(source, task=recipe.prompts.task, classes=known_classes(recipe))


def refuse_online(recipe: Recipe, stage: str) -> None:
    """Raises UserError where ``gdro sample`` or ``gdro score`` has nothing to do."""
    if recipe.online_method is not None:
        raise UserError(
            f"the recipe {recipe.name} has nothing to {stage}: {recipe.method.name} makes and scores its images while"
            " it trains (gdro train)"
        )


def training_plan(recipe: Recipe, model: FlowModel) -> SamplingPlan:
    """How the groups of the training store are sampled."""
    height, width = image_size(recipe, model)
    sample = recipe.sample
    return SamplingPlan(recipe.seed, sample.images_per_prompt, sample.steps, sample.guidance, height, width)


def evaluation_plan(recipe: Recipe, model: FlowModel, *, images_per_prompt: int) -> SamplingPlan:
    """How pictures for an evaluation are sampled."""
    height, width = image_size(recipe, model)
    return SamplingPlan(recipe.eval.seed, images_per_prompt, recipe.eval_steps, recipe.eval_guidance, height, width)


def image_size(recipe: Recipe, model: FlowModel) -> tuple[int, int]:
    """Height and width in pixels."""
    if recipe.sample.height is None or recipe.sample.width is None:
        return model.default_size
    return recipe.sample.height, recipe.sample.width


def store_identity(
    recipe: Recipe, model: FlowModel, plan: SamplingPlan, prompts: PromptSet, *, weights: str = "base"
) -> dict[str, Any]:
    """What a store's images depend on, as JSON; ``weights`` names the adapter, if there is one."""
    reduced: dict[str, Any] = {}  # only where they are set, so that stores made before keep their names
    if recipe.model.quantization != "none":
        reduced["quantization"] = recipe.model.quantization
    if recipe.model.vae_tiling:
        reduced["vae_tiling"] = True
    return {
        "model": {key: value for key, value in model.identity.items() if key != "path"},  # wherever it lies
        "dtype": str(model.dtype).removeprefix("torch."),
        "max_sequence_length": recipe.model.max_sequence_length,
        "weights": weights,
        "prompts": prompts.digest,
        "seed": plan.seed,
        "images_per_prompt": plan.images_per_prompt,
        "steps": plan.steps,
        "guidance": plan.guidance,
        "height": plan.height,
        "width": plan.width,
        "image_format": recipe.sample.image_format,
        **reduced,
    }


def store_path(recipe: Recipe, folder: Path, identity: dict[str, Any]) -> Path:
    """Where the store of ``identity`` lies below ``folder``."""
    return folder / f"{recipe.prompts.task}-{digest(identity)}"


def open_store(
    recipe: Recipe,
    folder: Path,
    identity: dict[str, Any],
    prompts: PromptSet,
    plan: SamplingPlan,
    *,
    command: str = "gdro sample",
) -> GroupStore:
    """Make or open the store of ``identity`` below ``folder``; ``command`` makes its shards."""
    return GroupStore.create_or_open(
        store_path(recipe, folder, identity),
        identity=identity,
        prompts=prompts,
        images_per_prompt=plan.images_per_prompt,
        prompts_per_shard=recipe.sample.prompts_per_shard,
        image_format=recipe.sample.image_format,
        command=command,
    )


def stores_folder(workspace: Path) -> Path:
    """Folder of the stores made by base models."""
    return workspace / "stores"


def runs_folder(workspace: Path) -> Path:
    """Folder of the training runs."""
    return workspace / "runs"
