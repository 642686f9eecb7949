"""A small detector: a segmentation network, and connected components of what it sees.

The network gives each pixel a class or background. It is trained on masks that are one pixel smaller than the object,
so that neighbours stay apart; each connected piece of foreground is one object, whose mask is the piece grown back by
that pixel. Weights lie in a folder with ``config.json`` (class names, widths) and ``model.safetensors``.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from safetensors import SafetensorError
from safetensors.torch import load_file
from scipy import ndimage
from torch import Tensor, nn
from torch.nn import functional

from gdro_cli.errors import PrerequisiteError
from gdro_cli.files import sha256_file
from gdro_cli.rewards.geneval.detection import Detection, mask_box
from gdro_cli.rewards.layers import ResidualBlock

POSTPROCESSING = "components-1"
"""Name of the way from pixels to objects; it changes whenever the same network would find other objects."""
FOREGROUND = 0.5  # probability from which a pixel belongs to an object
MARGIN = 1  # pixels by which the learnt masks are smaller than the object
SMALLEST = 16  # pixels of foreground; smaller pieces are specks
STRIDE = 8  # height and width of an image must be multiples


class SegmentationNetwork(nn.Module):
    """Pixels [N, 3, H, W] in [-1, 1] -> class logits [N, 1 + classes, H, W]; class 0 is background.

    A U-shape over resolutions 1/2, 1/4 and 1/8, where pixels are gathered into channels instead of pooled.
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
        batch_size: images per forward pass.

    Raises:
        PrerequisiteError: the folder is not there or incomplete.
    """

    def __init__(self, folder: Path, *, batch_size: int = 32) -> None:
        config, weights = folder / "config.json", folder / "model.safetensors"
        try:
            held = json.loads(config.read_bytes().decode("utf-8"))
            self._classes = tuple(str(name) for name in held["classes"])
            self._widths = tuple(int(width) for width in held["widths"])
            digests = {path.name: sha256_file(path) for path in (config, weights)}
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise PrerequisiteError(f"the detector in {folder} is missing or incomplete: reinstall gdro_cli") from error
        self._weights, self._batch_size = weights, batch_size
        self._version = {"detector": "segmenter", "postprocessing": POSTPROCESSING, "files": digests}
        self._network: SegmentationNetwork | None = None

    @property
    def classes(self) -> Sequence[str]:
        """Names of what it can find."""
        return self._classes

    @property
    def version(self) -> Mapping[str, Any]:
        """Digests of the weights, and the name of the postprocessing."""
        return self._version

    def load(self) -> None:
        """Load the network; a second call does nothing. Raises ``PrerequisiteError`` for weights that do not fit."""
        if self._network is None:
            try:
                network = SegmentationNetwork(len(self._classes), self._widths)
                network.load_state_dict(load_file(self._weights))
            except (OSError, SafetensorError, RuntimeError, ValueError) as error:
                raise PrerequisiteError(
                    f"the detector's weights {self._weights} are damaged: reinstall gdro_cli"
                ) from error
            self._network = network.eval()

    def detect(self, images: Sequence[Image.Image], *, minimum: float) -> list[list[Detection]]:
        """Objects of each RGB image, the most confident first. Images may differ in size.

        Raises:
            ValueError: the sides of an image are not multiples of 8.
        """
        self.load()
        found: list[list[Detection]] = []
        for image in images:
            if image.width % STRIDE or image.height % STRIDE:
                raise ValueError(f"the detector takes sides that are multiples of {STRIDE}, not {image.size}")
        for batch in _batches(images, self._batch_size):
            found += [self._objects(each, minimum) for each in self._probabilities(batch)]
        return found

    def _probabilities(self, images: Sequence[Image.Image]) -> NDArray[np.float32]:
        """Class probabilities [N, 1 + classes, H, W] of images of one size."""
        if self._network is None:
            raise RuntimeError("the network is not loaded")
        with torch.inference_mode():
            return np.asarray(self._network(to_pixels(images)).softmax(dim=1).numpy())

    def _objects(self, probabilities: NDArray[np.float32], minimum: float) -> list[Detection]:
        pieces, count = ndimage.label(probabilities[0] < 1 - FOREGROUND)
        found = []
        for number in range(1, count + 1):
            piece = pieces == number
            if int(piece.sum()) < SMALLEST:
                continue
            shares = probabilities[1:, piece].mean(axis=1)
            label, confidence = int(shares.argmax()), float(shares.max())
            # Growing never reaches into a neighbour: its pixels are taken.
            mask = ndimage.binary_dilation(piece, ndimage.generate_binary_structure(2, 2), iterations=MARGIN)
            mask &= (pieces == 0) | piece
            box = mask_box(mask)
            if confidence > minimum and box is not None:
                found.append(Detection(self._classes[label], confidence, box, mask))
        return sorted(found, key=lambda each: -each.confidence)

    def __getstate__(self) -> dict[str, Any]:
        """Everything but the loaded network, so that it can be sent to a worker process."""
        return {**self.__dict__, "_network": None}


def to_pixels(images: Sequence[Image.Image]) -> Tensor:
    """RGB images of one size as [N, 3, H, W] in [-1, 1]."""
    stack = np.stack([np.asarray(image) for image in images])
    return torch.from_numpy(stack).permute(0, 3, 1, 2).float() / 127.5 - 1


def _batches(images: Sequence[Image.Image], size: int) -> list[list[Image.Image]]:
    """Neighbours of one size, at most ``size`` together."""
    batches: list[list[Image.Image]] = []
    for image in images:
        if batches and len(batches[-1]) < size and batches[-1][0].size == image.size:
            batches[-1].append(image)
        else:
            batches.append([image])
    return batches
