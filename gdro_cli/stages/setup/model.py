"""The recipe's model: where it lies, how it is opened, and its adapter."""

from __future__ import annotations

import torch

from gdro_cli.config.recipe import Recipe
from gdro_cli.embedded import tiny_model_path
from gdro_cli.models.adapters import attach_lora
from gdro_cli.models.backends import ComputeOptions
from gdro_cli.models.base import FlowModel
from gdro_cli.models.diffusers_flow import load_flow_model
from gdro_cli.models.folder import PipelineFolder
from gdro_cli.models.memory import MemoryOptions
from gdro_cli.runtime.distributed import Engine, Precision

EMBEDDED = "tiny"
"""The ``model.path`` of the model inside the package."""


def precision(recipe: Recipe) -> Precision:
    """Precision of matrix products: bfloat16 on CUDA unless the recipe says otherwise, float32 elsewhere."""
    return "bf16" if torch.cuda.is_available() and recipe.model.dtype in ("auto", "bfloat16") else "no"


def model_folder(recipe: Recipe) -> str:
    """Folder or Hub id of the recipe's model."""
    return str(tiny_model_path()) if recipe.model.path == EMBEDDED else recipe.model.path


def memory_options(recipe: Recipe) -> MemoryOptions:
    """What the recipe's model gives up for less memory."""
    model = recipe.model
    return MemoryOptions(model.quantization, model.offload, model.vae_slicing, model.vae_tiling)


def open_model(recipe: Recipe, *, engine: Engine | None = None, folder: PipelineFolder | None = None) -> FlowModel:
    """Open the recipe's model; its components are loaded when they are first used.

    Args:
        recipe: names the model.
        engine: the job's processes. The model runs on this process's device, sharded where the recipe says so.
            Without one it runs on the GPU if there is one.
        folder: the model's folder, where the caller has opened it already.

    Raises:
        PrerequisiteError: the model is missing.
    """
    model = load_flow_model(
        folder or PipelineFolder(model_folder(recipe)),
        dtype=recipe.model.dtype,
        device=str(engine.device) if engine else "cuda" if torch.cuda.is_available() else "cpu",
        max_sequence_length=recipe.model.max_sequence_length,
        memory=memory_options(recipe),
        compute=ComputeOptions(recipe.model.compile, recipe.model.attention),
    )
    if engine and recipe.model.sharding == "fsdp":
        model.place_transformer = engine.shard
    return model


def attach_adapter(recipe: Recipe, model: FlowModel) -> list[torch.nn.Parameter]:
    """Give the model the recipe's adapter, freshly initialised, and return its parameters."""
    lora = recipe.train.lora
    return attach_lora(
        model, rank=lora.rank, alpha=lora.alpha, targets=lora.targets, rslora=lora.rslora, seed=recipe.train_seed
    )
