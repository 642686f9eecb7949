"""A model without its weights: the real classes at full width on the meta device, from configurations only.

The blocks of a transformer are alike, so its counts (numbers, bytes kept for the backward pass, operations) are affine
in the number of blocks of each kind. Models of two or three blocks of a kind give the count at full depth
(``core.footprint.depth_plan``) in a fraction of the time.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from gdro_cli.core.footprint import Storage, Weights, depth_plan
from gdro_cli.errors import PrerequisiteError
from gdro_cli.models.base import FlowModel
from gdro_cli.models.diffusers_flow import DtypeName, load_flow_model
from gdro_cli.models.folder import PipelineFolder
from gdro_cli.models.published import PublishedFolder, published_name
from gdro_cli.models.trace import Work, metered, quantised_layers

_SHALLOW = 2
"""Blocks of a kind in the shallow models: the first and the last block can differ."""


class _Reconfigured(PipelineFolder):
    """A folder with another configuration of its transformer."""

    def __init__(self, folder: PipelineFolder, changes: dict[str, Any]) -> None:
        vars(self).update(vars(folder))
        self._original, self._changes = folder, changes

    def config(self, name: str, *, file: str = "config.json") -> dict[str, Any]:
        """A component's configuration."""
        return self._original.config(name, file=file) | (self._changes if name == "transformer" else {})


@dataclass(frozen=True, slots=True)
class ShallowModel:
    """A model of few blocks, and the coefficient of its counts in the count of the deep one."""

    times: int
    flow: FlowModel
    weights: Weights


@dataclass(frozen=True, slots=True)
class MetaModel:
    """A model as shallow models on the meta device whose counts, times their coefficients, add up to its own."""

    parts: tuple[ShallowModel, ...]
    text: Weights | None
    """Weights of all text encoders; None if a configuration is unknown."""
    vae: Weights | None
    """None if its configuration is unknown."""

    @property
    def flow(self) -> FlowModel:
        """One of the shallow models, for everything that does not depend on depth."""
        return self.parts[0].flow

    @property
    def transformer(self) -> Weights:
        """Weights of the whole transformer."""
        return sum((part.weights.times(part.times) for part in self.parts), Weights(0))


def open_folder(path: str) -> PipelineFolder:
    """Return the pipeline folder at a path or Hub id, or else the published configurations, or else fetch it.

    Raises:
        PrerequisiteError: the model is not on this machine, and no configuration of it is published here.
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


def meta_model(
    folder: PipelineFolder, *, dtype: DtypeName, max_sequence_length: int | None = None, storage: Storage = "none"
) -> MetaModel:
    """Build a pipeline's networks without numbers, the transformer at a few shallow depths.

    ``storage``: how the transformer's linear layers are stored, which decides what their passes unpack.

    Raises:
        PrerequisiteError: a configuration is missing.
        UserError: the family is unknown.
    """

    def on_meta(folder: PipelineFolder) -> FlowModel:
        return load_flow_model(folder, dtype=dtype, device="meta", max_sequence_length=max_sequence_length)

    whole, parts = on_meta(folder), []
    for times, depths in depth_plan(whole.depths(), shallow=_SHALLOW):
        shallow = _Reconfigured(folder, whole.at_depths(depths))
        flow = on_meta(shallow)
        flow.transformer = quantised_layers(shallow.meta_component("transformer", dtype=flow.dtype), storage)
        parts.append(ShallowModel(times, flow, count_weights(flow.transformer)))
    return MetaModel(tuple(parts), _frozen_weights(folder, "text_encoder"), _frozen_weights(folder, "vae"))


def _frozen_weights(folder: PipelineFolder, prefix: str) -> Weights | None:
    names = [name for name in folder.components if name.startswith(prefix)]
    try:
        counts = [count_weights(folder.meta_component(name)) for name in names]
    except PrerequisiteError:
        return None
    return sum(counts, Weights(0)) if counts else None


def count_weights(module: nn.Module) -> Weights:
    """Count the numbers of a network, tables without gradient included, shared ones once."""
    linear = {id(layer.weight): layer for layer in module.modules() if isinstance(layer, nn.Linear)}.values()
    tensors = {id(tensor): tensor for tensor in module.state_dict(keep_vars=True).values()}.values()
    return Weights(
        values=sum(tensor.numel() for tensor in tensors),
        linear=sum(layer.weight.numel() for layer in linear),
        outputs=sum(layer.out_features for layer in linear),
    )


def trace_decoding(model: MetaModel, images: int, *, height: int, width: int) -> Work | None:
    """Count a pass of the autoencoder's decoder on ``images`` at once; None if its configuration is unknown."""
    flow = model.flow
    if model.vae is None:
        return None
    vae = flow.folder.meta_component("vae", dtype=flow.dtype)
    shape = flow.latent_shape(height=height, width=width)
    latents = torch.empty(images, *shape, device="meta", dtype=flow.dtype)
    with torch.no_grad(), metered([*vae.parameters(), *vae.buffers()]) as meter:
        flow.pixels(vae, latents, height=height, width=width)
    return Work(meter.flops, meter.peak)
