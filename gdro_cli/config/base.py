"""The base class of every recipe section, and the annotations that say what a key is for."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from pydantic import BaseModel, ConfigDict

Effect = Literal["images", "scores", "training", "measurement", "evaluation", "speed", "label"]
"""What a change of a key's value changes:

- ``images``: the images in a store.
- ``scores``: the rewards of given images.
- ``training``: what a training learns from given images and rewards.
- ``measurement``: what the evaluation points of a training and ``gdro eval`` measure.
- ``evaluation``: what ``gdro eval`` alone measures, or the weights that it measures.
- ``speed``: speed, memory, disk space and messages only. Numbers may change by rounding.
- ``label``: what the recipe says about itself.
"""


class StrictModel(BaseModel):
    """A section of a recipe: immutable, without unknown keys or silent conversions, with a docstring per field."""

    model_config = ConfigDict(
        frozen=True,
        extra="forbid",
        strict=True,
        allow_inf_nan=False,
        validate_default=True,
        use_attribute_docstrings=True,
    )


class Affects:
    """The effects of a key, or those of a section's keys that have no annotation of their own."""

    def __init__(self, *effects: Effect) -> None:
        self.effects = frozenset(effects)


@dataclass(frozen=True, slots=True)
class StoredGroupsOnly:
    """Only methods that train on stored groups use the key."""

    instead: str | None = None
    """The key that online methods have instead."""


@dataclass(frozen=True, slots=True)
class FallsBackTo:
    """The key whose value counts if the annotated key is not set."""

    key: str
