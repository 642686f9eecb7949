"""The interfaces of a detector, which finds objects in images, and of a classifier, which names their colours."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray
from PIL import Image

Box = tuple[float, float, float, float]
"""Left, top, right, bottom in pixels of the image, right and bottom exclusive; y points down."""
Mask = NDArray[np.bool_]
"""[H, W] as the image, True inside the object."""


@dataclass(frozen=True, slots=True, eq=False)
class Detection:
    """One object that a detector has found in an image."""

    label: str
    confidence: float
    """In [0, 1]."""
    box: Box
    mask: Mask


class Detector(Protocol):
    """Finds objects. Constructing one is quick and raises ``PrerequisiteError`` if its weights are missing."""

    @property
    def classes(self) -> Sequence[str]:
        """The classes that it can find, in GenEval's spelling."""
        ...

    @property
    def version(self) -> Mapping[str, Any]:
        """Provenance as JSON values: equal versions give equal detections."""
        ...

    def load(self) -> None:
        """Load the network; a second call does nothing. Raises ``PrerequisiteError``."""
        ...

    def detect(self, images: Sequence[Image.Image], *, minimum: float) -> list[list[Detection]]:
        """The objects of each RGB image with a confidence above ``minimum``, the most confident first."""
        ...


class ColourClassifier(Protocol):
    """Names the colours of objects. Constructing one is quick, and raises ``PrerequisiteError`` like a ``Detector``."""

    @property
    def version(self) -> Mapping[str, Any]:
        """Provenance as JSON values: equal versions give equal colours."""
        ...

    def load(self) -> None:
        """Load the network; a second call does nothing. Raises ``PrerequisiteError``."""
        ...

    def classify(self, image: Image.Image, objects: Sequence[Detection]) -> list[str]:
        """The colour of each object of one RGB image, one of ``core.geneval.COLOURS``."""
        ...


def mask_box(mask: Mask) -> Box | None:
    """The smallest box around a mask; None if the mask is empty."""
    rows, columns = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
    if not rows.size:
        return None
    return float(columns[0]), float(rows[0]), float(columns[-1] + 1), float(rows[-1] + 1)
