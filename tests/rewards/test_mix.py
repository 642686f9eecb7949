"""Mixtures: weights, ranges, what is missing, what prompts must carry, and what a mixture says about itself."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import pytest
from PIL import Image

from gdro_cli.config.load import load_recipe
from gdro_cli.core.measures import Measure
from gdro_cli.data.records import PromptRecord
from gdro_cli.errors import UserError
from gdro_cli.rewards.base import UNIT, Reward, Score
from gdro_cli.rewards.mix import MixReward, MixSettings
from gdro_cli.rewards.mixed_pool import MixedPool
from gdro_cli.rewards.pool import ScoringPool
from gdro_cli.rewards.registry import open_reward, provenance

IMAGES = [Image.new("RGB", (8, 8), (level, level, level)) for level in (0, 51, 255)]
PROMPTS = [PromptRecord(id=str(i), prompt='a sign that says "HI"', target="HI") for i in range(3)]


class Grey(Reward):
    """The mean level, 0 to 1; black has none."""

    name = "ocr"
    purpose = "to be bright"
    measures = (Measure("reward"), Measure("white share", "white"), Measure("words", "words"))
    unit_details = frozenset({"white"})
    judge_axes = ("coherence", "style")

    @property
    def version(self) -> Mapping[str, Any]:
        return {"reward": "grey"}

    def score_image(self, image: Image.Image, prompt: Any) -> Score:
        level = image.convert("L").getpixel((0, 0))
        assert isinstance(level, int)
        return (
            Score(None, "too dark") if level == 0 else Score(level / 255, None, {"white": level == 255, "words": level})
        )


class Points(Reward):
    """From 10 to 20, the darker the better."""

    name = "clip"
    purpose = "to be dark"
    scale = (10.0, 20.0)
    signals: ClassVar = {"ink": "share of ink"}

    @property
    def version(self) -> Mapping[str, Any]:
        return {"reward": "points"}

    def score_image(self, image: Image.Image, prompt: Any) -> Score:
        level = image.convert("L").getpixel((0, 0))
        assert isinstance(level, int)
        return Score(20 - 10 * level / 255, None, {"ink": 1 - level / 255})


def mix(weights: dict[str, float], ranges: dict[str, tuple[float, float]] | None = None) -> MixReward:
    settings = MixSettings(weights=weights, ranges=ranges or {})
    return MixReward(settings, {name: {"ocr": Grey, "clip": Points}[name]() for name in settings.parts})


def values(reward: MixReward) -> list[float | None]:
    return [score.value for score in reward.score(IMAGES, PROMPTS)]


def test_a_mixture_is_the_weighted_mean_of_its_terms() -> None:
    """By hand, for levels 0.2 and 1: clip is 18 and 10, in the range 0.8 and 0."""
    assert values(mix({"ocr": 1})) == [None, pytest.approx(0.2), 1]
    both = mix({"ocr": 3, "clip": 1}, {"clip": (10, 20)})
    assert values(both) == [None, pytest.approx((3 * 0.2 + 0.8) / 4), pytest.approx(3 / 4)]
    assert values(mix({"ocr": 1, "ocr.white": 1})) == [None, pytest.approx(0.1), 1]
    assert values(mix({"clip": 1})) == pytest.approx([20, 18, 10])


def test_ranges_end_at_0_and_1_and_can_be_turned_round() -> None:
    assert values(mix({"clip": 1}, {"clip": (12, 19)})) == pytest.approx([1, 6 / 7, 0])
    assert values(mix({"clip": 1}, {"clip": (19, 12)})) == pytest.approx([0, 1 / 7, 1])


def test_an_image_that_misses_a_part_misses_the_mixture() -> None:
    """What the other parts found stays among the details."""
    first = mix({"clip": 1, "ocr": 1}).score(IMAGES, PROMPTS)[0]
    assert (first.value, first.reason) == (None, "ocr: too dark")
    assert first.details == {"clip": 20, "clip.ink": 1, "ocr": None}


def test_what_a_mixture_says_about_itself() -> None:
    reward = mix({"ocr": 0.8, "clip": 0.2}, {"clip": (10, 20)})
    assert [measure.name for measure in reward.measures] == ["reward", "ocr", "ocr.white", "ocr.words", "clip"]
    assert reward.signals == {"clip.ink": "share of ink"}
    assert reward.judge_axes == ("coherence", "style")
    facts = dict(reward.facts({"ocr": 0.25, "ocr.text": "HI", "clip": None}))
    assert facts == {"ocr": "0.25", "read": "HI"}
    assert reward.scale == UNIT
    assert mix({"ocr": 0.8, "clip": 0.2}).scale != UNIT
    assert mix({"ocr.white": 1}).scale == UNIT and mix({"ocr.words": 1}).scale != UNIT
    assert mix({"ocr.words": 1}, {"ocr.words": (0, 9)}).scale == UNIT


@pytest.mark.parametrize("term", ["ocr.nosuch", "ocr.", "clip.paint"])
def test_a_term_that_no_score_has_is_refused_before_anything_is_sampled(term: str) -> None:
    with pytest.raises(UserError, match=rf"{re.escape(term)} is not a number that (ocr|clip) reports \(it reports "):
        mix({term: 1})


def test_other_weights_are_another_mixture_of_the_same_parts() -> None:
    one, other = (provenance(mix({"ocr": weight, "clip": 1})) for weight in (1, 2))
    assert one != other
    assert one["parts"] == other["parts"] == {"ocr": {"reward": "grey"}, "clip": {"reward": "points"}}


@pytest.mark.slow
def test_each_part_has_its_own_processes() -> None:
    reward = mix({"ocr": 3, "clip": 1}, {"clip": (10, 20)})
    done: list[int] = []
    pools = {name: ScoringPool(part, workers=1) for name, part in reward.parts.items()}
    with MixedPool(reward, pools) as pool:
        scores = pool.score(IMAGES, PROMPTS, on_scored=done.append)
    assert scores == reward.score(IMAGES, PROMPTS)
    assert sum(done) == len(IMAGES)


def test_a_recipe_opens_the_parts_with_their_own_settings() -> None:
    recipe = load_recipe(
        "ocr",
        overrides=[
            "reward.kind=mix",
            "reward.mix.weights={ocr: 0.8, clip: 0.2}",
            "reward.mix.ranges={clip: [15, 35]}",
            "reward.clip.model=own/clip",
            "reward.ocr.recognition_width=640",
        ],
    )
    reward = open_reward(recipe.reward)
    assert isinstance(reward, MixReward)
    assert list(reward.parts) == ["ocr", "clip"]
    assert reward.parts["clip"].settings.model_dump() == {"model": "own/clip"}
    assert reward.parts["ocr"].settings == recipe.reward.ocr
    assert reward.needs == {"target"}


@pytest.mark.parametrize(
    ("overrides", "sentence"),
    [
        ([], r"reward\.mix\.weights: is missing"),
        (["reward.mix.weights={}"], r"reward\.mix: `weights` needs at least one term"),
        (["reward.mix.weights={ocr: 0}"], r"'ocr' is 0: it must be above 0, or the term left out"),
        (["reward.mix.weights={ocrr: 1}"], r"reward\.mix: the weight of 'ocrr' belongs to no reward.*'?ocr'?"),
        (["reward.mix.weights={mix: 1}"], r"reward\.mix: the weight of 'mix' belongs to no reward"),
        (["reward.mix.weights={ocr: -1, clip: 2}"], r"reward\.mix: the weight of 'ocr' is -1: it must be above 0"),
        (["reward.mix.weights={ocr: much}"], r"reward\.mix\.weights: must be a number, not 'much'"),
        (["reward.mix.weights={ocr: 1}", "reward.mix.ranges={clip: [0, 1]}"], r"the range of 'clip' has no weight"),
        (["reward.mix.weights={ocr: 1}", "reward.mix.ranges={ocr: [1, 1]}"], r"'ocr' must be two different numbers"),
        (["reward.mix.weights={ocr: 1}", "reward.mix.part=1"], r"reward\.mix\.part: unknown key"),
        (
            ["reward.mix.weights={geneval: 1}"],
            r"prompts\.train\.builtin: .* have no include and tag, which reward\.kind",
        ),
        (["reward.mix.weights={clip: 1}", "reward.clip.modell=x"], r"reward\.clip\.modell: unknown key.*model"),
        (["reward.mix.weights={ocr: 1}", "eval.rewards=[ocr]"], r"eval\.rewards: names 'ocr', which is trained on"),
        (["reward.mix.weights={ocr: 1}", "eval.rewards=[mix]"], r"eval\.rewards: names 'mix', which is not a single"),
        (["reward.mix.weights={ocr: 1}", "eval.rewards=[clip, clip]"], r"eval\.rewards: names 'clip' twice"),
        (["reward.mix.weights={ocr: 1}", "eval.rewards=[clipp]"], r"eval\.rewards\[0\]: must be .*not 'clipp'.*clip"),
    ],
)
def test_bad_mixtures_are_one_sentence(overrides: Sequence[str], sentence: str) -> None:
    with pytest.raises(UserError, match=sentence) as caught:
        load_recipe("ocr", overrides=["reward.kind=mix", *overrides])
    assert "Traceback" not in str(caught.value) and "pydantic" not in str(caught.value)


def test_a_later_layer_replaces_the_whole_mixture() -> None:
    """So terms can be left out. Other ranges replace the ranges, and nothing else of the section is lost."""

    def mixture(*overrides: str) -> dict[str, Any]:
        recipe = load_recipe("flux-ocr-pickscore", overrides=[*overrides, "reward.clip.model=own/clip"])
        own: dict[str, Any] = recipe.reward.mix.model_dump(mode="json")  # type: ignore[attr-defined]
        assert recipe.reward.clip.model == "own/clip"  # type: ignore[attr-defined]
        return own

    inherited = {"weights": {"ocr": 0.8, "pickscore": 0.2}, "ranges": {"pickscore": [17.0, 24.0]}}
    assert mixture() == inherited
    assert mixture("reward.mix.weights={ocr: 1}") == {"weights": {"ocr": 1.0}, "ranges": {}}
    assert mixture("reward.mix.ranges={pickscore: [0, 26]}") == {**inherited, "ranges": {"pickscore": [0.0, 26.0]}}
