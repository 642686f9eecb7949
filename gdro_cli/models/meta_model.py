"""A model without its weights: the real classes at full width on the meta device, from configurations alone.

The blocks of a transformer are alike, so what is counted on it (numbers, bytes kept for the backward pass, operations)
is affine in how many there are of each kind. Models of two or three blocks of a kind give the count at full depth
(``core.footprint.depth_plan``) in a fraction of the time.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from gdro_cli.core.footprint import Weights, depth_plan
from gdro_cli.errors import PrerequisiteError
from gdro_cli.models.diffusers_flow import DtypeName, flow_of
from gdro_cli.models.family import DiffusersFlow
from gdro_cli.models.folder import PipelineFolder
from gdro_cli.models.published import PublishedFolder, published_name
from gdro_cli.models.trace import Work, metered

_SHALLOW = 2
"""Blocks of a kind in the models that are built: first, middle and last ones can differ."""


class _Reconfigured(PipelineFolder):
    """A folder with another configuration of its transformer, and no weights."""

    def __init__(self, folder: PipelineFolder, changes: dict[str, Any]) -> None:
        self.path = folder.path
        self._index, self._folder, self._changes = folder._index, folder, changes

    def config(self, name: str, *, file: str = "config.json") -> dict[str, Any]:
        """A component's configuration."""
        changes = self._changes if name == "transformer" else {}
        return {**self._folder.config(name, file=file), **changes}


@dataclass(frozen=True, slots=True)
class Part:
    """A shallow model, and how often what is counted on it enters the count of the deep one."""

    times: int
    flow: DiffusersFlow
    weights: Weights


@dataclass(frozen=True, slots=True)
class BlankModel:
    """A model as shallow ones on the meta device whose counts, multiplied and added up, are its own."""

    parts: tuple[Part, ...]
    text: Weights | None
    """Of all text encoders together; None where their configuration is not known."""
    vae: Weights | None
    """None where its configuration is not known."""

    @property
    def flow(self) -> DiffusersFlow:
        """One of the models, for everything that does not depend on depth."""
        return self.parts[0].flow

    @property
    def transformer(self) -> Weights:
        """Of the whole transformer."""
        return sum((part.weights.times(part.times) for part in self.parts), Weights(0))


def open_folder(path: str) -> PipelineFolder:
    """The pipeline folder at a path or Hub id, or what is published about it; fetches only what is neither.

    Raises:
        PrerequisiteError: the model is not here, and nothing is known about it.
    """
    name = published_name(path)
    try:
        folder = PipelineFolder(path, fetch=name is None)
        for part in ("transformer", "vae"):
            folder.config(part)
    except PrerequisiteError:
        if name is None:
            raise
        return PublishedFolder(name, path=path)
    return folder


def blank_model(folder: PipelineFolder, *, dtype: DtypeName, max_sequence_length: int | None = None) -> BlankModel:
    """Build a pipeline's networks without numbers, the transformer at a few depths instead of its own.

    Raises:
        PrerequisiteError: a configuration is missing.
        UserError: the family is unknown.
    """
    whole = flow_of(folder, dtype=dtype, device="meta", max_sequence_length=max_sequence_length)
    parts = []
    for times, depths in depth_plan(whole.depths(), shallow=_SHALLOW):
        shallow = _Reconfigured(folder, whole.at_depths(depths))
        flow = flow_of(shallow, dtype=dtype, device="meta", max_sequence_length=max_sequence_length)
        transformer = blank_component(shallow, "transformer", dtype=flow.dtype)
        flow.transformer = transformer
        parts.append(Part(times, flow, count_weights(transformer)))
    return BlankModel(tuple(parts), _text_weights(folder), _vae_weights(folder))


def _text_weights(folder: PipelineFolder) -> Weights | None:
    encoders = [name for name in folder.components if name.startswith("text_encoder")]
    try:
        found = [count_weights(blank_component(folder, name)) for name in encoders]
    except PrerequisiteError:
        return None
    return sum(found, Weights(0)) if found else None


def _vae_weights(folder: PipelineFolder) -> Weights | None:
    return count_weights(blank_component(folder, "vae")) if "vae" in folder.components else None


def blank_component(folder: PipelineFolder, name: str, *, dtype: torch.dtype = torch.float32) -> nn.Module:
    """Build a component on the meta device by its class and configuration, frozen.

    Raises:
        PrerequisiteError: one of them is missing.
        UserError: the class comes from a library that is not loaded.
    """
    cls: Any = folder.component_class(name)
    config = {key: value for key, value in folder.config(name).items() if not key.startswith("_")}
    with torch.device("meta"):
        transformers = getattr(cls, "config_class", None)
        module: nn.Module = cls.from_config(config) if transformers is None else cls(transformers.from_dict(config))
    # torch's own method: that of diffusers warns of layers which are to stay in float32 where there are none
    return nn.Module.to(module, dtype=dtype).eval().requires_grad_(False)


def count_weights(module: nn.Module) -> Weights:
    """How many numbers a network holds, shared ones and tables without gradient counted once."""
    linear = {id(layer.weight): layer for layer in module.modules() if isinstance(layer, nn.Linear)}.values()
    return Weights(
        values=sum(
            tensor.numel() for tensor in {id(t): t for t in module.state_dict(keep_vars=True).values()}.values()
        ),
        linear=sum(layer.weight.numel() for layer in linear),
        outputs=sum(layer.out_features for layer in linear),
        largest=max((layer.weight.numel() for layer in linear), default=0),
    )


def trace_decoding(model: BlankModel, images: int, *, height: int, width: int) -> Work | None:
    """The autoencoder's decoder on so many images at once; None where its configuration is not known."""
    flow = model.flow
    if model.vae is None:
        return None
    vae = blank_component(flow.folder, "vae", dtype=flow.dtype)
    shape = flow.latent_shape(height=height, width=width)
    latents = torch.empty(images, *shape, device="meta", dtype=flow.dtype)
    with torch.no_grad(), metered([*vae.parameters(), *vae.buffers()]) as meter:
        flow.pixels(vae, latents, height=height, width=width)
    return Work(meter.flops, meter.peak)
