"""The interface of a reward: it scores images for their prompts, and it describes itself to the rest of the program.

This is the public interface for authors of rewards; ``docs/adding-a-reward.md`` shows a complete one. The program asks
a ``Reward`` about itself and never compares its name. A score that cannot be measured is *missing with a reason*, never
0; a measured 0 is a value like any other.

Checking a recipe imports its reward, so importing this module loads neither Pillow nor any numerical library.
"""

from __future__ import annotations

import json
import math
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
from gdro_cli.images import UnusableImageError, as_shown, open_image

if TYPE_CHECKING:
    from PIL import Image

ImageSource: TypeAlias = "Image.Image | Path"
"""A decoded image, or the path of an image file."""

Resources = Literal["cores", "device", "server"]
"""What limits the number of scoring processes.

- ``cores``: a small model on the CPU; one process per core.
- ``device``: large networks; one process, with all threads and the GPU.
- ``server``: another program does the work; one process sends it requests.
"""

UNIT = (0.0, 1.0)
"""The scale of a reward with a corrected score."""
_ROUNDING = 1e-6
"""Share of a scale by which a value may exceed it."""
OUTSIDE = "outside its scale"
"""What the reason of a value that does says."""


@dataclass(frozen=True, slots=True)
class Score:
    """The reward of one image."""

    value: float | None
    """The reward, a finite number; ``None`` if it could not be measured."""
    reason: str | None = None
    """Why ``value`` is missing, for a person to read; ``None`` if it is not."""
    details: Mapping[str, Any] = field(default_factory=dict)
    """What the reward was computed from, as JSON values."""

    def __post_init__(self) -> None:
        """Check that the score is either measured or missing with a reason, and make the value a ``float``.

        Raises ``ValueError`` if it is not, and ``TypeError`` if the value is not a number or a detail not a JSON value.
        """
        if (self.value is None) != (self.reason is not None):
            raise ValueError("a score has a value, or a reason why it has none")
        if self.value is not None:
            object.__setattr__(self, "value", _finite(self.value))
        json.dumps(dict(self.details), allow_nan=False)


def _finite(value: Any) -> float:
    """A number of any library as a ``float``. Raises ``TypeError`` and ``ValueError``."""
    if isinstance(value, str | bytes):
        raise TypeError(f"a score is a number, not the text {value[:40]!r}")
    number = float(value)
    if not math.isfinite(number):
        raise ValueError(f"a score is a finite number, not {number}")
    return number


class PromptLike(Protocol):
    """The part of a prompt record that a reward reads."""

    @property
    def prompt(self) -> str:
        """The text that the image was made from."""
        ...

    @property
    def target(self) -> str | None:
        """The text that must be readable in the image; ``None`` if the prompt asks for no text."""
        ...

    @property
    def metadata(self) -> Mapping[str, Any]:
        """Everything else that a reward needs, as JSON values."""
        ...

    @property
    def source(self) -> Image.Image | None:
        """The image that the prompt edits, RGB, of the size of the drawn image; ``None`` if it edits none.

        It is read at each access. A reward that cannot do without it has ``image`` among its ``needs``.
        """
        ...


class Scorer(Protocol):
    """What a scoring process runs: a reward, or a judge in its place.

    The parent process pickles it before it is loaded and sends it to each worker, which loads it.
    """

    @property
    def version(self) -> Mapping[str, Any]:
        """Provenance as JSON values: equal versions give equal scores. Raises ``PrerequisiteError``."""
        ...

    def load(self) -> None:
        """Load the models; a second call does nothing. Raises ``PrerequisiteError``."""
        ...

    def score(self, images: Sequence[ImageSource], prompts: Sequence[PromptLike]) -> list[Score]:
        """Score ``images[i]`` for ``prompts[i]``, in order. An image that fails is missing with a reason."""
        ...


class NoSettings(StrictModel):
    """The settings of a reward that has none."""


