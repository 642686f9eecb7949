"""The GenEval reward: a detector, a colour classifier and the rules.

The value of a score is the soft reward; the official verdict and the strict one are among its details.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any

from gdro_cli.config.sections import GenEvalReward as GenEvalSettings
from gdro_cli.core.geneval import DETECTORS, TAGS, VOCABULARIES, Task, parse_task
from gdro_cli.core.measures import Detail, Measure
from gdro_cli.errors import GdroError, UserError
from gdro_cli.rewards.base import ImageSource, PromptLike, Resources, Reward, Score, one_line, read_all
from gdro_cli.rewards.geneval.rules import RULE, THRESHOLD, judge, select, wants_colours

if TYPE_CHECKING:
    from PIL import Image

    from gdro_cli.rewards.geneval.detection import ColourClassifier, Detection, Detector


class GenEvalReward(Reward):
    """Scores images by the objects that a detector finds in them.

    Details of a measured score: ``tag``, ``accuracy`` and ``strict`` (bool), ``soft`` (the value), ``parts``,
    ``reasons`` (why ``strict`` is False) and ``detections``, the objects that count for this tag: ``label``,
    ``confidence`` (4 digits), ``box`` (left, top, right, bottom in pixels, 1 digit) and ``colour``, if a clause demands
    a colour of that class.

    Args:
        settings: name the two models.
        detector: finds the objects, in place of the one that the settings name.
        colours: names their colours, in place of the one that the settings name.
    """

    name = "geneval"
    purpose = "to draw what a prompt asks for, by GenEval's rules"
    Settings = GenEvalSettings
    needs = frozenset({"tag", "include"})
    measures = (
        Measure("overall", "accuracy", by_tag=True),
        *(Measure(tag, "accuracy", tag=tag) for tag in TAGS),
        Measure("strict reward", "strict"),
        Measure("soft reward", "soft"),
    )
    # The prompts describe no details, so a judge's alignment rises when a hacked model leaves details out.
    judge_axes = ("coherence", "style")
    unit_details = frozenset({"accuracy", "strict", "soft"})
    columns = ("accuracy", "strict", "soft")
    settings: GenEvalSettings
    classes: tuple[str, ...]
    """The classes that prompts may name."""

    def __init__(
        self,
        settings: GenEvalSettings | None = None,
        *,
        detector: Detector | None = None,
        colours: ColourClassifier | None = None,
    ) -> None:
        super().__init__(settings)
        self.classes = VOCABULARIES[DETECTORS[self.settings.detector]]
        if detector is not None:
            self.detector, self.classes = detector, tuple(detector.classes)
        if colours is not None:
            self.colours = colours

    # -- facts ----------------------------------------------------------------------------------------------------

    @property
    def trained_on(self) -> Detail:
        """The objective: one of the three rewards, or several with their weights."""
        objective = self.settings.objective
        return objective if isinstance(objective, str) else {str(name): weight for name, weight in objective.items()}

    @property
    def resources(self) -> Resources:
        """One process for Mask2Former or CLIP, which are large; otherwise one process per core."""
        return "device" if self.settings.detector == "mask2former" or self._colours == "clip" else "cores"

    def read_prompt(self, prompt: str, *, target: str | None, metadata: Mapping[str, Any]) -> str | None:
        """Check the metadata. Raises ValueError if it is not GenEval's, or names a class that the detector lacks."""
        parse_task(metadata, classes=self.classes)
        return target

    @classmethod
    def facts(cls, details: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
        """The official verdict, and the detected objects."""
        if details.get("accuracy") is not None:
            yield "GenEval", "correct" if details["accuracy"] else "wrong"
        if "detections" in details:
            yield "seen", seen(details["detections"])

    @classmethod
    def caption(cls, value: float, details: Mapping[str, Any]) -> tuple[str, ...]:
        """The verdict and the soft reward; the detected objects."""
        facts = dict(cls.facts(details))
        return f"{facts.get('GenEval', '-')}, soft reward {value:.2f}", f"seen: {facts.get('seen', '-')}"

    @classmethod
    def cells(cls, details: Mapping[str, Any]) -> dict[str, Any]:
        """The details that are not lists, and the detections as text."""
        detections = {"detections": seen(details["detections"])} if "detections" in details else {}
        return super().cells(details) | detections

    # -- scoring --------------------------------------------------------------------------------------------------

    @cached_property
    def detector(self) -> Detector:
        """Finds the objects. Raises ``PrerequisiteError``."""
        if self.settings.detector == "mask2former":
            from gdro_cli.rewards.geneval.mask2former import MODEL, Mask2FormerDetector

            return Mask2FormerDetector(self.settings.detector_model or MODEL)
        from gdro_cli.embedded import tiny_detector_path
        from gdro_cli.rewards.geneval.segmenter import SegmenterDetector

        return SegmenterDetector(tiny_detector_path())

    @cached_property
    def colours(self) -> ColourClassifier:
        """Names the objects' colours. Raises ``PrerequisiteError``."""
        if self._colours == "clip":
            from gdro_cli.rewards.geneval.clip_colour import MODEL, ClipColours

            return ClipColours(self.settings.colour_model or MODEL)
        from gdro_cli.embedded import tiny_detector_path
        from gdro_cli.rewards.geneval.palette import PaletteColours

        return PaletteColours.read(tiny_detector_path() / "palette.json")

    @property
    def _colours(self) -> str:
        settings = self.settings
        if settings.colours != "auto":
            return settings.colours
        return "palette" if settings.detector == "shapes" else "clip"

    @property
    def version(self) -> Mapping[str, Any]:
        """Provenance: the rules, and the versions of the two models."""
        return {
            "reward": self.name,
            "rule": RULE,
            "detector": dict(self.detector.version),
            "colours": dict(self.colours.version),
        }

    def load(self) -> None:
        """Load both models; a second call does nothing. Raises ``PrerequisiteError``."""
        self.detector.load()
        self.colours.load()

    def score(self, images: Sequence[ImageSource], prompts: Sequence[PromptLike]) -> list[Score]:
        """Score ``images[i]`` for ``prompts[i]``, in order.

        An image that cannot be decoded, or on which a model fails, is missing with a reason.

        Raises:
            UserError: a prompt's metadata is not GenEval's, or names a class that the detector does not know.
            ValueError: the numbers of images and prompts differ.
            PrerequisiteError: a model cannot be loaded.
        """
        tasks = [self._task(prompt) for _, prompt in zip(images, prompts, strict=True)]
        self.load()
        readable, reasons = read_all(images)
        scores = {index: Score(None, reason) for index, reason in reasons.items()}
        detected = self._detect(list(readable.values()))
        for (index, image), objects in zip(readable.items(), detected, strict=True):
            if isinstance(objects, str):
                scores[index] = Score(None, objects)
            else:
                scores[index] = self._judge(image, tasks[index], objects=objects)
        return [scores[index] for index in range(len(images))]

    def _task(self, prompt: PromptLike) -> Task:
        try:
            return parse_task(prompt.metadata, classes=self.detector.classes)
        except ValueError as error:
            raise UserError(f"the GenEval reward cannot score the prompt {prompt.prompt!r}: {error}") from error

    def _detect(self, images: Sequence[Image.Image]) -> list[list[Detection] | str]:
        """The objects of each image, or why the detector failed on it; a failed batch is repeated image by image.

        The threshold is the lowest of all tags, so that the result does not depend on the rest of the batch.
        """
        if not images:
            return []
        try:
            detected = self.detector.detect(images, minimum=THRESHOLD)
            if len(detected) != len(images):
                raise RuntimeError(f"it gave {len(detected)} answers for {len(images)} images")
        except GdroError:
            raise
        except Exception as error:  # noqa: BLE001 - whatever a network raises concerns one image of the batch
            if len(images) == 1:
                return [f"the detector failed on this image: {one_line(error)}"]
            return [objects for image in images for objects in self._detect([image])]
        return list(detected)

    def _judge(self, image: Image.Image, task: Task, *, objects: Sequence[Detection]) -> Score:
        counted = select(objects, tag=task.tag)
        try:
            colours = self._name_colours(image, counted, labels=wants_colours(task))
        except GdroError:
            raise
        except Exception as error:  # noqa: BLE001 - as above
            return Score(None, f"the colour classifier failed on this image: {one_line(error)}")
        verdict = judge(task, counted, colours)
        details = {
            "tag": task.tag,
            "accuracy": verdict.accuracy,
            "strict": verdict.strict,
            "soft": verdict.soft,
            "parts": list(verdict.parts),
            "reasons": list(verdict.reasons),
            "detections": _rows(counted, colours),
        }
        return Score(verdict.soft, None, details)

    def _name_colours(
        self, image: Image.Image, counted: Mapping[str, Sequence[Detection]], *, labels: frozenset[str]
    ) -> dict[str, list[str]]:
        """The colours of all objects of the classes in ``labels``, by class, in the order of ``counted``."""
        objects = [item for label, items in counted.items() if label in labels for item in items]
        colours: dict[str, list[str]] = {}
        for item, name in zip(objects, self.colours.classify(image, objects) if objects else [], strict=True):
            colours.setdefault(item.label, []).append(name)
        return colours


def _rows(counted: Mapping[str, Sequence[Detection]], colours: Mapping[str, Sequence[str]]) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = []
    for label, items in counted.items():
        for number, item in enumerate(items):
            row: dict[str, Any] = {
                "label": label,
                "confidence": round(float(item.confidence), 4),
                "box": [round(float(edge), 1) for edge in item.box],
            }
            if label in colours:
                row["colour"] = colours[label][number]
            rows.append(row)
    return rows


def seen(detections: Sequence[Mapping[str, Any]]) -> str:
    """Detections as text, such as ``2 red circle, star``; a dash if there are none."""
    names = Counter(" ".join(filter(None, (item.get("colour"), item["label"]))) for item in detections)
    return ", ".join(name if count == 1 else f"{count} {name}" for name, count in names.items()) or "-"
