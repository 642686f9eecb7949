"""The GenEval reward on drawn images, with a detector and a colour classifier that look at the pixels."""

from __future__ import annotations

import json
import pickle
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from gdro_cli.errors import PrerequisiteError, UserError
from gdro_cli.rewards.base import ImageSource, Reward
from gdro_cli.rewards.geneval.reward import GenEvalReward
from gdro_cli.rewards.pool import ScoringPool
from tests.support.ocr_signs import Prompt
from tests.support.rectangles import CLASSIFIER_FAILS, DETECTOR_FAILS, RectangleColours, RectangleDetector, draw

CLOCK = {"class": "clock", "count": 1}
BUS = {"class": "bus", "count": 1}
RED_CLOCK_AND_BUS_LEFT_OF_IT = {
    "tag": "position",
    "include": [CLOCK | {"color": "red"}, BUS | {"position": ["left of", 0]}],
}


def ask(metadata: dict[str, Any]) -> Prompt:
    return Prompt("a photo of what the metadata says", None, metadata)


def single(width: int = 64) -> Image.Image:
    return draw(("red", 2, 5, 10, 10), width=width)


@pytest.fixture
def reward() -> GenEvalReward:
    return GenEvalReward(detector=RectangleDetector(), colours=RectangleColours())


def test_an_image_that_matches_its_prompt(reward: Reward) -> None:
    image = draw(("red", 40, 20, 10, 10), ("blue", 4, 21, 12, 8), ("green", 30, 50, 5, 9))
    (score,) = reward.score([image], [ask(RED_CLOCK_AND_BUS_LEFT_OF_IT)])
    assert (score.value, score.reason) == (1.0, None)
    assert score.details == {
        "tag": "position",
        "accuracy": True,
        "strict": True,
        "soft": 1.0,
        "parts": [1.0, 1.0, 1.0, 1.0],
        "reasons": [],
        # Only objects of a class whose colour a clause demands have a colour; the bottle is in no clause.
        "detections": [
            {"label": "clock", "confidence": 1.0, "box": [40.0, 20.0, 50.0, 30.0], "colour": "red"},
            {"label": "bus", "confidence": 0.96, "box": [4.0, 21.0, 16.0, 29.0]},
            {"label": "bottle", "confidence": 0.45, "box": [30.0, 50.0, 35.0, 59.0]},
        ],
    }
    json.dumps(score.details, allow_nan=False)


def test_the_value_is_the_soft_reward(reward: Reward) -> None:
    # Two red clocks instead of one: count 0, colour 0; one bus: 1; right of the clocks: 0. Mean of four: 0.25.
    image = draw(("red", 2, 2, 10, 10), ("red", 2, 22, 10, 10), ("blue", 40, 10, 12, 8))
    (score,) = reward.score([image], [ask(RED_CLOCK_AND_BUS_LEFT_OF_IT)])
    assert score.value == score.details["soft"] == 0.25
    assert (score.details["accuracy"], score.details["strict"]) == (False, False)
    assert len(score.details["reasons"]) == 3


def test_an_empty_image_is_a_measured_zero(reward: Reward) -> None:
    (score,) = reward.score([draw()], [ask(RED_CLOCK_AND_BUS_LEFT_OF_IT)])
    assert (score.value, score.reason, score.details["detections"]) == (0.0, None, [])


def test_each_prompt_of_a_batch_has_the_threshold_of_its_tag() -> None:
    # Squares of 10, 9 and 5 pixels: confidences 1.0, 0.81 and 0.25. One counts for the tag counting, two for others.
    image = draw(("red", 2, 2, 10, 10), ("blue", 20, 2, 9, 9), ("green", 40, 2, 5, 5))
    detector = RectangleDetector()
    prompts = [
        ask({"tag": tag, "include": [{"class": "clock", "count": 2}]}) for tag in ("counting", "two_object", "counting")
    ]
    scores = GenEvalReward(detector=detector, colours=RectangleColours()).score([image] * 3, prompts)
    assert [score.value for score in scores] == [0.5, 1.0, 0.5]
    assert [len(score.details["detections"]) for score in scores] == [1, 2, 1]
    assert detector.batches == [3]


