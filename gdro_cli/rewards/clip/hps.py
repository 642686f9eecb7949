"""HPSv2's network: a CLIP ViT-H/14 of OpenCLIP, tuned on human preferences (arXiv 2306.09341)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from gdro_cli.errors import PrerequisiteError
from gdro_cli.model_source import weights_problem
from gdro_cli.rewards.clip.network import ClipNetwork, processor_files
from gdro_cli.rewards.pretrained import WeightFiles, pick_device

_MEAN = (0.48145466, 0.4578275, 0.40821073)
_STD = (0.26862954, 0.26130258, 0.27577711)
"""Of RGB, as CLIP was trained."""
_NAMES = {
    "positional_embedding": "text_model.embeddings.position_embedding.weight",
    "token_embedding.weight": "text_model.embeddings.token_embedding.weight",
    "visual.class_embedding": "vision_model.embeddings.class_embedding",
    "visual.conv1.weight": "vision_model.embeddings.patch_embedding.weight",
    "visual.positional_embedding": "vision_model.embeddings.position_embedding.weight",
    "logit_scale": "logit_scale",
}
"""OpenCLIP's name -> that of transformers."""
_PREFIXES = {
    "ln_final.": "text_model.final_layer_norm.",
    "transformer.resblocks.": "text_model.encoder.layers.",
    "visual.ln_pre.": "vision_model.pre_layrnorm.",
    "visual.ln_post.": "vision_model.post_layernorm.",
    "visual.transformer.resblocks.": "vision_model.encoder.layers.",
}
_LAYERS = {
    ".ln_1.": ".layer_norm1.",
    ".ln_2.": ".layer_norm2.",
    ".attn.out_proj.": ".self_attn.out_proj.",
    ".mlp.c_fc.": ".mlp.fc1.",
    ".mlp.c_proj.": ".mlp.fc2.",
}
_PROJECTIONS = {"visual.proj": "visual_projection.weight", "text_projection": "text_projection.weight"}
"""Matrices that OpenCLIP multiplies from the other side."""


class HpsNetwork(ClipNetwork):
    """HPSv2 as a CLIP of transformers.

    Args:
        model: folder or Hub id of the weights, with the names of OpenCLIP or of transformers.
        base: folder or Hub id of the CLIP that it was tuned from, for configuration and tokenizer.
        device: of the network; ``auto`` uses a GPU if there is one.

    Raises:
        PrerequisiteError: a model is missing.
        UserError: the base is not a CLIP.
    """

    def __init__(self, model: str, *, base: str, device: str = "auto") -> None:
        self._files = self._parts = processor_files(base, "reward.hpsv2.base")
        self._weights = WeightFiles(model, key="reward.hpsv2.model")
        self._device = device
        self._loaded = None

    @property
    def version(self) -> dict[str, Any]:
        """The weights' Hub id and commit or digest; the base's."""
        return {**self._weights.version, "base": super().version}

    def pixels(self, images: Sequence[Image.Image]) -> Tensor:
        """As HPSv2's code does: the longer side fits, the rest is black, and no part is cut off."""
        side = self._files.config["vision_config"]["image_size"]
        return torch.stack([_normalised(_fitted(image, side)) for image in images])

    def _load_network(self) -> Any:
        from transformers import CLIPConfig, CLIPModel

        source, weights = self._weights.source, named_as_in_transformers(self._weights.read())
        network = CLIPModel(CLIPConfig.from_dict(self._files.config))
        own = network.state_dict()
        problem = weights_problem(
            missing=own.keys() - weights.keys(),
            misshapen=[
                (name, weights[name].shape, tensor.shape)
                for name, tensor in own.items()
                if name in weights and weights[name].shape != tensor.shape
            ],
        )
        if problem is not None:
            raise PrerequisiteError(f"model {source.name} {problem}: {source.remedy}")
        network.load_state_dict({name: weights[name].float() for name in own})
        return network.eval().requires_grad_(False).to(pick_device(self._device))


def named_as_in_transformers(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Weights of OpenCLIP, under any prefix, as transformers names them; other weights as they are.

    OpenCLIP holds the projections of queries, keys and values in one matrix, and multiplies by the last projections
    from the other side.
    """
    first = "visual.conv1.weight"
    prefixes = [name.removesuffix(first) for name in weights if name.endswith(first)]
    if not prefixes:
        return dict(weights)
    named: dict[str, Tensor] = {}
    for full_name, tensor in weights.items():
        name = full_name.removeprefix(prefixes[0])
        if name in _PROJECTIONS:
            named[_PROJECTIONS[name]] = tensor.T.contiguous()
        elif name in _NAMES:
            named[_NAMES[name]] = tensor
        else:
            for old, new in _PREFIXES.items():
                if name.startswith(old):
                    name = new + name.removeprefix(old)
                    break
            for old, new in _LAYERS.items():
                name = name.replace(old, new)
            if ".attn.in_proj_" in name:
                layer, kind = name.split(".attn.in_proj_")
                for part, rows in zip("qkv", tensor.chunk(3), strict=True):
                    named[f"{layer}.self_attn.{part}_proj.{kind}"] = rows.contiguous()
            else:
                named[name] = tensor
    return named


def _fitted(image: Image.Image, side: int) -> Image.Image:
    """The image with its longer side resized to ``side``, in the middle of a black square."""
    scale = side / max(image.size)
    width, height = round(image.width * scale), round(image.height * scale)
    square = Image.new("RGB", (side, side))
    square.paste(image.resize((width, height), Image.Resampling.BICUBIC), ((side - width) // 2, (side - height) // 2))
    return square


def _normalised(image: Image.Image) -> Tensor:
    """[3, height, width] of an RGB image."""
    pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1).float() / 255
    return (pixels - torch.tensor(_MEAN)[:, None, None]) / torch.tensor(_STD)[:, None, None]
