"""Judgements, and a judge used as a reward."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import pytest
from PIL import Image

from gdro_cli.rewards.base import ImageSource, Resources, Reward
from gdro_cli.rewards.geneval.reward import GenEvalReward
from gdro_cli.rewards.judge.base import AXES, Judgement, JudgeReward
from gdro_cli.rewards.ocr.reward import OcrReward
from tests.support.ocr_signs import Prompt


class PaperJudge:
    """Gives fixed judgements, and records the prompts."""

    def __init__(self, *judgements: Judgement) -> None:
        self._judgements = list(judgements)
        self.prompts: list[str] = []
        self.loads = 0

    @property
    def version(self) -> Mapping[str, Any]:
        return {"judge": "paper"}

    resources: Resources = "cores"

    def load(self) -> None:
        self.loads += 1

    def judge(self, images: Sequence[ImageSource], prompts: Sequence[str]) -> list[Judgement]:
        self.prompts += prompts
        return self._judgements


def axes(alignment: float | None, coherence: float | None, style: float | None) -> dict[str, float | None]:
    return {"alignment": alignment, "coherence": coherence, "style": style}


def blank_images(count: int) -> list[ImageSource]:
    return [Image.new("RGB", (4, 4)) for _ in range(count)]


def prompt(text: str) -> Prompt:
    return Prompt(text, "SECRET", {"score": 0.9})


def test_u_is_the_mean_of_the_axes_of_the_reward() -> None:
    """(2 + 3.5 + 5) / 3 = 3.5 with all axes, (3.5 + 5) / 2 = 4.25 without alignment."""
    judgement = Judgement(axes(2.0, 3.5, 5.0))
    (ocr,) = JudgeReward(PaperJudge(judgement), axes=OcrReward.judge_axes).score(blank_images(1), [prompt("a")])
    (geneval,) = JudgeReward(PaperJudge(judgement), axes=GenEvalReward.judge_axes).score(blank_images(1), [prompt("a")])
    assert ocr.value == 3.5
    assert geneval.value == 4.25
    assert ocr.details == geneval.details == {"alignment": 2.0, "coherence": 3.5, "style": 5.0}


def test_u_is_missing_if_one_of_its_axes_is_and_the_details_keep_the_others() -> None:
    judge = PaperJudge(Judgement(axes(2.0, None, 5.0), "no coherence", {"answer": "..."}))
    (score,) = JudgeReward(judge, axes=AXES).score(blank_images(1), [prompt("a")])
    assert (score.value, score.reason) == (None, "no coherence")
    assert score.details == {"alignment": 2.0, "coherence": None, "style": 5.0, "answer": "..."}


def test_an_axis_outside_u_may_be_missing() -> None:
    """u = (3 + 4) / 2."""
    judge = PaperJudge(Judgement(axes(None, 3.0, 4.0), "no alignment"))
    (score,) = JudgeReward(judge, axes=GenEvalReward.judge_axes).score(blank_images(1), [prompt("a")])
    assert (score.value, score.reason) == (3.5, None)
    assert score.details["alignment"] is None
    assert score.details["missing"] == "no alignment"


def test_the_judge_sees_only_the_texts_of_the_prompts() -> None:
    judge = PaperJudge(Judgement(axes(1, 1, 1)), Judgement(axes(5, 5, 5)))
    scores = JudgeReward(judge, axes=AXES).score(blank_images(2), [prompt("one"), prompt("two")])
    assert judge.prompts == ["one", "two"]
    assert all(type(text) is str for text in judge.prompts)
    assert [score.value for score in scores] == [1.0, 5.0]


def test_provenance_has_the_judge_and_the_axes_in_a_fixed_order() -> None:
    judge = PaperJudge()
    assert JudgeReward(judge, axes=["style", "coherence"]).version == {
        "judge": {"judge": "paper"},
        "axes": ["coherence", "style"],
    }


def test_load_loads_the_judge() -> None:
    judge = PaperJudge()
    JudgeReward(judge, axes=AXES).load()
    assert judge.loads == 1


def test_the_numbers_of_images_prompts_and_judgements_must_agree() -> None:
    reward = JudgeReward(PaperJudge(Judgement.missing("nothing")), axes=AXES)
    with pytest.raises(ValueError, match="zip"):
        reward.score(blank_images(2), [prompt("a")])
    with pytest.raises(ValueError, match="1 judgements for 2 images"):
        reward.score(blank_images(2), [prompt("a"), prompt("b")])


@pytest.mark.parametrize("wrong", [(), ("beauty",), ("style", "style")])
def test_wrong_axes_are_refused(wrong: Sequence[str]) -> None:
    with pytest.raises(ValueError, match="axes of u"):
        JudgeReward(PaperJudge(), axes=wrong)


def test_axes_of_the_rewards() -> None:
    assert OcrReward.judge_axes == Reward.judge_axes == AXES
    assert GenEvalReward.judge_axes == ("coherence", "style")


@pytest.mark.parametrize("value", [0.99, 5.01, math.nan, math.inf, -3.0])
def test_a_judgement_off_the_scale_is_refused(value: float) -> None:
    with pytest.raises(ValueError, match="style must be between 1 and 5"):
        Judgement(axes(1, 5, value))


def test_a_judgement_is_complete_or_has_a_reason() -> None:
    with pytest.raises(ValueError, match="or a reason"):
        Judgement(axes(1, None, 3))
    with pytest.raises(ValueError, match="or a reason"):
        Judgement(axes(1, 2, 3), "but why")
    with pytest.raises(ValueError, match="has the axes"):
        Judgement({"alignment": 3.0})
    assert Judgement.missing("gone").axes == axes(None, None, None)
