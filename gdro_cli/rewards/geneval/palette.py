"""The colour of an object as the palette colour that most of its pixels are nearest to."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from gdro_cli.core.geneval import COLOURS
from gdro_cli.errors import PrerequisiteError
from gdro_cli.rewards.geneval.detection import Detection

RULE = "nearest-majority-1"
Rgb = tuple[int, int, int]


class PaletteColours:
    """Names colours where a world draws with a known palette.

    Every pixel inside the mask votes for the nearest colour (Euclidean distance in RGB). Neutral colours, such as those
    of outlines, take their votes away but never win.

    Args:
        palette: RGB of the colours that can win; names of ``core.geneval.COLOURS``.
        neutral: RGB of what an object has beside its colour.

    Raises:
        ValueError: no colour, or a name that GenEval does not know.
    """

    def __init__(self, palette: Mapping[str, Rgb], *, neutral: Sequence[Rgb] = ()) -> None:
        if not palette or not set(palette) <= set(COLOURS):
            raise ValueError(f"the palette needs names of GenEval's colours, not {', '.join(palette) or 'nothing'}")
        self._names = tuple(palette)
        self._points = np.asarray([*palette.values(), *neutral], np.float32)
        self._version = {
            "colours": "palette",
            "rule": RULE,
            "palette": {name: list(colour) for name, colour in palette.items()},
            "neutral": [list(colour) for colour in neutral],
        }

    @classmethod
    def read(cls, path: Path) -> PaletteColours:
        """The palette in a JSON file with the keys ``palette`` and ``neutral``. Raises PrerequisiteError."""
        try:
            held = json.loads(path.read_bytes().decode("utf-8"))
            palette = {str(name): (int(r), int(g), int(b)) for name, (r, g, b) in held["palette"].items()}
            return cls(palette, neutral=[(int(r), int(g), int(b)) for r, g, b in held["neutral"]])
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise PrerequisiteError(f"the palette {path} is missing or damaged: reinstall gdro_cli") from error

    @property
    def version(self) -> Mapping[str, Any]:
        """The rule and its colours."""
        return self._version

    def load(self) -> None:
        """Nothing is to be loaded."""

    def classify(self, image: Image.Image, objects: Sequence[Detection]) -> list[str]:
        """The colour of each object."""
        pixels = np.asarray(image, np.float32)
        return [self._colour(pixels[found.mask]) for found in objects]

    def _colour(self, pixels: np.ndarray[Any, np.dtype[np.float32]]) -> str:
        distances = np.square(pixels[:, None, :] - self._points[None]).sum(axis=-1)
        votes = np.bincount(distances.argmin(axis=1), minlength=len(self._points))[: len(self._names)]
        if not votes.any():  # nothing but neutral pixels: the nearest name all the same
            return self._names[int(distances[:, : len(self._names)].sum(axis=0).argmin())]
        return self._names[int(votes.argmax())]
