"""What the base class does for an author of a reward."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from gdro_cli.config.base import StrictModel
from gdro_cli.errors import PrerequisiteError, UserError
from gdro_cli.rewards import PromptLike, Reward, Score
from gdro_cli.rewards.registry import reward_class
from tests.support.ocr_signs import ask


class WidthSettings(StrictModel):
    """Keys of the reward below."""

    unit: int = 10
    """Pixels that make a reward of 1."""


class Width(Reward):
    """The width in units. It fails on images 17 pixels wide; those 19 pixels wide are a mistake of the user's."""

    name = "width"
    Settings = WidthSettings
    settings: WidthSettings
    scale = (0.0, 2.0)
    loads = 0

    @property
    def version(self) -> Mapping[str, Any]:
        return {"reward": self.name}

    def load(self) -> None:
        self.loads += 1

    @classmethod
    def facts(cls, details: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
        yield "height", str(details["height"])
        yield "depth", "8 bits"

    def score_image(self, image: Image.Image, prompt: PromptLike) -> float | Score:
        if image.width == 17:
            raise RuntimeError("seventeen\nand more")
        if image.width == 19:
            raise PrerequisiteError("the ruler is missing")
        if image.height > 1:
            return Score(1.0, None, {"height": image.height, "size": [image.width, image.height]})
        return image.width / self.settings.unit


def images(*widths: int) -> list[Image.Image]:
    return [Image.new("L", (width, 1)) for width in widths]


def test_numbers_become_scores_and_failures_are_missing(tmp_path: Path) -> None:
    reward = Width(WidthSettings(unit=5))
    (tmp_path / "x.png").write_text("not an image")
    scores = reward.score([*images(10, 17), tmp_path / "x.png"], [ask("A")] * 3)
    assert scores[0] == Score(2.0)
    assert scores[1] == Score(None, "the reward width failed on this image: RuntimeError: seventeen")
    assert scores[2].value is None and "x.png cannot be decoded" in str(scores[2].reason)
    assert reward.loads == 1
    assert Width().score(images(10), [ask("A")]) == [Score(1.0)]


@pytest.mark.parametrize(
    ("scale", "values"),
    [
        ((0.0, 2.0), [2.0, 0.5, 2.000001, None]),
        ((1.0, 2.0), [2.0, None, 2.000001, None]),
        ((-math.inf, math.inf), [2.0, 0.5, 2.000001, 3.0]),
        ((0.0, math.inf), [2.0, 0.5, 2.000001, 3.0]),
    ],
)
def test_a_value_outside_the_scale_is_missing(scale: tuple[float, float], values: list[float | None]) -> None:
    reward = Listed([2.0, 0.5, 2.000001, 3.0])
    vars(reward)["scale"] = scale
    scores = reward.score(images(1, 1, 1, 1), [ask("A")] * 4)
    assert [score.value for score in scores] == values
    if values[3] is None:
        assert scores[3].reason == (
            f"the reward listed gave 3, outside its scale ({scale[0]:g} to 2): correct the class attribute `scale`"
        )


def test_errors_that_concern_every_image_are_raised() -> None:
    with pytest.raises(PrerequisiteError, match="the ruler is missing"):
        Width().score(images(19), [ask("A")])
    with pytest.raises(ValueError, match="zip"):
        Width().score(images(1, 2), [ask("A")])


class Listed(Width):
    """The next of some values."""

    name = "listed"

    def __init__(self, values: list[float]) -> None:
        super().__init__()
        self.values = values

    def score_image(self, image: Image.Image, prompt: PromptLike) -> float:
        return self.values.pop(0)


class Unfinished(Reward):
    """Its author has not written the scoring."""

    name = "unfinished"
    version = None  # type: ignore[assignment]


def test_an_unfinished_reward_says_what_it_lacks() -> None:
    (score,) = Unfinished().score(images(1), [ask("A")])
    assert "Unfinished has neither score_image nor score" in str(score.reason)


def test_captions_and_cells() -> None:
    (score,) = Width().score([Image.new("RGB", (4, 3))], [ask("A")])
    assert Width.caption(1.0, score.details) == ("reward 1.00", "height: 3")  # a sheet has room for two lines
    assert Width.cells(score.details) == {"height": 3}


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_score_is_a_finite_number(value: float) -> None:
    with pytest.raises(ValueError, match="a score is a finite number"):
        Score(value)


@pytest.mark.parametrize("detail", [math.nan, {1, 2}, Path("x")])
def test_details_are_json_values(detail: object) -> None:
    with pytest.raises((TypeError, ValueError), match="JSON"):
        Score(0.5, None, {"detail": detail})


class Needy(Width):
    """A reward that needs a text and a key."""

    needs = frozenset({"target", "style"})


@pytest.mark.parametrize(
    ("prompt", "target", "metadata", "expected"),
    [
        ('a "B"', None, {"style": "neon"}, "B"),
        ('a "B"', "C", {"style": "neon"}, "C"),
        ("a sign", "C", {"style": None}, "C"),
        ('a "B"', None, {}, ValueError("the key style is missing")),
        ("a sign", None, {"style": 1}, ValueError("it has no text in double quotes")),
        ('a " "', None, {"style": 1}, ValueError("the text that the image must say is empty")),
    ],
)
def test_what_a_prompt_must_carry(
    prompt: str, target: str | None, metadata: dict[str, Any], expected: str | ValueError
) -> None:
    if isinstance(expected, str):
        assert Needy().read_prompt(prompt, target=target, metadata=metadata) == expected
    else:
        with pytest.raises(ValueError, match=str(expected)):
            Needy().read_prompt(prompt, target=target, metadata=metadata)
    assert Width().read_prompt('a "B"', target=None, metadata={}) is None


def test_a_reward_that_is_not_installed() -> None:
    with pytest.raises(UserError, match="there is no reward 'music' in this installation \\(it has ocr, geneval"):
        reward_class("music")
