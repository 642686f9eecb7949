"""The GenEval reward: a detector, a colour classifier and the rules.

The value of a score is the soft reward; the official verdict and the strict one are among its details.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from PIL import Image

from gdro_cli.core.geneval import Task, parse_task
from gdro_cli.errors import GdroError, UserError
from gdro_cli.rewards.base import ImageSource, PromptLike, Score, UnreadableImageError, describe, read_rgb
from gdro_cli.rewards.geneval.detection import ColourClassifier, Detection, Detector
from gdro_cli.rewards.geneval.rules import RULE, THRESHOLD, judge, select, wants_colours


class GenEvalReward:
    """Scores images by the objects that a detector finds in them.

    Making one loads nothing; ``load`` (or the first ``score``) does. A reward that shall go to a worker process is sent
    before. Details of a measured score: ``tag``, ``accuracy`` and ``strict`` (bool), ``soft`` (the value), ``parts``,
    ``reasons`` (why ``strict`` is False) and ``detections``, the objects that count for this tag: ``label``,
    ``confidence`` (4 digits), ``box`` (left, top, right, bottom in pixels, 1 digit) and, if a clause asks for a colour
    of their class, ``colour``.

    Args:
        detector: finds the objects; its ``classes`` are what prompts may ask for.
        colours: names their colours, called only for prompts that ask for one.
    """

    def __init__(self, detector: Detector, colours: ColourClassifier) -> None:
        self._detector = detector
        self._colours = colours

    @property
    def version(self) -> Mapping[str, Any]:
        """Provenance: the rules and what the two models say of themselves."""
        return {
            "reward": "geneval",
            "rule": RULE,
            "detector": dict(self._detector.version),
            "colours": dict(self._colours.version),
        }

    def load(self) -> None:
        """Load both models; a second call does nothing. Raises ``PrerequisiteError``."""
        self._detector.load()
        self._colours.load()

    def score(self, images: Sequence[ImageSource], prompts: Sequence[PromptLike]) -> list[Score]:
        """Score ``images[i]`` for ``prompts[i]``, in order.

        An image that cannot be decoded, or on which a model fails, is missing with a reason.

        Raises:
            UserError: a prompt's metadata is not GenEval's, or asks for a class that the detector does not know.
            ValueError: not as many prompts as images.
            PrerequisiteError: a model cannot be loaded.
        """
        tasks = [self._task(prompt) for prompt in prompts]
        if len(images) != len(tasks):
            raise ValueError(f"{len(images)} images but {len(tasks)} prompts")
        self.load()
        scores: dict[int, Score] = {}
        readable: dict[int, Image.Image] = {}
        for number, source in enumerate(images):
            try:
                readable[number] = read_rgb(source)
            except UnreadableImageError as error:
                scores[number] = Score(None, str(error))
        detected = self._detect(list(readable.values()))
        for (number, image), objects in zip(readable.items(), detected, strict=True):
            if isinstance(objects, str):
                scores[number] = Score(None, objects)
            else:
                scores[number] = self._judge(image, tasks[number], objects=objects)
        return [scores[number] for number in range(len(images))]

    def _task(self, prompt: PromptLike) -> Task:
        try:
            return parse_task(prompt.metadata, classes=self._detector.classes)
        except ValueError as error:
            raise UserError(f"the GenEval reward cannot score the prompt {prompt.prompt!r}: {error}") from error

    def _detect(self, images: Sequence[Image.Image]) -> list[list[Detection] | str]:
        """The objects of each image, or why there are none; a failing batch is tried again image by image.

        The threshold is the lowest of all tags, so that what is found does not depend on the rest of the batch.
        """
        if not images:
            return []
        try:
            detected = self._detector.detect(images, minimum=THRESHOLD)
            if len(detected) != len(images):
                raise RuntimeError(f"it gave {len(detected)} answers for {len(images)} images")
        except GdroError:
            raise
        except Exception as error:  # noqa: BLE001 - whatever a network raises concerns one image of the batch
            if len(images) == 1:
                return [f"the detector failed on this image: {describe(error)}"]
            return [answer for image in images for answer in self._detect([image])]
        return list(detected)

    def _judge(self, image: Image.Image, task: Task, *, objects: Sequence[Detection]) -> Score:
        found = select(objects, tag=task.tag)
        try:
            colours = self._name_colours(image, found, labels=wants_colours(task))
        except GdroError:
            raise
        except Exception as error:  # noqa: BLE001 - as above
            return Score(None, f"the colour classifier failed on this image: {describe(error)}")
        verdict = judge(task, found, colours)
        details = {
            "tag": task.tag,
            "accuracy": verdict.accuracy,
            "strict": verdict.strict,
            "soft": verdict.soft,
            "parts": list(verdict.parts),
            "reasons": list(verdict.reasons),
            "detections": _rows(found, colours),
        }
        return Score(verdict.soft, None, details)

    def _name_colours(
        self, image: Image.Image, found: Mapping[str, Sequence[Detection]], *, labels: frozenset[str]
    ) -> dict[str, list[str]]:
        """The colours of all objects of the classes in ``labels``, by class, in the order of ``found``."""
        asked = [item for label, items in found.items() if label in labels for item in items]
        colours: dict[str, list[str]] = {}
        for item, name in zip(asked, self._colours.classify(image, asked) if asked else [], strict=True):
            colours.setdefault(item.label, []).append(name)
        return colours


def _rows(found: Mapping[str, Sequence[Detection]], colours: Mapping[str, Sequence[str]]) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = []
    for label, items in found.items():
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
