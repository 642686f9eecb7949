"""GenEval's colours: CLIP (arXiv 2103.00020) names the colour of an object on a grey background.

The original runs OpenCLIP's copy of OpenAI's ViT-L/14 in mixed half precision on a GPU; this is transformers' copy of
the same weights in float32.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from torch.nn.functional import normalize

from gdro_cli.core.geneval import COLOURS
from gdro_cli.rewards.clip.network import ClipNetwork
from gdro_cli.rewards.geneval.detection import Detection

MODEL = "openai/clip-vit-large-patch14"
KEY = "reward.geneval.colour_model"
RULE = "geneval-clip-1"
"""Name of the rule in the provenance; it changes whenever the same object would get another colour."""
TEMPLATES = ("a photo of a {colour} {label}", "a photo of a {colour}-colored {label}", "a photo of a {colour} object")
GREY = (0x99, 0x99, 0x99)
"""RGB of every pixel outside the object."""

_CROPS_AT_ONCE = 16


class ClipColours:
    """Names colours by the similarity of an object's image to sentences that name a colour.

    Args:
        model: Hub id, or a folder as ``save_pretrained`` of model, image processor and tokenizer writes it.
        device: of the network; ``auto`` uses a GPU if there is one.

    Raises:
        PrerequisiteError: the model is missing.
        UserError: the model is not a CLIP.
    """

    def __init__(self, model: str = MODEL, *, device: str = "auto") -> None:
        self._network = ClipNetwork(model, key=KEY, device=device)
        self._classifiers: dict[str, Tensor] = {}

    @property
    def version(self) -> Mapping[str, Any]:
        """Provenance: model and its commit or digest, transformers' version, rule."""
        return {"colours": "clip", "rule": RULE, **self._network.version}

    def load(self) -> None:
        """Load the network; a second call does nothing. Raises ``PrerequisiteError``."""
        self._network.load()

    def classify(self, image: Image.Image, objects: Sequence[Detection]) -> list[str]:
        """The colour of each object of one RGB image, one of ``core.geneval.COLOURS``.

        Raises:
            PrerequisiteError: the network cannot be loaded.
            ValueError: a mask does not have the image's size.
        """
        names: list[str] = []
        for start in range(0, len(objects), _CROPS_AT_ONCE):
            batch = objects[start : start + _CROPS_AT_ONCE]
            crops = self._network.embed_images([cut_out(image, item) for item in batch])
            sentences = torch.stack([self.classifier(item.label) for item in batch])
            similarity = torch.einsum("nd,ncd->nc", crops, sentences)
            names += [COLOURS[index] for index in similarity.argmax(dim=1).tolist()]
        return names

    def classifier(self, label: str) -> Tensor:
        """Directions of the colours for a class, [10, D] with rows of length 1: the mean over the templates; cached."""
        if label not in self._classifiers:
            texts = [template.format(colour=colour, label=label) for colour in COLOURS for template in TEMPLATES]
            directions = self._network.embed_texts(texts).unflatten(0, (len(COLOURS), len(TEMPLATES)))
            self._classifiers[label] = normalize(directions.mean(dim=1), dim=-1)
        return self._classifiers[label]

    def __getstate__(self) -> dict[str, Any]:
        """Everything but the cached directions, so that a classifier can be sent to a worker process."""
        return {**self.__dict__, "_classifiers": {}}


def cut_out(image: Image.Image, item: Detection) -> Image.Image:
    """An object of an RGB image on grey, cropped to its box (rounded, inside the image, at least one pixel).

    Raises ValueError if the mask does not have the image's size.
    """
    if item.mask.shape != (image.height, image.width):
        raise ValueError(f"the mask is {item.mask.shape}, the image {(image.height, image.width)} (height, width)")
    on_grey = Image.composite(image, Image.new("RGB", image.size, GREY), Image.fromarray(item.mask))
    left, top, right, bottom = (round(edge) for edge in item.box)
    left, top = min(max(left, 0), image.width - 1), min(max(top, 0), image.height - 1)
    return on_grey.crop((left, top, max(left + 1, min(right, image.width)), max(top + 1, min(bottom, image.height))))
