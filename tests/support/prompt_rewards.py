"""Rewards that prompts are read for; making one needs no weights."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from gdro_cli.config.sections import GenEvalReward as GenEvalSettings
from gdro_cli.rewards.base import Reward
from gdro_cli.rewards.geneval.reward import GenEvalReward
from gdro_cli.rewards.ocr.reward import OcrReward

OCR = OcrReward()
SHAPES = GenEvalReward()
"""Knows the embedded world's six shapes."""
COCO = GenEvalReward(GenEvalSettings(detector="mask2former"))
"""Knows COCO's 80 classes."""


class Anything(Reward):
    """Needs nothing of a prompt."""

    name = "anything"

    @property
    def version(self) -> Mapping[str, Any]:
        return {}


ANYTHING = Anything()
REWARDS: dict[str, Reward] = {"ocr": OCR, "geneval": COCO}
