"""A detector and a colour classifier for drawn rectangles of pure colours: small, but they do look at the pixels.

A square is a clock, a wide rectangle a bus, a tall one a bottle. The confidence is the area in hundreds of pixels, at
most 1. A picture 17 pixels wide makes the detector fail, one 19 pixels wide the classifier.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from PIL import Image, ImageColor, ImageDraw

from gdro_cli.core.geneval import COLOURS
from gdro_cli.rewards.geneval.detection import Detection

DETECTOR_FAILS = 17
CLASSIFIER_FAILS = 19
PALETTE = {name: ImageColor.getrgb(name) for name in COLOURS}


def draw(*rectangles: tuple[str, int, int, int, int], width: int = 64) -> Image.Image:
    """A grey picture, 64 pixels high, with rectangles (colour, left, top, width, height) that do not touch."""
    picture = Image.new("RGB", (width, 64), "#707070")
    pen = ImageDraw.Draw(picture)
    for colour, left, top, across, down in rectangles:
        pen.rectangle((left, top, left + across - 1, top + down - 1), fill=PALETTE[colour])
    return picture


class RectangleDetector:
    """Finds the rectangles."""

    classes = ("clock", "bus", "bottle")
    version: Mapping[str, Any] = {"name": "rectangles", "weights": "none"}

    def __init__(self) -> None:
        self.loaded = False
        self.batches: list[int] = []

    def load(self) -> None:
        self.loaded = True

    def detect(self, images: Sequence[Image.Image], *, minimum: float) -> list[list[Detection]]:
        assert self.loaded
        self.batches.append(len(images))
        if any(image.width == DETECTOR_FAILS for image in images):
            raise RuntimeError("seventeen")
        return [[item for item in _rectangles(image) if item.confidence > minimum] for image in images]


class RectangleColours:
    """Names the colour in the middle of an object."""

    version: Mapping[str, Any] = {"name": "middle"}

    def __init__(self) -> None:
        self.loaded = False
        self.asked = 0

    def load(self) -> None:
        self.loaded = True

    def classify(self, image: Image.Image, objects: Sequence[Detection]) -> list[str]:
        assert self.loaded
        if image.width == CLASSIFIER_FAILS:
            raise RuntimeError("nineteen")
        self.asked += len(objects)
        names = {value: name for name, value in PALETTE.items()}
        middles = [(int((left + right) / 2), int((top + bottom) / 2)) for left, top, right, bottom in _boxes(objects)]
        return [names[tuple(np.asarray(image)[y, x].tolist())] for x, y in middles]


def _boxes(objects: Sequence[Detection]) -> list[tuple[float, float, float, float]]:
    return [item.box for item in objects]


def _rectangles(image: Image.Image) -> list[Detection]:
    pixels = np.asarray(image)
    found: list[Detection] = []
    for value in PALETTE.values():
        left_over = (pixels == value).all(axis=-1)
        while left_over.any():
            top, left = (int(edge[0]) for edge in np.nonzero(left_over))
            right = left + int(np.argmin(np.append(left_over[top, left:], False)))
            bottom = top + int(np.argmin(np.append(left_over[top:, left], False)))
            mask = np.zeros_like(left_over)
            mask[top:bottom, left:right] = True
            left_over &= ~mask
            across, down = right - left, bottom - top
            label = "clock" if across == down else "bus" if across > down else "bottle"
            found.append(Detection(label, min(across * down / 100, 1.0), (left, top, right, bottom), mask))
    return sorted(found, key=lambda item: -item.confidence)
