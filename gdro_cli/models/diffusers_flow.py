"""Load a flow model of the family that the folder's pipeline class determines."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import torch

from gdro_cli.errors import UserError
from gdro_cli.models.backends import ComputeOptions
from gdro_cli.models.base import FlowModel
from gdro_cli.models.families.chroma import ChromaFlow
from gdro_cli.models.families.flux import FluxFlow
from gdro_cli.models.families.flux2 import Flux2Flow
from gdro_cli.models.families.flux2_klein import Flux2KleinFlow
from gdro_cli.models.families.flux_kontext import FluxKontextFlow
from gdro_cli.models.families.hidream import HiDreamFlow
from gdro_cli.models.families.lumina2 import Lumina2Flow
from gdro_cli.models.families.qwen_image import QwenImageFlow
from gdro_cli.models.families.qwen_image_edit import QwenImageEditFlow
from gdro_cli.models.families.qwen_image_edit_plus import QwenImageEditPlusFlow
from gdro_cli.models.families.sana import SanaFlow
from gdro_cli.models.families.sd3 import StableDiffusion3Flow
from gdro_cli.models.families.z_image import ZImageFlow
from gdro_cli.models.folder import PipelineFolder
from gdro_cli.models.memory import MemoryOptions

FAMILIES: dict[str, type[FlowModel]] = {
    "ChromaPipeline": ChromaFlow,
    "FluxPipeline": FluxFlow,
    "FluxKontextPipeline": FluxKontextFlow,
    "Flux2Pipeline": Flux2Flow,
    "Flux2KleinPipeline": Flux2KleinFlow,
    "HiDreamImagePipeline": HiDreamFlow,
    "Lumina2Pipeline": Lumina2Flow,
    "QwenImagePipeline": QwenImageFlow,
    "QwenImageEditPipeline": QwenImageEditFlow,
    "QwenImageEditPlusPipeline": QwenImageEditPlusFlow,
    "SanaPipeline": SanaFlow,
    "StableDiffusion3Pipeline": StableDiffusion3Flow,
    "ZImagePipeline": ZImageFlow,
}
"""Pipeline class in ``model_index.json`` -> family. A new family is one file and one row here."""

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}

DtypeName = Literal["auto", "float32", "bfloat16"]


def load_flow_model(
    model: str | Path | PipelineFolder,
    *,
    dtype: DtypeName = "auto",
    device: torch.device | str = "cpu",
    max_sequence_length: int | None = None,
    memory: MemoryOptions | None = None,
    compute: ComputeOptions | None = None,
) -> FlowModel:
    """Open a model in its family; components are loaded when they are first used.

    Args:
        model: an opened pipeline folder, its path, or a Hub id (whose files are fetched when needed).
        dtype: dtype of the weights; auto = bfloat16 on CUDA, float32 elsewhere.
        device: where the model runs.
        max_sequence_length: text tokens per prompt; None takes the model's own.
        memory: how to save memory; None saves none.
        compute: how the transformer is computed; None takes the defaults.

    Raises:
        PrerequisiteError: the model is not on this machine; the message says what to fetch.
        UserError: the pipeline is of an unknown family.
    """
    folder = model if isinstance(model, PipelineFolder) else PipelineFolder(model)
    target = torch.device(device)
    if dtype == "auto":
        dtype = "bfloat16" if target.type == "cuda" else "float32"
    family = FAMILIES.get(folder.pipeline)
    if family is None:
        raise UserError(
            f"model {folder.path} is a {folder.pipeline or 'folder without a pipeline class'}, which is not supported: "
            f"choose one of {', '.join(FAMILIES)} (docs/models.md)"
        )
    return family(
        folder,
        device=target,
        dtype=_DTYPES[dtype],
        max_sequence_length=max_sequence_length,
        memory=memory,
        compute=compute,
    )
