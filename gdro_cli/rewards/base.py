"""What a reward is: images and their prompts in, one ``Score`` each out; and all that the program knows of it.

This is the public interface for authors of rewards; ``docs/adding-a-reward.md`` shows a complete one. The rest of the
program asks a ``Reward`` about itself and never goes by its name. A failure is *missing with a reason*, never 0; a
measured 0 is a value like any other.

Importing this loads neither Pillow nor any numerical library, because a recipe is checked against its reward.
"""

from __future__ import annotations

import json
import math
import struct
import zlib
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Protocol, TypeAlias

from pydantic import BaseModel

from gdro_cli.config.base import StrictModel
from gdro_cli.core.measures import Detail, Measure
from gdro_cli.core.quotes import quoted_text
from gdro_cli.errors import GdroError

if TYPE_CHECKING:
    from PIL import Image

ImageSource: TypeAlias = "Image.Image | Path"
"""A decoded image, or the path of an image file."""

Resources = Literal["cores", "device", "server"]
"""What limits the number of scoring processes.

- ``cores``: small and on the CPU; one process per core.
- ``device``: large networks; one process, with all threads and the GPU.
- ``server``: another program does the work; one process, which asks it.
"""

UNIT = (0.0, 1.0)
"""The scale that the corrected score is made for."""

MOST_PIXELS = 2**25
"""Larger images are not decoded: a small file can stand for many gigabytes of pixels."""
# What Pillow raises for files that are missing, cut off or broken; for absurdly large ones it has an error of its own.
_DECODE_ERRORS = (OSError, SyntaxError, ValueError, EOFError, LookupError, OverflowError, struct.error, zlib.error)
# Pillow goes by a file's content and would hand some formats to other programs.
_FORMATS = ("PNG", "WEBP", "JPEG")


@dataclass(frozen=True, slots=True)
class Score:
    """The reward of one image."""

    value: float | None
    """The reward, a finite number; ``None`` when it could not be measured."""
    reason: str | None = None
    """Why ``value`` is missing, for a person to read; ``None`` when it is there."""
    details: Mapping[str, Any] = field(default_factory=dict)
    """What the reward was computed from, as JSON values."""

    def __post_init__(self) -> None:
        """A score is either measured or missing with a reason.

        Raises ``ValueError`` for anything else, and ``TypeError`` for details that are no JSON values.
        """
        if (self.value is None) != (self.reason is not None):
            raise ValueError("a score has a value, or a reason why it has none")
        if self.value is not None and not math.isfinite(self.value):
            raise ValueError(f"a score is a finite number, not {self.value}")
        json.dumps(dict(self.details), allow_nan=False)


class PromptLike(Protocol):
    """What a reward reads of a prompt record."""

    @property
    def prompt(self) -> str:
        """The text that the model was asked for."""
        ...

    @property
    def target(self) -> str | None:
        """The text that must be readable in the image; ``None`` where the prompt asks for none."""
        ...

    @property
    def metadata(self) -> Mapping[str, Any]:
        """What else a reward needs, as JSON values."""
        ...


class Scorer(Protocol):
    """What scoring processes are given: a reward, or a judge in the place of one.

    It is pickled before it is loaded and sent to each worker, which loads it.
    """

    @property
    def version(self) -> Mapping[str, Any]:
        """Provenance as JSON values: equal versions give equal scores. Raises ``PrerequisiteError``."""
        ...

    def load(self) -> None:
        """Load models; a second call does nothing. Raises ``PrerequisiteError``."""
        ...

    def score(self, images: Sequence[ImageSource], prompts: Sequence[PromptLike]) -> list[Score]:
        """Score ``images[i]`` for ``prompts[i]``, in order. An image that fails is missing with a reason."""
        ...


class NoSettings(StrictModel):
    """The settings of a reward that has none."""


