"""The OCR reward: PaddleOCR reads the image, and ``rules`` compares the text with the prompt's target."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from gdro_cli.config.sections import OcrReward as OcrSettings
from gdro_cli.core.measures import Detail, Measure
from gdro_cli.core.quotes import quoted_text
from gdro_cli.errors import PrerequisiteError, UserError
from gdro_cli.rewards.base import PromptLike, Resources, Reward, Score
from gdro_cli.rewards.ocr.rules import RULE, exact_match, letters, normalise, ocr_reward, similarity

if TYPE_CHECKING:
    from PIL import Image

    from gdro_cli.rewards.ocr.engine import OcrEngine
    from gdro_cli.rewards.ocr.models import OcrModels


_SHOWN = 20
"""Letters that a message names."""
_SIGN = "2749"
"""What an engine must read. Digits, which recognisers of all scripts have."""


class OcrReward(Reward):
    """Scores images by the text that PaddleOCR reads in them.

    Details of a measured score: ``text`` (lines joined), ``lines``, ``line_confidences``, ``exact`` (bool),
    ``similarity``, ``confidence`` (mean over lines, ``None`` without text), ``confident`` (the reward times the
    confidence) and ``text_area`` (area of the detected boxes as a share of the image).
    """

    name = "ocr"
    purpose = "to write the text that a prompt asks for"
    Settings = OcrSettings
    needs = frozenset({"target"})
    measures = (
        Measure("reward"),
        Measure("exact match", "exact"),
        Measure("similarity", "similarity"),
        Measure("confident reward", "confident"),
        Measure("text area", "text_area"),
    )
    signals: ClassVar = {"text_area": "share of the image that text covers"}
    unit_details = frozenset({"exact", "similarity", "confident", "text_area"})
    columns = ("exact", "similarity", "text", "confidence")
    settings: OcrSettings
    _engine: OcrEngine | None = None

    @property
    def trained_on(self) -> Detail:
        """The objective: the score's value for the accuracy, a detail, or several with their weights."""
        objective = self.settings.objective
        if isinstance(objective, str):
            return None if objective == "accuracy" else objective
        return {"" if name == "accuracy" else str(name): weight for name, weight in objective.items()}

    @property
    def resources(self) -> Resources:
        """One process for paddlepaddle, which takes the GPU where there is one; otherwise one process per core."""
        return "device" if self.settings.engine == "paddle" else "cores"

    def read_prompt(self, prompt: str, *, target: str | None, metadata: Mapping[str, Any]) -> str | None:
        """The text to look for. Raises ValueError if there is none, or if nothing of it is compared."""
        text = super().read_prompt(prompt, target=target, metadata=metadata)
        if text is not None and not normalise(text):
            raise ValueError("the text that the image must say is empty")
        return text

    def check_prompts(self, prompts: Sequence[PromptLike]) -> Sequence[str]:
        """A remark that names the letters of targets that the recogniser lacks.

        Raises:
            UserError: it has no letter of any target, so that every reward would be 0.
            PrerequisiteError: its files are missing.
        """
        targets = [letters(target_text(prompt)) for prompt in prompts]
        wanted = frozenset().union(*targets)
        if self.settings.model_dir is None and "".join(wanted).isascii():
            return ()  # the installed recogniser has all of ASCII
        known = frozenset().union(*map(letters, self.models.characters))
        lacking = wanted - known
        if not known or not lacking:
            return ()
        name = self.settings.recognition_model
        listed = ", ".join(sorted(lacking)[:_SHOWN]) + (", ..." if len(lacking) > _SHOWN else "")
        remedy = "name a recogniser that has them (reward.ocr.recognition_model, reward.ocr.model_dir)"
        if wanted == lacking:
            raise UserError(
                f"the recogniser {name} has no letter of any text that the prompts ask for ({listed}), so every reward"
                f" would be 0: {remedy}"
            )
        count = sum(not lacking.isdisjoint(target) for target in targets)
        return (
            f"prompts with letters that the recogniser {name} does not have ({listed}), so that no image can satisfy"
            f" them: {count} of {len(prompts)}; {remedy}",
        )

    @classmethod
    def facts(cls, details: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
        """The text that was read."""
        if "text" in details:
            yield "read", str(details["text"]) or "-"

    @cached_property
    def models(self) -> OcrModels:
        """The model folders. Raises ``PrerequisiteError``."""
        from gdro_cli.rewards.ocr.models import find_models

        settings = self.settings
        return find_models(
            settings.detection_model,
            settings.recognition_model,
            recognition_width=settings.recognition_width,
            model_dir=None if settings.model_dir is None else Path(settings.model_dir),
            weights_format="onnx" if settings.engine == "onnxruntime" else "paddle",
        )

    @cached_property
    def version(self) -> Mapping[str, Any]:
        """Provenance: rule, engine, runtime and library versions, model names, digests, recognition width."""
        from gdro_cli.rewards.ocr.engine import engine_version

        return {"reward": self.name, "rule": RULE, **engine_version(self.settings.engine), **self.models.version}

    def load(self) -> None:
        """Load the engine; a second call does nothing. Raises ``PrerequisiteError``."""
        self._loaded()

    def score_image(self, image: Image.Image, prompt: PromptLike) -> Score:
        """Score one RGB image. Errors of the engine are not caught; a prompt without target is a ``UserError``."""
        target, reading = target_text(prompt), self._loaded().read(image)
        text = reading.text
        accuracy = ocr_reward(target, text)
        details = {
            "text": text,
            "lines": list(reading.lines),
            "line_confidences": [round(value, 4) for value in reading.confidences],
            "exact": exact_match(target, text),
            "similarity": similarity(target, text),
            "confidence": round(reading.confidence, 4) if reading.confidence is not None else None,
            "confident": round(accuracy * (reading.confidence or 0.0), 4),
            "text_area": round(reading.text_area, 4),
        }
        return Score(accuracy, None, details)

    def _loaded(self) -> OcrEngine:
        if self._engine is None:
            from gdro_cli.rewards.ocr.engine import OcrEngine

            engine = OcrEngine(self.models, kind=self.settings.engine)
            if self.settings.model_dir is not None or self.settings.engine == "paddle":
                self._try_out(engine)
            self._engine = engine
        return self._engine

    def _try_out(self, engine: OcrEngine) -> None:
        """Let an engine read a plain sign, unless its models lack the letters.

        Otherwise wrong models, a wrong list of characters or a GPU that computes nonsense would give every image 0.

        Raises:
            PrerequisiteError: it reads less than half of the sign.
        """
        from PIL import Image, ImageDraw, ImageFont

        known = frozenset().union(*map(letters, self.models.characters))
        if known and not letters(_SIGN) <= known:
            return
        image = Image.new("RGB", (256, 128), "white")
        ImageDraw.Draw(image).text((128, 64), _SIGN, "black", ImageFont.load_default(64), anchor="mm")
        text = engine.read(image).text
        if similarity(_SIGN, text) < 0.5:
            folder = self.models.recognition.path
            raise PrerequisiteError(
                f"the OCR engine reads {text!r} where {_SIGN} is written, so no score would mean anything: check that"
                f" weights and characters in {folder} belong together, or leave out reward.ocr.engine and"
                " reward.ocr.model_dir"
            )

    def __getstate__(self) -> dict[str, Any]:
        """Everything but the loaded engine, so that a reward can be sent to a worker process."""
        return {**self.__dict__, "_engine": None}


def target_text(prompt: PromptLike) -> str:
    """The text to look for: the target, else what the prompt quotes. Raises UserError naming the prompt without one."""
    target = quoted_text(prompt.prompt) if prompt.target is None else prompt.target
    if target is None or not normalise(target):
        raise UserError(
            f"the prompt {prompt.prompt!r} names no text for the OCR reward to look for: put the text "
            f"between double quotes in the prompt, or give it as `target`"
        )
    return target