class Reward(ABC):
    """A way to score images. It describes itself without loading weights, and it scores.

    Constructing a reward is quick and checks nothing. ``version`` finds what the reward needs, and ``load`` loads it;
    both raise ``PrerequisiteError`` if something is missing. A subclass implements ``version`` and either
    ``score_image`` or, to score images in batches, ``score``. A loaded reward must still be picklable: it leaves its
    loaded models out of its state.

    Args:
        settings: an instance of ``Settings``; ``None`` for the defaults.
    """

    name: ClassVar[str]
    """The name of the reward in recipes."""
    purpose: ClassVar[str]
    """What a model learns from it, for model cards: "to write the text that a prompt asks for"."""
    Settings: ClassVar[type[BaseModel]] = NoSettings
    """The reward's keys in a recipe."""
    needs: ClassVar[frozenset[str]] = frozenset()
    """What a prompt must carry: ``target``, ``image`` (one that it edits), keys of its metadata, or nothing. See
    ``read_prompt``."""
    measures: ClassVar[tuple[Measure, ...]] = (Measure("reward"),)
    """What an evaluation reports, the headline first. Without a judge, the headline selects the evaluation point."""
    signals: ClassVar[Mapping[str, str]] = {}
    """Details that also signal reward hacking, each with a description."""
    judge_axes: ClassVar[tuple[str, ...]] = ("alignment", "coherence", "style")
    """The judge's axes whose mean is u, the quality. Leave out an axis that rises when the reward is hacked."""
    scale: ClassVar[tuple[float, float]] = UNIT
    """The range of the values; one outside a finite range is missing. Only rewards from 0 to 1 have a corrected
    score."""
    unit_details: ClassVar[frozenset[str]] = frozenset()
    """Details from 0 to 1 (or true and false), which a mixture may use without a range."""
    columns: ClassVar[tuple[str, ...]] = ()
    """Details that come first in results.csv; the others follow in alphabetical order."""

    def __init__(self, settings: BaseModel | None = None) -> None:
        self.settings = self.Settings() if settings is None else settings

    # -- facts ----------------------------------------------------------------------------------------------------

    @property
    def trained_on(self) -> Detail:
        """The number of a score that a model is trained on; ``None`` for its value."""
        return None

    @property
    def resources(self) -> Resources:
        """What limits the number of scoring processes."""
        return "cores"

    def read_prompt(self, prompt: str, *, target: str | None, metadata: Mapping[str, Any]) -> str | None:
        """Check that a prompt carries what the reward needs, and return its target.

        A reward that needs a target takes it from the double quotes in the prompt if ``target`` is ``None``.

        Raises:
            ValueError: something that the reward needs is missing or wrong; the message says what.
        """
        return read_needs(self.needs, prompt, target=target, metadata=metadata)

    def check_prompts(self, prompts: Sequence[PromptLike]) -> Sequence[str]:
        """Remarks on prompts that ``read_prompt`` accepts, before any image is made for them.

        For what needs the reward's files, or all prompts at once: demands that no image can satisfy.

        Raises:
            UserError: no prompt can be satisfied, so every score would be the same.
            PrerequisiteError: a file that the reward needs is missing.
        """
        return ()

    @classmethod
    def facts(cls, details: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
        """What reports show below an image in addition to the reward, as (name, text)."""
        yield from ()

    @classmethod
    def caption(cls, value: float, details: Mapping[str, Any]) -> tuple[str, ...]:
        """At most two lines of text below an image on a contact sheet."""
        return (f"reward {value:.2f}", *(f"{name}: {text}" for name, text in cls.facts(details)))[:2]

    @classmethod
    def cells(cls, details: Mapping[str, Any]) -> dict[str, Any]:
        """The details as cells of results.csv: texts, numbers and booleans."""
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
        """Load the models; a second call does nothing. Raises ``PrerequisiteError``."""

    def score(self, images: Sequence[ImageSource], prompts: Sequence[PromptLike]) -> list[Score]:
        """Score ``images[i]`` for ``prompts[i]``, in order. An image that fails is missing with a reason.

        Raises:
            UserError: no image can be scored for one of the prompts.
            PrerequisiteError: the models cannot be loaded.
            ValueError: the numbers of images and prompts differ.
        """
        self.load()
        return [self._score(image, prompt) for image, prompt in zip(images, prompts, strict=True)]

    def score_image(self, image: Image.Image, prompt: PromptLike) -> float | Score:
        """Score one RGB image. If it raises, the image is missing and the error is the reason.

        ``UserError`` and ``PrerequisiteError`` concern every image: they end the scoring.
        """
        raise NotImplementedError(f"{type(self).__name__} has neither score_image nor score")

    def _score(self, source: ImageSource, prompt: PromptLike) -> Score:
        try:
            image = read_rgb(source)
        except UnreadableImageError as error:
            return Score(None, str(error))
        try:
            score = self.score_image(image, prompt)
            return in_scale(score if isinstance(score, Score) else Score(score), self)
        except GdroError:
            raise
        except Exception as error:  # noqa: BLE001 - whatever a reward raises concerns this image, not the others
            return Score(None, f"the reward {self.name} failed on this image: {one_line(error)}")


def in_scale(score: Score, reward: Reward) -> Score:
    """The score of a reward, missing with a reason if its value is outside the reward's finite ``scale``.

    Rounding may exceed the scale by a millionth of its range.
    """
    return within(score, reward.scale, who=f"the reward {reward.name}", remedy="correct the class attribute `scale`")


def within(score: Score, scale: tuple[float, float], *, who: str, remedy: str) -> Score:
    """``in_scale`` with the words of its reason: who gave the value, and what to do."""
    low, high = scale
    rounding = _ROUNDING * (high - low)
    if score.value is None or math.isinf(rounding) or low - rounding <= score.value <= high + rounding:
        return score
    reason = f"{who} gave {score.value:g}, {OUTSIDE} ({low:g} to {high:g}): {remedy}"
    return Score(None, reason, score.details)


def read_needs(needs: frozenset[str], prompt: str, *, target: str | None, metadata: Mapping[str, Any]) -> str | None:
    """``Reward.read_prompt`` for a reward with these needs. Raises ``ValueError``."""
    if missing := sorted(needs - {"target"} - metadata.keys()):
        raise ValueError(f"the key {missing[0]} is missing")
    if "target" not in needs:
        return target
    text = quoted_text(prompt) if target is None else target
    if text is None:
        raise ValueError(
            'it has no text in double quotes; write what the image must say, as in a sign that says "HELLO"'
        )
    if not text.strip():
        raise ValueError("the text that the image must say is empty")
    return text


class UnreadableImageError(Exception):
    """An image cannot be decoded; the message is the reason."""


def read_rgb(source: ImageSource) -> Image.Image:
    """Read an image as a viewer shows it, in RGB (``gdro_cli.images``). Raises ``UnreadableImageError``."""
    try:
        return open_image(source) if isinstance(source, Path) else as_shown(source)
    except UnusableImageError as error:
        where = f" {source}" if isinstance(source, Path) else ""
        raise UnreadableImageError(f"the image{where} cannot be decoded: {error}") from error


def read_all(sources: Sequence[ImageSource]) -> tuple[dict[int, Image.Image], dict[int, str]]:
    """Decode images to RGB. Returns the images, and the reasons why the others cannot be decoded, by index."""
    images: dict[int, Image.Image] = {}
    reasons: dict[int, str] = {}
    for index, source in enumerate(sources):
        try:
            images[index] = read_rgb(source)
        except UnreadableImageError as error:
            reasons[index] = str(error)
    return images, reasons


def one_line(error: BaseException) -> str:
    """An exception as one short line: its type and the first line of its message."""
    return f"{type(error).__name__}: {_first_line(error)}"


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
