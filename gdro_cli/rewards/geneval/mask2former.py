"""GenEval's detector: Mask2Former with a Swin-S backbone, trained on COCO's instance masks (arXiv 2112.01527).

GenEval runs mmdet's copy. The weights here are the model authors' own. The processing around the network is mmdet's,
which differs from transformers' on both sides:

* Input: transformers' settings for this model squash every image to 384 x 384. mmdet keeps the aspect ratio: shorter
  side 800, longer side at most 1333, padded at the right and the bottom to multiples of 32.
* Output: ``post_process_instance_segmentation`` resizes the mask logits of the padded input to 384 x 384, computes
  masks and scores there, and enlarges the masks by nearest neighbour, padding included. mmdet enlarges the logits to
  the input, cuts off the padding, resizes to the image, and only then computes masks and scores; so does
  ``instances``. For an unpadded input and a 384 x 384 image both give the same result.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from torch.nn.functional import interpolate, pad

from gdro_cli.core.geneval import RENAMED
from gdro_cli.errors import UserError
from gdro_cli.rewards.geneval.detection import Detection, mask_box
from gdro_cli.rewards.pretrained import ModelFiles

MODEL = "facebook/mask2former-swin-small-coco-instance"
KEY = "reward.geneval.detector_model"
RULE = "mmdet-instance-1"
"""Name of the processing in the provenance; it changes whenever the same image would be detected differently."""

SHORT_SIDE, LONG_SIDE = 800, 1333
"""Pixels: an image is scaled until its shorter or its longer side reaches that size, whichever comes first."""
DIVISOR = 32
"""Sides of the network's input are multiples of this."""
TOP = 100
"""Pairs of query and class that can be objects: those with the best class scores."""


@dataclass(frozen=True, slots=True)
class Frame:
    """Sizes (height, width) in pixels, from the image to the network's input."""

    image: tuple[int, int]
    scaled: tuple[int, int]
    padded: tuple[int, int]

    @classmethod
    def of(cls, image: Image.Image, *, sides: tuple[int, int] = (SHORT_SIDE, LONG_SIDE)) -> Frame:
        """The sizes for an image; ``sides`` = (shorter, longest allowed longer side)."""
        height, width = image.height, image.width
        factor = min(sides[0] / min(height, width), sides[1] / max(height, width))
        scaled = max(1, int(height * factor + 0.5)), max(1, int(width * factor + 0.5))
        padded = math.ceil(scaled[0] / DIVISOR) * DIVISOR, math.ceil(scaled[1] / DIVISOR) * DIVISOR
        return cls((height, width), scaled, padded)


class Mask2FormerDetector:
    """Finds objects of the classes of a Mask2Former for instance segmentation.

    Args:
        model: Hub id, or a folder as ``save_pretrained`` writes it.
        device: of the network; ``auto`` uses a GPU if there is one.
        sides: pixels of the network's input, (shorter side, longest allowed longer side).

    Raises:
        PrerequisiteError: the model is missing.
        UserError: the model is not a Mask2Former with class names.
    """

    def __init__(
        self, model: str = MODEL, *, device: str = "auto", sides: tuple[int, int] = (SHORT_SIDE, LONG_SIDE)
    ) -> None:
        self._files = ModelFiles(model, key=KEY, kind="mask2former")
        self._labels = class_names(self._files.config, model=str(model))
        self.classes = tuple(dict.fromkeys(self._labels))
        """The classes that the model can find, in GenEval's spelling and the model's order."""
        self._device = device
        self._sides = sides
        self._loaded: tuple[Any, Any] | None = None

    @property
    def version(self) -> Mapping[str, Any]:
        """Provenance: model and its commit or digest, transformers' version, processing and its sizes."""
        sizes = {"short_side": self._sides[0], "long_side": self._sides[1], "divisor": DIVISOR, "top": TOP}
        return {"detector": "mask2former", "rule": RULE, **self._files.version, **sizes}

    def load(self) -> None:
        """Load the network; a second call does nothing. Raises ``PrerequisiteError``."""
        self._network()

    def detect(self, images: Sequence[Image.Image], *, minimum: float) -> list[list[Detection]]:
        """The objects of each RGB image with a confidence above ``minimum``, the most confident first.

        Images of the same size share a forward pass. The network has no mask for padding, so an image padded to the
        size of a larger one would be detected differently.

        Raises:
            PrerequisiteError: the network cannot be loaded.
        """
        network, processor = self._network()
        indices_of: dict[Frame, list[int]] = {}
        for index, image in enumerate(images):
            indices_of.setdefault(Frame.of(image, sides=self._sides), []).append(index)
        objects: dict[int, list[Detection]] = {}
        for frame, indices in indices_of.items():
            pixels = _pixels([images[index] for index in indices], frame, processor=processor)
            with torch.inference_mode():
                output = network(pixel_values=pixels.to(network.device))
                logits = zip(indices, output.class_queries_logits, output.masks_queries_logits, strict=True)
                for index, classes, masks in logits:
                    objects[index] = instances(classes, masks, frame=frame, labels=self._labels, minimum=minimum)
        return [objects[index] for index in range(len(images))]

    def _network(self) -> tuple[Any, Any]:
        if self._loaded is None:
            from transformers import Mask2FormerForUniversalSegmentation
            from transformers.models.mask2former.image_processing_pil_mask2former import Mask2FormerImageProcessorPil

            processor = self._files.load_part(Mask2FormerImageProcessorPil)
            network = self._files.load_model(Mask2FormerForUniversalSegmentation, device=self._device)
            self._loaded = network, processor
        return self._loaded

    def __getstate__(self) -> dict[str, Any]:
        """Everything but the loaded network, so that a detector can be sent to a worker process."""
        return {**self.__dict__, "_loaded": None}


