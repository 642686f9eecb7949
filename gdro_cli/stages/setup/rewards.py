"""The recipe's reward, opened: what scores images, in how many processes, and what its scores are called."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import dataclass

from gdro_cli.config.recipe import Recipe
from gdro_cli.core.evaluation_points import MissingLimits
from gdro_cli.core.geneval import TAGS, VOCABULARIES
from gdro_cli.core.scores import Interval, bootstrap_ci, paired_bootstrap
from gdro_cli.data.records import PromptRecord
from gdro_cli.data.scores import Detail, ScoreRow, ScoreTable
from gdro_cli.data.store import GroupStore
from gdro_cli.errors import StoreError
from gdro_cli.rewards.base import Reward
from gdro_cli.rewards.geneval.detection import ColourClassifier, Detector
from gdro_cli.rewards.ocr import OcrReward
from gdro_cli.rewards.pool import ScoringPool, usable_cores
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


def missing_limits(recipe: Recipe) -> MissingLimits:
    """How much may be missing of an evaluation point that is compared with others."""
    return MissingLimits(recipe.reward.max_failed_share, recipe.judge.max_failed_share)


@dataclass(frozen=True, slots=True)
class Measured:
    """The values of one measure, as ``core.scores`` takes them."""

    values: list[list[float | None]]
    """Of each prompt's images, in the store's order; None is missing."""
    strata: list[str] | None
    """The tag of each prompt, where the measure is a mean of tags."""

    def interval(self, *, samples: int) -> Interval:
        """Mean and bootstrap interval. Raises StoreError when nothing, or nothing of one tag, was scored."""
        try:
            return bootstrap_ci(self.values, strata=self.strata, samples=samples)
        except ValueError as error:
            raise _nothing_scored(error) from error

    def gain(self, base: Measured, *, samples: int) -> Interval:
        """Paired difference to ``base``. Raises StoreError when nothing, or nothing of one tag, was scored in both."""
        try:
            return paired_bootstrap(base.values, self.values, strata=self.strata, samples=samples)
        except ValueError as error:
            raise _nothing_scored(error) from error


def _nothing_scored(error: ValueError) -> StoreError:
    return StoreError(f"there is {error}: mend what the scores' reasons name, and score again")


def measured(measure: Measure, prompts: Iterable[PromptRecord], rows: Iterable[ScoreRow]) -> Measured:
    """The values of ``measure`` for those of ``prompts`` that it is about."""
    chosen = [p for p in prompts if measure.tag is None or p.metadata.get("tag") == measure.tag]
    values: dict[str, list[float | None]] = {prompt.id: [] for prompt in chosen}
    for row in rows:
        if row.prompt_id in values:
            values[row.prompt_id].append(row.measured(measure.detail))
    strata = [str(prompt.metadata["tag"]) for prompt in chosen] if measure.by_tag else None
    return Measured(list(values.values()), strata)


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


def open_pool(recipe: Recipe, *, sharing: int = 1) -> ScoringPool:
    """Processes that score; a context manager. Large networks get one process with all threads, not a copy per core.

    ``sharing`` is how many processes of this machine have a pool each: they share the cores.
    """
    if recipe.reward.workers != "auto":
        return ScoringPool(open_reward(recipe), workers=recipe.reward.workers)
    if recipe.reward.kind == "geneval" and "large" in _sizes(recipe):
        return ScoringPool(open_reward(recipe), workers=1)
    return ScoringPool(open_reward(recipe), workers=max(1, usable_cores() // sharing))


def open_table(recipe: Recipe, store: GroupStore, *, command: str = "gdro score") -> ScoreTable:
    """Make or open the table of the recipe's reward beside ``store``; ``command`` makes the scores."""
    version = open_reward(recipe).version
    return ScoreTable.create_or_open(store, recipe.reward.kind, provenance=version, command=command)


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
