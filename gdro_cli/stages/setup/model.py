"""The recipe's model: where it is, how it is opened, and its adapter."""

from __future__ import annotations

from pathlib import Path

import torch

from gdro_cli.config.recipe import Recipe
from gdro_cli.embedded import tiny_model_path
from gdro_cli.errors import PrerequisiteError, StoreError, UserError
from gdro_cli.models.adapters import attach_lora
from gdro_cli.models.backends import ComputeOptions
from gdro_cli.models.base import FlowModel
from gdro_cli.models.diffusers_flow import load_flow_model
from gdro_cli.models.folder import PipelineFolder
from gdro_cli.models.initial_adapter import InitialAdapter
from gdro_cli.models.lora_files import read_adapter
from gdro_cli.models.memory import MemoryOptions
from gdro_cli.runtime.distributed import Engine

EMBEDDED = "tiny"
"""The ``model.path`` of the model inside the package."""


def model_folder(recipe: Recipe) -> str:
    """Folder or Hub id of the recipe's model."""
    return str(tiny_model_path()) if recipe.model.path == EMBEDDED else recipe.model.path


def open_model(recipe: Recipe, *, engine: Engine | None = None, folder: PipelineFolder | None = None) -> FlowModel:
    """Open the recipe's model; its components are loaded when they are first used.

    Args:
        recipe: names the model.
        engine: the job's processes. The model runs on this process's device, sharded if the recipe says so. Default:
            the GPU if there is one.
        folder: the model's folder, if the caller has already opened it.

    Raises:
        PrerequisiteError: the model or the initial adapter is missing.
        StoreError, UserError: as ``initial_adapter``.
    """
    section = recipe.model
    folder = folder or PipelineFolder(model_folder(recipe))
    model = load_flow_model(
        folder,
        dtype=section.dtype,
        device=str(engine.device) if engine else "cuda" if torch.cuda.is_available() else "cpu",
        max_sequence_length=section.max_sequence_length,
        memory=MemoryOptions(section.quantization, section.offload, section.vae_slicing, section.vae_tiling),
        compute=ComputeOptions(section.compile, section.attention),
    )
    if engine and section.sharding == "fsdp":
        model.place_transformer = engine.shard
    model.initial = initial_adapter(recipe, folder)
    return model


def initial_adapter(recipe: Recipe, folder: PipelineFolder) -> InitialAdapter | None:
    """The adapter that the recipe's training starts from, which fits the model in ``folder``; None without one.

    Raises:
        PrerequisiteError: its file is missing.
        StoreError: the file is damaged.
        UserError: it is of an unknown kind, or does not fit.
    """
    path = recipe.train.lora.init
    if path is None:
        return None
    try:
        adapter = InitialAdapter(Path(path), read_adapter(Path(path)).folded())
        adapter.check(folder.meta_component("transformer"))
    except (PrerequisiteError, StoreError, UserError) as error:
        raise type(error)(f"train.lora.init: {error}") from error
    return adapter


def attach_adapter(recipe: Recipe, model: FlowModel) -> list[torch.nn.Parameter]:
    """Give the model the recipe's adapter, freshly initialised, and return its parameters."""
    lora = recipe.train.lora
    return attach_lora(
        model, rank=lora.rank, alpha=lora.alpha, targets=lora.targets, rslora=lora.rslora, seed=recipe.train_seed
    )
