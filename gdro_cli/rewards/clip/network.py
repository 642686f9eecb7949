"""A CLIP network (arXiv 2103.00020) through transformers: images and texts to directions in one space."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from torch.nn.functional import normalize

from gdro_cli.rewards.pretrained import ModelFiles

_NEEDS = (("preprocessor_config.json", "processor_config.json"), ("tokenizer.json", "vocab.json"))
_IMAGES_AT_ONCE = 16


class ClipNetwork:
    """The network, its image processor and its tokenizer. Constructing one reads ``config.json`` and loads nothing.

    Args:
        model: Hub id, or a folder as ``save_pretrained`` writes it.
        key: the recipe's key that names the model, for error messages.
        processor: model whose image processor and tokenizer are used, and its key; ``None`` for those of ``model``.
        device: of the network; ``auto`` uses a GPU if there is one.

    Raises:
        PrerequisiteError: the model is missing.
        UserError: the model is not a CLIP.
    """

    def __init__(self, model: str, *, key: str, processor: tuple[str, str] | None = None, device: str = "auto") -> None:
        self._files = self._parts = ModelFiles(model, key=key, kind="clip", needs=() if processor else _NEEDS)
        if processor is not None:
            self._parts = processor_files(*processor)
        self._device = device
        self._loaded: tuple[Any, Any, Any] | None = None

    @property
    def version(self) -> dict[str, Any]:
        """The model's Hub id and commit or the digest of its files, and the version of transformers."""
        own = self._files.version
        return own if self._parts is self._files else {**own, "processor": self._parts.version}

    @property
    def width(self) -> int:
        """Numbers of a direction, D."""
        return int(self._files.config["projection_dim"])

    @property
    def logit_scale(self) -> float:
        """The factor of a cosine in CLIP's logits: ``exp`` of the network's parameter."""
        return float(self._network()[0].logit_scale.exp())

    def load(self) -> None:
        """Load the network; a second call does nothing. Raises ``PrerequisiteError``."""
        self._network()

    def embed_images(self, images: Sequence[Image.Image]) -> Tensor:
        """Directions of RGB images [N, D], rows of length 1. Raises ``PrerequisiteError``."""
        parts = [images[start : start + _IMAGES_AT_ONCE] for start in range(0, len(images), _IMAGES_AT_ONCE)]
        return torch.cat([self._embed_pixels(self.pixels(part)) for part in parts])

    def embed_texts(self, texts: Sequence[str]) -> Tensor:
        """Directions of texts [N, D], rows of length 1; a long text is cut off. Raises ``PrerequisiteError``."""
        network, _, tokenizer = self._network()
        length = network.config.text_config.max_position_embeddings
        tokens = tokenizer(list(texts), padding=True, truncation=True, max_length=length, return_tensors="pt")
        with torch.inference_mode():
            return normalize(network.get_text_features(**tokens.to(network.device)).pooler_output, dim=-1)

    def pixels(self, images: Sequence[Image.Image]) -> Tensor:
        """The network's input [N, 3, height, width] of RGB images of any sizes."""
        _, processor, _ = self._network()
        return torch.cat([processor(images=image, return_tensors="pt")["pixel_values"] for image in images])

    def _embed_pixels(self, pixels: Tensor) -> Tensor:
        network, _, _ = self._network()
        with torch.inference_mode():
            return normalize(network.get_image_features(pixels.to(network.device)).pooler_output, dim=-1)

    def _network(self) -> tuple[Any, Any, Any]:
        if self._loaded is None:
            from transformers import CLIPTokenizer
            from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

            processor = self._parts.load_part(CLIPImageProcessorPil)
            self._loaded = self._load_network(), processor, self._parts.load_part(CLIPTokenizer)
        return self._loaded

    def _load_network(self) -> Any:
        from transformers import CLIPModel

        return self._files.load_model(CLIPModel, device=self._device)

    def __getstate__(self) -> dict[str, Any]:
        """Everything but the loaded network, so that a reward can be sent to a worker process."""
        return {**self.__dict__, "_loaded": None}


def processor_files(model: str, key: str) -> ModelFiles:
    """The files of a CLIP whose configuration, image processor and tokenizer are used, and no weights.

    Raises:
        PrerequisiteError: the model is missing.
        UserError: the model is not a CLIP.
    """
    return ModelFiles(model, key=key, kind="clip", needs=_NEEDS, weights=False)
