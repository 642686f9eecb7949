"""The recipe's reward, opened: what scores images, in how many processes, and what its scores are called."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

from gdro_cli.config.recipe import Recipe
from gdro_cli.core.geneval import TAGS, VOCABULARIES
from gdro_cli.data.scores import Detail
from gdro_cli.rewards.base import Reward
from gdro_cli.rewards.geneval.detection import ColourClassifier, Detector
from gdro_cli.rewards.ocr import OcrReward
from gdro_cli.tiny.assets import tiny_detector_path

# What the detectors of a recipe can find, by reward.geneval.detector.
_VOCABULARY = {"shapes": "shapes", "mask2former": "coco"}


@dataclass(frozen=True, slots=True)
class Measure:
    """A quantity that an evaluation reports."""

    name: str
    detail: Detail = None
    """Which number of a score's row it is."""
    tag: str | None = None
    """Only prompts of this GenEval tag."""
    by_tag: bool = False
    """The unweighted mean of the tags' means instead of the mean over images: GenEval's overall score."""


_MEASURES = {
    "ocr": (
        Measure("reward"),
        Measure("exact match", "exact"),
        Measure("similarity", "similarity"),
        Measure("text area", "text_area"),
    ),
    "geneval": (
        Measure("overall", "accuracy", by_tag=True),
        *(Measure(tag, "accuracy", tag=tag) for tag in TAGS),
        Measure("strict reward", "strict"),
        Measure("soft reward", "soft"),
    ),
}


def measures(recipe: Recipe) -> tuple[Measure, ...]:
    """What an evaluation of the recipe's task reports; the task's headline first."""
    return _MEASURES[recipe.prompts.task]


def trained_detail(recipe: Recipe) -> Detail:
    """Which number of a score's row is trained on."""
    if recipe.reward.kind != "geneval":
        return None
    objective = recipe.reward.geneval.objective
    return objective if isinstance(objective, str) else {str(name): weight for name, weight in objective.items()}


def known_classes(recipe: Recipe) -> Collection[str] | None:
    """The classes that prompts may ask for; None where the task has none."""
    if recipe.prompts.task != "geneval":
        return None
    return VOCABULARIES[_VOCABULARY[recipe.reward.geneval.detector]]


def open_reward(recipe: Recipe) -> Reward:
    """The recipe's reward; its engine or networks start with the first image.

    Raises:
        PrerequisiteError: its packages or weights are missing.
    """
    if recipe.reward.kind == "geneval":
        from gdro_cli.rewards.geneval.reward import GenEvalReward

        return GenEvalReward(_open_detector(recipe), _open_colours(recipe))
    settings = recipe.reward.ocr
    return OcrReward(
        recognition_width=settings.recognition_width,
        detection_model=settings.detection_model,
        recognition_model=settings.recognition_model,
        model_dir=settings.model_dir,
        engine=settings.engine,
    )


def _colours(recipe: Recipe) -> str:
    settings = recipe.reward.geneval
    if settings.colours != "auto":
        return settings.colours
    return "palette" if settings.detector == "shapes" else "clip"


def _sizes(recipe: Recipe) -> set[str]:
    models = {recipe.reward.geneval.detector, _colours(recipe)}
    return {"large" if model in ("mask2former", "clip") else "small" for model in models}


def _open_detector(recipe: Recipe) -> Detector:
    settings = recipe.reward.geneval
    if settings.detector == "mask2former":
        from gdro_cli.rewards.geneval.mask2former import Mask2FormerDetector

        named = settings.detector_model
        return Mask2FormerDetector() if named is None else Mask2FormerDetector(named)
    from gdro_cli.rewards.geneval.segmenter import SegmenterDetector

    return SegmenterDetector(tiny_detector_path())


def _open_colours(recipe: Recipe) -> ColourClassifier:
    if _colours(recipe) == "clip":
        from gdro_cli.rewards.geneval.clip_colour import ClipColours

        named = recipe.reward.geneval.colour_model
        return ClipColours() if named is None else ClipColours(named)
    from gdro_cli.rewards.geneval.palette import PaletteColours

    return PaletteColours.read(tiny_detector_path() / "palette.json")


def needs_one_process(recipe: Recipe) -> bool:
    """Whether one scoring process with all threads serves better than one per core."""
    return recipe.reward.kind == "geneval" and "large" in _sizes(recipe)