def test_the_colour_classifier_sees_only_objects_whose_colour_matters() -> None:
    colours = RectangleColours()
    reward = GenEvalReward(detector=RectangleDetector(), colours=colours)
    image = draw(("red", 2, 2, 10, 10), ("red", 20, 2, 10, 10), ("blue", 40, 2, 12, 8))
    reward.score([image], [ask({"tag": "two_object", "include": [CLOCK, BUS]})])
    assert colours.asked == 0
    reward.score([image], [ask({"tag": "colors", "include": [CLOCK | {"color": "red"}]})])
    assert colours.asked == 2


def test_an_image_that_cannot_be_decoded_is_missing_and_the_others_are_scored(reward: Reward, tmp_path: Path) -> None:
    good, cut, text = tmp_path / "good.png", tmp_path / "cut.png", tmp_path / "text.png"
    single().save(good)
    cut.write_bytes(good.read_bytes()[:60])
    text.write_text("not an image")
    sources = [cut, good, text, tmp_path / "none.png"]
    scores = reward.score(sources, [ask({"tag": "single_object", "include": [CLOCK]})] * 4)
    assert [score.value for score in scores] == [None, 1.0, None, None]
    for source, score in zip(sources, scores, strict=True):
        assert score.reason is None or (str(source) in score.reason and "cannot be decoded" in score.reason)


def test_no_readable_image_and_no_image(reward: Reward, tmp_path: Path) -> None:
    (score,) = reward.score([tmp_path / "none.png"], [ask({"tag": "single_object", "include": [CLOCK]})])
    assert score.value is None
    assert reward.score([], []) == []


def test_if_the_detector_fails_on_an_image_only_that_image_is_missing() -> None:
    detector = RectangleDetector()
    images = [single(), single(DETECTOR_FAILS), single()]
    scores = GenEvalReward(detector=detector, colours=RectangleColours()).score(
        images, [ask({"tag": "single_object", "include": [CLOCK]})] * 3
    )
    assert [score.value for score in scores] == [1.0, None, 1.0]
    assert scores[1].reason == "the detector failed on this image: RuntimeError: seventeen"
    assert detector.batches == [3, 1, 1, 1]


def test_if_the_classifier_fails_on_an_image_only_that_image_is_missing(reward: Reward) -> None:
    images = [single(), single(CLASSIFIER_FAILS), single(CLASSIFIER_FAILS)]
    coloured, plain = ({"tag": "colors", "include": [clause]} for clause in (CLOCK | {"color": "red"}, CLOCK))
    scores = reward.score(images, [ask(coloured), ask(coloured), ask(plain)])
    assert [score.value for score in scores] == [1.0, None, 1.0]
    assert scores[1].reason == "the colour classifier failed on this image: RuntimeError: nineteen"


class UnfetchableDetector(RectangleDetector):
    """Its weights turn out to be missing only when it is used."""

    def detect(self, images: Any, *, minimum: float) -> Any:
        raise PrerequisiteError("the weights cannot be fetched")


def test_errors_for_the_user_are_not_missing_images() -> None:
    reward = GenEvalReward(detector=UnfetchableDetector(), colours=RectangleColours())
    with pytest.raises(PrerequisiteError, match="cannot be fetched"):
        reward.score([single()] * 2, [ask({"tag": "single_object", "include": [CLOCK]})] * 2)


class ForgetfulDetector(RectangleDetector):
    """Gives no answer for the last image of a batch of several."""

    def detect(self, images: Any, *, minimum: float) -> Any:
        return super().detect(images, minimum=minimum)[: max(len(images) - 1, 1)]


class ForgetfulColours(RectangleColours):
    """Names one colour too few."""

    def classify(self, image: Any, objects: Any) -> Any:
        return super().classify(image, objects)[1:]


def test_too_few_results_are_never_assigned_to_another_image() -> None:
    images = [single(), draw(), single()]
    prompts = [ask({"tag": "colors", "include": [CLOCK | {"color": "red"}]})] * 3
    scores = GenEvalReward(detector=ForgetfulDetector(), colours=RectangleColours()).score(images, prompts)
    assert [score.value for score in scores] == [1.0, 0.0, 1.0]
    scores = GenEvalReward(detector=RectangleDetector(), colours=ForgetfulColours()).score(images, prompts)
    assert [score.value for score in scores] == [None, 0.0, None]


