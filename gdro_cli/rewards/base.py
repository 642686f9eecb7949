"""What a reward is: images and their prompts in, one ``Score`` each out.

A failure is *missing with a reason*, never 0; a measured 0 is a value like any other.
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from PIL import Image, UnidentifiedImageError

ImageSource = Image.Image | Path
"""A decoded image, or the path of an image file."""

# What Pillow raises for files that are missing, cut off, broken or absurdly large.
_DECODE_ERRORS = (
    OSError,
    UnidentifiedImageError,
    SyntaxError,
    ValueError,
    EOFError,
    LookupError,
    OverflowError,
    struct.error,
    zlib.error,
    Image.DecompressionBombError,
)
# Pillow goes by a file's content and would hand some formats to other programs.
_FORMATS = ("PNG", "WEBP", "JPEG")
MOST_PIXELS = 2**25
"""Larger pictures are not decoded: a small file can stand for many gigabytes of pixels."""


@dataclass(frozen=True, slots=True)
class Score:
    """The reward of one image."""

    value: float | None
    """The reward; ``None`` when it could not be measured."""
    reason: str | None = None
    """Why ``value`` is missing, for a person to read; ``None`` when it is there."""
    details: Mapping[str, Any] = field(default_factory=dict)
    """What the reward was computed from, as JSON values."""

    def __post_init__(self) -> None:
        """A score is either measured or missing with a reason. Raises ``ValueError`` for anything else."""
        if (self.value is None) != (self.reason is not None):
            raise ValueError("a score has a value, or a reason why it has none")


class PromptLike(Protocol):
    """What a reward reads of a prompt record."""

    @property
    def prompt(self) -> str:
        """The text that the model was asked for."""
        ...

    @property
    def target(self) -> str | None:
        """The text that must be readable in the image; ``None`` for other tasks."""
        ...

    @property
    def metadata(self) -> Mapping[str, Any]:
        """What else a reward needs, as JSON values."""
        ...


class Reward(Protocol):
    """A way to score images.

    Making one is quick and checks that everything it needs is there (``PrerequisiteError`` otherwise). The
    heavy part waits for ``load``, so that a reward can be sent to a worker process before it is loaded.
    """

    @property
    def version(self) -> Mapping[str, Any]:
        """Provenance as JSON values: equal versions give equal scores."""
        ...

    def load(self) -> None:
        """Load models; a second call does nothing. Raises ``PrerequisiteError``."""
        ...

    def score(self, images: Sequence[ImageSource], prompts: Sequence[PromptLike]) -> list[Score]:
        """Score ``images[i]`` for ``prompts[i]``, in order. An image that fails is missing with a reason.

        Raises ``UserError`` for a prompt that cannot be scored with any image.
        """
        ...


class UnreadableImageError(Exception):
    """An image that cannot be decoded; the message is the reason."""


def read_rgb(source: ImageSource) -> Image.Image:
    """Decode an image to RGB. Raises ``UnreadableImageError``."""
    try:
        if isinstance(source, Image.Image):
            return _small(source).convert("RGB")
        with Image.open(source, formats=_FORMATS) as image:
            return _small(image).convert("RGB")
    except _DECODE_ERRORS as error:
        where = "" if isinstance(source, Image.Image) else f" {source}"
        raise UnreadableImageError(f"the image{where} cannot be decoded: {_first_line(error)}") from error


def _small(image: Image.Image) -> Image.Image:
    if image.width * image.height > MOST_PIXELS:
        raise UnreadableImageError(f"the image has {image.width} x {image.height} pixels, more than {MOST_PIXELS:,}")
    return image


def describe(error: BaseException) -> str:
    """An exception as one short line: its type and the first line of its message."""
    return f"{type(error).__name__}: {_first_line(error)}"


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