def class_names(config: Mapping[str, Any], *, model: str) -> tuple[str, ...]:
    """The name of each class index, in GenEval's spelling. Raises ``UserError`` if the model does not name them."""
    labels = config.get("id2label")
    if not isinstance(labels, dict) or not labels or set(labels) != {str(index) for index in range(len(labels))}:
        raise UserError(
            f"`{KEY}` names {model}, whose config.json does not name its classes from 0 on as id2label: "
            f"choose a model such as {MODEL}"
        )
    names = [str(labels[str(index)]) for index in range(len(labels))]
    return tuple(RENAMED.get(name, name) for name in names)


def instances(
    class_logits: Tensor, mask_logits: Tensor, *, frame: Frame, labels: Sequence[str], minimum: float
) -> list[Detection]:
    """Turn the network's output for one image into objects, as mmdet's head for instance segmentation does.

    Of all pairs of query and class, the ``TOP`` with the best class scores are objects, so one query can give objects
    of several classes. Confidence = class score x mean probability of the pixels in the mask; objects may overlap.

    Args:
        class_logits: [Q, C + 1]; the last class is "nothing".
        mask_logits: [Q, h, w] over the padded input.
        frame: the sizes of image and input.
        labels: names of the C classes.
        minimum: the confidence that an object must exceed.

    Returns:
        Objects with a mask of at least one pixel, the most confident first.
    """
    scores = class_logits.float().softmax(dim=-1)[:, :-1]
    best, pairs = scores.flatten().topk(min(TOP, scores.numel()))
    likely = best > minimum  # a mask can only lower the confidence, so the others need no mask
    best, pairs = best[likely], pairs[likely]
    if not len(pairs):
        return []
    queries, which = (pairs // scores.shape[1]).unique(return_inverse=True)
    logits = _to_image(mask_logits[queries].float(), frame)
    masks = logits > 0
    inside = (logits.sigmoid() * masks).flatten(1).sum(dim=1) / (masks.flatten(1).sum(dim=1) + 1e-6)
    confidences = (best * inside[which]).tolist()
    classes, masks_of = (pairs % scores.shape[1]).tolist(), which.tolist()
    arrays = masks.cpu().numpy()
    objects = []
    for number in sorted(range(len(confidences)), key=lambda number: -confidences[number]):
        mask = arrays[masks_of[number]]
        box = mask_box(mask)
        if confidences[number] > minimum and box is not None:
            objects.append(Detection(labels[classes[number]], min(confidences[number], 1.0), box, mask))
    return objects


def _to_image(logits: Tensor, frame: Frame) -> Tensor:
    """Mask logits [Q, h, w] of the padded input -> [Q, H, W] of the image."""
    height, width = frame.scaled
    padded = interpolate(logits[None], size=frame.padded, mode="bilinear", align_corners=False)
    return interpolate(padded[..., :height, :width], size=frame.image, mode="bilinear", align_corners=False)[0]


def _pixels(images: Sequence[Image.Image], frame: Frame, *, processor: Any) -> Tensor:
    """RGB images of one size as the network's input [N, 3, H, W], normalised with the model's mean and deviation."""
    height, width = frame.scaled
    inputs = processor(
        images=list(images),
        do_resize=True,
        size={"height": height, "width": width},
        size_divisor=0,  # transformers would stretch the image to a multiple; mmdet pads
        resample=Image.Resampling.BILINEAR,
        return_tensors="pt",
    )
    return pad(inputs["pixel_values"], (0, frame.padded[1] - width, 0, frame.padded[0] - height))