@pytest.mark.parametrize(
    ("metadata", "problem"),
    [
        ({"tag": "single_object", "include": [{"class": "clok", "count": 1}]}, r"'clok'.*did you mean `clock`\?"),
        ({"tag": "single_object", "include": [{"class": "xyz", "count": 1}]}, "it knows clock, bus, bottle"),
        ({"tag": "counting", "include": [CLOCK], "exclude": [{"class": "dog", "count": 2}]}, r"exclude\[0\].*'dog'"),
        ({"include": [CLOCK]}, "the key tag is missing"),
        ({}, "the key tag is missing"),
        ({"tag": "position", "include": [CLOCK, BUS | {"position": ["left of", 1]}]}, "it must be an earlier one"),
    ],
)
def test_a_prompt_that_cannot_be_scored_is_a_user_error(reward: Reward, metadata: dict[str, Any], problem: str) -> None:
    good = ask({"tag": "single_object", "include": [CLOCK]})
    with pytest.raises(UserError, match=f"'a photo of what the metadata says': .*{problem}"):
        reward.score([single(), single()], [good, ask(metadata)])


def test_a_prompt_is_needed_for_each_image(reward: Reward) -> None:
    with pytest.raises(ValueError, match="zip"):
        reward.score([single()] * 2, [ask({"tag": "single_object", "include": [CLOCK]})])


def test_version_names_the_rule_and_both_models(reward: Reward) -> None:
    assert reward.version == {
        "reward": "geneval",
        "rule": "geneval-1",
        "detector": {"name": "rectangles", "weights": "none"},
        "colours": {"name": "middle"},
    }


class Unloadable(RectangleDetector):
    """Its weights are missing."""

    def load(self) -> None:
        raise PrerequisiteError("the weights are missing")


def test_models_are_loaded_by_load_alone_and_its_errors_are_for_the_user() -> None:
    detector, colours = RectangleDetector(), RectangleColours()
    reward = GenEvalReward(detector=detector, colours=colours)
    assert [detector.loaded, colours.loaded] == [False, False]
    reward.load()
    assert [detector.loaded, colours.loaded] == [True, True]
    with pytest.raises(PrerequisiteError, match="the weights are missing"):
        GenEvalReward(detector=Unloadable(), colours=colours).score(
            [single()], [ask({"tag": "single_object", "include": [CLOCK]})]
        )


def test_a_pickled_reward_scores_the_same(reward: Reward) -> None:
    copy: Reward = pickle.loads(pickle.dumps(reward))
    pair = [draw(("red", 40, 20, 10, 10), ("blue", 4, 21, 12, 8))], [ask(RED_CLOCK_AND_BUS_LEFT_OF_IT)]
    assert copy.version == reward.version
    assert copy.score(*pair) == reward.score(*pair)


@pytest.mark.slow
def test_defect_absent_images_reach_a_worker_unchanged(reward: Reward, tmp_path: Path) -> None:
    """Public code sends JPEG to a server. The detector here knows only pure colours, which JPEG does not preserve."""
    image = draw(("red", 41, 21, 10, 10), ("blue", 5, 22, 12, 8))
    image.save(tmp_path / "p.png")
    image.save(tmp_path / "p.jpg")
    cut = tmp_path / "cut.png"
    cut.write_bytes((tmp_path / "p.png").read_bytes()[:60])
    images: list[ImageSource] = [image, tmp_path / "p.png", tmp_path / "p.jpg", cut, single(DETECTOR_FAILS)]
    prompts = [ask(RED_CLOCK_AND_BUS_LEFT_OF_IT)] * len(images)
    with ScoringPool(reward, workers=1) as pool:
        scores = pool.score(images, prompts)
    assert [score.value for score in scores[:2]] == [1.0, 1.0]
    assert scores[2].value != 1.0
    assert [score.value for score in scores[3:]] == [None, None]
    assert scores == reward.score(images, prompts)
