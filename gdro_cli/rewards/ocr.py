"""The OCR reward: is the text that the prompt asks for readable in the image?

The rule is the one of Flow-GRPO (arXiv 2505.05470), which other public trainers use too:

    r = 1 - min(d, len(target)) / len(target),   d = 0 if target is a part of the recognised text,
                                                 else the Levenshtein distance between the two,

both sides without spaces and in lower case, the recognised lines joined in reading order without a separator.
The exemption for parts makes extra or repeated text free of charge, so each score also carries ``similarity``
and ``exact``, which know no exemption.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rapidfuzz.distance import Levenshtein

from gdro_cli.errors import UserError
from gdro_cli.rewards.base import (
    ImageSource,
    PromptLike,
    Score,
    UnreadableImageError,
    describe,
    read_rgb,
)
from gdro_cli.rewards.ocr_engine import EngineKind, OcrEngine, Reading, engine_version
from gdro_cli.rewards.ocr_models import DETECTION_MODEL, RECOGNITION_MODEL, OcrModels, find_models

RULE = "flow-grpo-substring-1"
"""Name of the reward rule in the provenance; it changes whenever the same reading would score differently."""


def normalise(text: str) -> str:
    """The text without spaces and in lower case; everything else, punctuation too, is kept."""
    return text.replace(" ", "").lower()


def ocr_reward(target: str, recognised: str) -> float:
    """Flow-GRPO's reward of a recognised text, in [0, 1]; 1 also when the target is only a part of it.

    Raises ValueError when nothing of ``target`` is left after ``normalise``.
    """
    wanted, got = _wanted(target), normalise(recognised)
    if wanted in got:
        return 1.0
    return 1.0 - min(Levenshtein.distance(wanted, got), len(wanted)) / len(wanted)


def similarity(target: str, recognised: str) -> float:
    """``1 - d / max(lengths)`` in [0, 1], without the exemption for parts: unasked text costs.

    Raises ValueError when nothing of ``target`` is left after ``normalise``.
    """
    wanted, got = _wanted(target), normalise(recognised)
    return 1.0 - Levenshtein.distance(wanted, got) / max(len(wanted), len(got))


def exact_match(target: str, recognised: str) -> bool:
    """Whether both texts are the same after ``normalise``. Raises ValueError for an empty target."""
    return _wanted(target) == normalise(recognised)


def target_text(prompt: PromptLike) -> str:
    """The text to look for. Raises UserError naming the prompt when it has none."""
    if prompt.target is None or not normalise(prompt.target):
        raise UserError(
            f"the prompt {prompt.prompt!r} names no text for the OCR reward to look for: put the text "
            f"between double quotes in the prompt, or give it as `target`"
        )
    return prompt.target


class OcrReward:
    """Scores images by what PaddleOCR reads in them.

    Making one checks packages and weights in well under a second and loads nothing; ``load`` (or the first
    ``score``) loads the engine. Details of a measured score: ``text`` (lines joined), ``lines``,
    ``line_confidences``, ``exact`` (bool), ``similarity``, ``confidence`` (mean over lines, ``None`` without
    text) and ``text_area`` (area of the detected boxes as a share of the image).

    Args:
        recognition_width: pixels to which a text line of height 48 is padded for recognition; wider lines
            keep their shape.
        detection_model: name of the detection model.
        recognition_model: name of the recognition model.
        model_dir: folder with one sub-folder per model name; ``None`` for the weights that are installed.
        engine: ``onnxruntime``, or ``paddle`` where the package paddlepaddle is installed.
        threads: threads of one engine. Use more workers rather than more threads.

    Raises:
        PrerequisiteError: a package or weights are missing or are not what they should be.
    """

    def __init__(
        self,
        *,
        recognition_width: int = 160,
        detection_model: str = DETECTION_MODEL,
        recognition_model: str = RECOGNITION_MODEL,
        model_dir: str | Path | None = None,
        engine: EngineKind = "onnxruntime",
        threads: int = 1,
    ) -> None:
        self._kind: EngineKind = engine
        self._threads = threads
        versions = engine_version(engine)
        self._models: OcrModels = find_models(
            detection_model,
            recognition_model,
            recognition_width=recognition_width,
            model_dir=None if model_dir is None else Path(model_dir),
            weights_format="onnx" if engine == "onnxruntime" else "paddle",
        )
        self._version = {"reward": "ocr", "rule": RULE, **versions, **self._models.version}
        self._engine: OcrEngine | None = None

    @property
    def version(self) -> Mapping[str, Any]:
        """Provenance: rule, engine, runtime and library versions, model names, digests, recognition width."""
        return self._version

    def load(self) -> None:
        """Load the engine; a second call does nothing. Raises ``PrerequisiteError``."""
        self._loaded()

    def score(self, images: Sequence[ImageSource], prompts: Sequence[PromptLike]) -> list[Score]:
        """Score ``images[i]`` for ``prompts[i]``, in order.

        Raises:
            UserError: a prompt names no text to look for.
            ValueError: not as many prompts as images.
            PrerequisiteError: the engine cannot be loaded.
        """
        targets = [target_text(prompt) for prompt in prompts]
        engine = self._loaded()
        return [_score_one(engine, image, target) for image, target in zip(images, targets, strict=True)]

    def _loaded(self) -> OcrEngine:
        if self._engine is None:
            self._engine = OcrEngine(self._models, kind=self._kind, threads=self._threads)
        return self._engine

    def __getstate__(self) -> dict[str, Any]:
        """Everything but the loaded engine, so that a reward can be sent to a worker process."""
        return {**self.__dict__, "_engine": None}


def _wanted(target: str) -> str:
    wanted = normalise(target)
    if not wanted:
        raise ValueError("the target text is empty")
    return wanted


def _score_one(engine: OcrEngine, source: ImageSource, target: str) -> Score:
    try:
        image = read_rgb(source)
    except UnreadableImageError as error:
        return Score(None, str(error))
    try:
        reading = engine.read(image)
    except Exception as error:  # noqa: BLE001 - whatever the engine raises concerns this image, not the others
        return Score(None, f"the OCR engine failed on this image: {describe(error)}")
    return _judge(reading, target)


def _judge(reading: Reading, target: str) -> Score:
    text = reading.text
    details = {
        "text": text,
        "lines": list(reading.lines),
        "line_confidences": [round(value, 4) for value in reading.confidences],
        "exact": exact_match(target, text),
        "similarity": similarity(target, text),
        "confidence": round(reading.confidence, 4) if reading.confidence is not None else None,
        "text_area": round(reading.text_area, 4),
    }
    return Score(ocr_reward(target, text), None, details)
