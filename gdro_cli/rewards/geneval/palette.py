"""The colour of an object: the palette colour that is nearest to most of its pixels."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from gdro_cli.core.geneval import COLOURS
from gdro_cli.rewards.geneval.detection import Detection

RULE = "nearest-majority-1"
Rgb = tuple[int, int, int]


class PaletteColours:
    """Names the colours of objects that are drawn with a known palette.

    Every pixel inside the mask votes for the nearest colour (Euclidean distance in RGB). Votes for a neutral colour,
    such as that of an outline, do not count.

    Args:
        palette: RGB of the colours that can win; names of ``core.geneval.COLOURS``.
        neutral: RGB of other colours that an object contains.

    Raises:
        ValueError: the palette is empty, or has a name that GenEval does not know.
    """

    def __init__(self, palette: Mapping[str, Rgb], *, neutral: Sequence[Rgb] = ()) -> None:
        if not palette or not set(palette) <= set(COLOURS):
            raise ValueError(f"the palette needs names of GenEval's colours, not {', '.join(palette) or 'nothing'}")
        self._names = tuple(palette)
        self._points = np.asarray([*palette.values(), *neutral], np.float32)
        self.version: Mapping[str, Any] = {
            "colours": "palette",
            "rule": RULE,
            "palette": {name: list(colour) for name, colour in palette.items()},
            "neutral": [list(colour) for colour in neutral],
        }
        """Provenance: the rule and its colours."""

    @classmethod
    def read(cls, path: Path) -> PaletteColours:
        """The palette in a JSON file with the keys ``palette`` and ``neutral``."""
        return cls(**json.loads(path.read_text(encoding="utf-8")))

    def load(self) -> None:
        """Do nothing: a palette has no network."""

    def classify(self, image: Image.Image, objects: Sequence[Detection]) -> list[str]:
        """The colour of each object."""
        pixels = np.asarray(image, np.float32)
        return [self._colour(pixels[item.mask]) for item in objects]

    def _colour(self, pixels: np.ndarray[Any, np.dtype[np.float32]]) -> str:
        distances = np.square(pixels[:, None, :] - self._points[None]).sum(axis=-1)
        votes = np.bincount(distances.argmin(axis=1), minlength=len(self._points))[: len(self._names)]
        if not votes.any():  # all pixels are neutral: take the colour that is nearest to them
            return self._names[int(distances[:, : len(self._names)].sum(axis=0).argmin())]
        return self._names[int(votes.argmax())]
