"""The names that packages with a reward import, and their signatures: a change here breaks installed plug-ins."""

from __future__ import annotations

import inspect
from typing import Any

from gdro_cli import rewards

NAMES = {
    "Affects": "(*effects: 'Effect') -> 'None'",
    "ImageSource": None,
    "Measure": "(name: 'str', detail: 'Detail' = None, tag: 'str | None' = None, by_tag: 'bool' = False) -> None",
    "PrerequisiteError": None,
    "PromptLike": None,
    "Reward": "(settings: 'BaseModel | None' = None) -> 'None'",
    "Score": "(value: 'float | None', reason: 'str | None' = None, details: 'Mapping[str, Any]' = <factory>) -> None",
    "StrictModel": None,
    "UnreadableImageError": None,
    "UserError": None,
    "read_rgb": "(source: 'ImageSource') -> 'Image.Image'",
}
REWARD = {
    "Settings": "type[BaseModel]",
    "caption": "(value: 'float', details: 'Mapping[str, Any]') -> 'tuple[str, ...]'",
    "cells": "(details: 'Mapping[str, Any]') -> 'dict[str, Any]'",
    "check_prompts": "(self, prompts: 'Sequence[PromptLike]') -> 'Sequence[str]'",
    "columns": "tuple[str, ...]",
    "facts": "(details: 'Mapping[str, Any]') -> 'Iterator[tuple[str, str]]'",
    "judge_axes": "tuple[str, ...]",
    "load": "(self) -> 'None'",
    "measures": "tuple[Measure, ...]",
    "name": "str",
    "needs": "frozenset[str]",
    "purpose": "str",
    "read_prompt": "(self, prompt: 'str', *, target: 'str | None', metadata: 'Mapping[str, Any]') -> 'str | None'",
    "resources": "Resources",
    "scale": "tuple[float, float]",
    "score": "(self, images: 'Sequence[ImageSource]', prompts: 'Sequence[PromptLike]') -> 'list[Score]'",
    "score_image": "(self, image: 'Image.Image', prompt: 'PromptLike') -> 'float | Score'",
    "signals": "Mapping[str, str]",
    "trained_on": "Detail",
    "unit_details": "frozenset[str]",
    "version": "Mapping[str, Any]",
}


def described(cls: type, name: str) -> str:
    """The signature of a method, or the type of an attribute or property."""
    value: Any = getattr(cls, name, None)
    if isinstance(value, property):
        return str(inspect.signature(value.fget).return_annotation)  # type: ignore[arg-type]
    annotation = cls.__annotations__.get(name)
    return str(inspect.signature(value)) if annotation is None else annotation.removeprefix("ClassVar[")[:-1]


def test_the_names_and_their_signatures() -> None:
    assert sorted(rewards.__all__) == sorted(NAMES)
    for name, signature in NAMES.items():
        value = getattr(rewards, name)
        if signature is not None:
            assert str(inspect.signature(value)) == signature, name


def test_the_members_of_a_reward() -> None:
    cls = rewards.Reward
    members = {name for name in (*vars(cls), *cls.__annotations__) if not name.startswith("_")}
    assert {name: described(cls, name) for name in sorted(members)} == REWARD


def test_what_a_prompt_has() -> None:
    members = {name for name in vars(rewards.PromptLike) if not name.startswith("_")}
    assert members == {"prompt", "target", "metadata", "source"}