class Reward(ABC):
    """A way to score images: facts about it, which need no weights, and the scoring itself.

    Making one is quick and checks nothing. ``version`` finds what the reward needs, and ``load`` loads it; both raise
    ``PrerequisiteError`` for what is missing. A subclass implements ``version`` and either ``score_image`` or, to score
    images together, ``score``. A loaded reward must still be picklable, without what it has loaded.

    Args:
        settings: of the class ``Settings``; by default all of them have their defaults.
    """

    name: ClassVar[str]
    """What recipes call it."""
    purpose: ClassVar[str]
    """What a model learns with it, for model cards: "to write the text that a prompt asks for"."""
    Settings: ClassVar[type[BaseModel]] = NoSettings
    """Its keys in a recipe."""
    needs: ClassVar[frozenset[str]] = frozenset()
    """What a prompt must carry: ``target``, keys of its metadata, or nothing. See ``read_prompt``."""
    measures: ClassVar[tuple[Measure, ...]] = (Measure("reward"),)
    """What an evaluation reports; the first is the headline, which decides where there is no judge."""
    signals: ClassVar[Mapping[str, str]] = {}
    """Details that are also signals of reward hacking, and what they mean."""
    judge_axes: ClassVar[tuple[str, ...]] = ("alignment", "coherence", "style")
    """The axes of a judge whose mean is u, the quality. One that the reward is hacked with is no quality."""
    scale: ClassVar[tuple[float, float]] = UNIT
    """The range of its values. There is a corrected score for 0 to 1 only."""
    columns: ClassVar[tuple[str, ...]] = ()
    """Details that come first in results.csv; the others follow in alphabetical order."""

    def __init__(self, settings: BaseModel | None = None) -> None:
        self.settings = self.Settings() if settings is None else settings

    # -- facts ----------------------------------------------------------------------------------------------------

    @property
    def trained_on(self) -> Detail:
        """Which number of a score is trained on; ``None`` is its value."""
        return None

    @property
    def resources(self) -> Resources:
        """What limits the number of scoring processes."""
        return "cores"

    def read_prompt(self, prompt: str, *, target: str | None, metadata: Mapping[str, Any]) -> str | None:
        """Check what a prompt carries; return its target, which may stand in double quotes in the prompt.

        Raises:
            ValueError: something that the reward needs is missing or wrong; the message says what.
        """
        for key in sorted(self.needs - {"target"} - metadata.keys()):
            raise ValueError(f"the key {key} is missing")
        if "target" not in self.needs:
            return target
        wanted = quoted_text(prompt) if target is None else target
        if wanted is None:
            raise ValueError(
                'it has no text in double quotes; write what the image must say, as in a sign that says "HELLO"'
            )
        if not wanted.strip():
            raise ValueError("the text that the image must say is empty")
        return wanted

    @classmethod
    def facts(cls, details: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
        """What reports show below an image beside the reward, as (name, text)."""
        yield from ()

    @classmethod
    def caption(cls, value: float, details: Mapping[str, Any]) -> tuple[str, ...]:
        """The lines below an image on a sheet, which has room for two."""
        return (f"reward {value:.2f}", *(f"{name}: {text}" for name, text in cls.facts(details)))[:2]

    @classmethod
    def cells(cls, details: Mapping[str, Any]) -> dict[str, Any]:
        """The details as cells of results.csv: texts, numbers and truth values."""
        return {name: value for name, value in details.items() if not isinstance(value, list | dict)}

    # -- scoring --------------------------------------------------------------------------------------------------

    @property
    @abstractmethod
    def version(self) -> Mapping[str, Any]:
        """Provenance as JSON values: equal versions give equal scores.

        Raises:
            PrerequisiteError: a package, a weight file or a server that the reward needs is missing.
        """

    def load(self) -> None:  # noqa: B027 - a reward without models loads nothing
        """Load models; a second call does nothing. Raises ``PrerequisiteError``."""

    def score(self, images: Sequence[ImageSource], prompts: Sequence[PromptLike]) -> list[Score]:
        """Score ``images[i]`` for ``prompts[i]``, in order. An image that fails is missing with a reason.

        Raises:
            UserError: a prompt cannot be scored with any image.
            PrerequisiteError: the models cannot be loaded.
            ValueError: not as many prompts as images.
        """
        self.load()
        return [self._score(image, prompt) for image, prompt in zip(images, prompts, strict=True)]

    def score_image(self, image: Image.Image, prompt: PromptLike) -> float | Score:
        """Score one RGB image. What it raises makes the image missing, with the error as the reason."""
        raise NotImplementedError(f"{type(self).__name__} has neither score_image nor score")

    def _score(self, source: ImageSource, prompt: PromptLike) -> Score:
        try:
            image = read_rgb(source)
        except UnreadableImageError as error:
            return Score(None, str(error))
        try:
            found = self.score_image(image, prompt)
            return found if isinstance(found, Score) else Score(float(found))
        except GdroError:
            raise
        except Exception as error:  # noqa: BLE001 - whatever a reward raises concerns this image, not the others
            return Score(None, f"the reward {self.name} failed on this image: {one_line(error)}")


class UnreadableImageError(Exception):
    """An image that cannot be decoded; the message is the reason."""


def read_rgb(source: ImageSource) -> Image.Image:
    """Decode an image to RGB. Raises ``UnreadableImageError``."""
    from PIL import Image

    try:
        if isinstance(source, Image.Image):
            return _small(source).convert("RGB")
        with Image.open(source, formats=_FORMATS) as image:
            return _small(image).convert("RGB")
    except (*_DECODE_ERRORS, Image.DecompressionBombError) as error:
        where = "" if isinstance(source, Image.Image) else f" {source}"
        raise UnreadableImageError(f"the image{where} cannot be decoded: {_first_line(error)}") from error


def _small(image: Image.Image) -> Image.Image:
    if image.width * image.height > MOST_PIXELS:
        raise UnreadableImageError(f"the image has {image.width} x {image.height} pixels, more than {MOST_PIXELS:,}")
    return image


def one_line(error: BaseException) -> str:
    """An exception as one short line: its type and the first line of its message."""
    return f"{type(error).__name__}: {_first_line(error)}"


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
