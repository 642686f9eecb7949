"""A small detector: a segmentation network, and the connected components of its foreground.

The network labels each pixel with a class or as background. It is trained on masks that are one pixel smaller than the
objects, so that neighbours stay apart. Each connected piece of foreground is one object; its mask is the piece grown by
that pixel. A detector is a folder with ``config.json`` (class names, widths) and ``model.safetensors``;
``python -m gdro_cli.tiny.train_detector`` makes one.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from safetensors.torch import load_file
from scipy import ndimage
from torch import Tensor, nn
from torch.nn import functional

from gdro_cli.files import sha256_file
from gdro_cli.rewards.geneval.detection import Detection, mask_box
from gdro_cli.rewards.layers import ResidualBlock, to_pixels

POSTPROCESSING = "components-1"
"""Name of the processing after the network; it changes whenever the same network would find other objects."""
FOREGROUND = 0.5  # probability from which a pixel belongs to an object
MARGIN = 1  # pixels by which the learnt masks are smaller than the objects
SMALLEST = 16  # pixels of foreground; smaller pieces are ignored
STRIDE = 8  # height and width of an image must be multiples of this
_BATCH = 32


class SegmentationNetwork(nn.Module):
    """Pixels [N, 3, H, W] in [-1, 1] -> class logits [N, 1 + classes, H, W]; class 0 is background.

    A U-Net over the resolutions 1/2, 1/4 and 1/8; pixels are moved into channels instead of pooled.
    """

    def __init__(self, classes: int, widths: Sequence[int] = (32, 64, 96)) -> None:
        super().__init__()
        high, middle, low = widths
        self.to_high = nn.Conv2d(3 * 4, high, 3, padding=1)
        self.to_middle = nn.Conv2d(high * 4, middle, 1)
        self.to_low = nn.Conv2d(middle * 4, low, 1)
        self.high, self.middle, self.low = (
            ResidualBlock(high),
            ResidualBlock(middle),
            nn.Sequential(ResidualBlock(low), ResidualBlock(low)),
        )
        self.from_low = nn.Conv2d(low, middle * 4, 1)
        self.from_middle = nn.Conv2d(middle, high * 4, 1)
        self.middle_again, self.high_again = ResidualBlock(middle), ResidualBlock(high)
        self.head = nn.Conv2d(high, (1 + classes) * 4, 3, padding=1)

    def forward(self, pixels: Tensor) -> Tensor:
        """Logits of every pixel."""
        shrink, grow = functional.pixel_unshuffle, functional.pixel_shuffle
        high = self.high(self.to_high(shrink(pixels, 2)))
        middle = self.middle(self.to_middle(shrink(high, 2)))
        low = self.low(self.to_low(shrink(middle, 2)))
        middle = self.middle_again(middle + grow(self.from_low(low), 2))
        high = self.high_again(high + grow(self.from_middle(middle), 2))
        return grow(self.head(functional.silu(high)), 2)


class SegmenterDetector:
    """Finds objects with a ``SegmentationNetwork``.

    Args:
        folder: weights and configuration.
    """

    def __init__(self, folder: Path) -> None:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        self.classes: Sequence[str] = tuple(config["classes"])
        """The classes that it can find."""
        self._folder, self._widths = folder, config["widths"]
        self._network: SegmentationNetwork | None = None

    @functools.cached_property
    def version(self) -> Mapping[str, Any]:
        """Provenance: the digests of configuration and weights, and the name of the postprocessing."""
        files = {name: sha256_file(self._folder / name) for name in ("config.json", "model.safetensors")}
        return {"detector": "segmenter", "postprocessing": POSTPROCESSING, "files": files}

    def load(self) -> None:
        """Load the network; a second call does nothing."""
        self._loaded()

    def _loaded(self) -> SegmentationNetwork:
        if self._network is None:
            network = SegmentationNetwork(len(self.classes), self._widths)
            network.load_state_dict(load_file(self._folder / "model.safetensors"))
            self._network = network.eval()
        return self._network

    def detect(self, images: Sequence[Image.Image], *, minimum: float) -> list[list[Detection]]:
        """The objects of each RGB image, the most confident first. Images may differ in size.

        Raises:
            ValueError: the sides of an image are not multiples of 8.
        """
        for image in images:
            if image.width % STRIDE or image.height % STRIDE:
                raise ValueError(f"the detector takes sides that are multiples of {STRIDE}, not {image.size}")
        objects: list[list[Detection]] = []
        for batch in _batches(images):
            with torch.inference_mode():
                probabilities = self._loaded()(to_pixels(batch)).softmax(dim=1).numpy()
            objects += [self._objects(of_image, minimum) for of_image in probabilities]
        return objects

    def _objects(self, probabilities: NDArray[np.float32], minimum: float) -> list[Detection]:
        """The objects of one image, from the probabilities [1 + classes, H, W] of its pixels."""
        pieces, count = ndimage.label(probabilities[0] < 1 - FOREGROUND)
        objects = []
        for number in range(1, count + 1):
            piece = pieces == number
            if int(piece.sum()) < SMALLEST:
                continue
            shares = probabilities[1:, piece].mean(axis=1)
            label, confidence = int(shares.argmax()), float(shares.max())
            mask = ndimage.binary_dilation(piece, ndimage.generate_binary_structure(2, 2), iterations=MARGIN)
            mask &= (pieces == 0) | piece  # a piece does not grow into its neighbours
            box = mask_box(mask)
            if confidence > minimum and box is not None:
                objects.append(Detection(self.classes[label], confidence, box, mask))
        return sorted(objects, key=lambda item: -item.confidence)

    def __getstate__(self) -> dict[str, Any]:
        """Everything but the loaded network, so that a detector can be sent to a worker process."""
        return {**self.__dict__, "_network": None}


def _batches(images: Sequence[Image.Image]) -> list[list[Image.Image]]:
    """Neighbours of one size, at most ``_BATCH`` together."""
    batches: list[list[Image.Image]] = []
    for image in images:
        if batches and len(batches[-1]) < _BATCH and batches[-1][0].size == image.size:
            batches[-1].append(image)
        else:
            batches.append([image])
    return batches
