"""Rewards, judgements and signals put together: rows and pictures made by hand."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from gdro_cli.config.recipe import Recipe
from gdro_cli.core.geneval import TAGS
from gdro_cli.core.measures import Measure
from gdro_cli.data.records import PromptRecord
from gdro_cli.data.scores import ScoreRow
from gdro_cli.rewards.base import ImageSource, Resources, Reward
from gdro_cli.rewards.geneval.reward import GenEvalReward
from gdro_cli.rewards.judge.base import AXES, Judgement, JudgeReward
from gdro_cli.rewards.ocr.reward import OcrReward
from gdro_cli.stages.evaluation.measures import deciding_measure, quality_measures, reported_measures, signal_measures
from gdro_cli.stages.evaluation.quality import Rated, changes, joined, pair_verdict, rate
from gdro_cli.stages.evaluation.results import count_seen
from gdro_cli.stages.setup.session import Session

MakeRecipe = Callable[..., Recipe]
BLACK, WHITE = (Image.new("RGB", (64, 64), colour) for colour in ("black", "white"))


class SpokenJudge:
    """Gives the judgements that it was made with."""

    def __init__(self, judgement: Judgement) -> None:
        self._judgement = judgement

    @property
    def version(self) -> Mapping[str, Any]:
        return {"judge": "spoken"}

    resources: Resources = "cores"

    def load(self) -> None:
        pass

    def judge(self, images: Sequence[ImageSource], prompts: Sequence[str]) -> list[Judgement]:
        return [self._judgement for _ in images]


def said(
    reward: Reward,
    alignment: float | None,
    coherence: float | None,
    style: float | None,
    *,
    prompt: PromptRecord,
    index: int,
) -> ScoreRow:
    """The row of a judge's table for one picture."""
    axes = dict(zip(AXES, (alignment, coherence, style), strict=True))
    judgement = Judgement(axes, "no answer" if None in axes.values() else None)
    (score,) = JudgeReward(SpokenJudge(judgement), axes=reward.judge_axes).score([BLACK], [prompt])
    return ScoreRow(prompt.id, index, score.value, score.reason, score.details)


@pytest.fixture
def ocr() -> Reward:
    return OcrReward()


@pytest.fixture
def geneval() -> Reward:
    return GenEvalReward()


A, B = PromptRecord.of('a sign that says "A"', target="A"), PromptRecord.of('a sign that says "B"', target="B")


def measure_of(reward: Reward, name: str) -> Measure:
    (found,) = [each for each in (*quality_measures(reward), *signal_measures(reward)) if each.name == name]
    return found


# --- one row -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("reward", "u", "corrected"),
    [(0.75, 4.0, 0.95), (0.75, 2.0, -0.55), (1.0, 5.0, 2.2), (0.0, 5.0, 0.2), (1.0, 3.0, 0.2)],
)
def test_corrected_by_hand_for_ocr(ocr: Reward, reward: float, u: float, corrected: float) -> None:
    """reward x (u - 3) + 0.2, with u the mean of three axes, here u - 0.5, u and u + 0.5 where the scale has room."""
    spread = min(0.5, u - 1, 5 - u)
    row = joined(ocr, ScoreRow(A.id, 0, reward), said(ocr, u - spread, u, u + spread, prompt=A, index=0))
    assert row.details["u"] == pytest.approx(u)
    assert row.details["corrected"] == pytest.approx(corrected)
    assert [row.details[axis] for axis in AXES] == [u - spread, u, u + spread]
    assert "unjudged" not in row.details
    assert row.value == reward


@pytest.mark.parametrize(("accuracy", "corrected"), [(True, 1.7), (False, 0.2)])
def test_corrected_by_hand_for_geneval(geneval: Reward, accuracy: bool, corrected: float) -> None:
    """u = (4 + 5) / 2 = 4.5 without alignment; accuracy, not the trained reward of 0.5, is multiplied by 1.5."""
    row = ScoreRow(A.id, 0, 0.5, None, {"accuracy": accuracy, "soft": 0.5})
    row = joined(geneval, row, said(geneval, 1.0, 4.0, 5.0, prompt=A, index=0))
    assert row.details["u"] == 4.5
    assert row.details["corrected"] == pytest.approx(corrected)
    assert row.details["alignment"] == 1.0 and row.details["soft"] == 0.5


def test_alignment_may_be_missing_for_geneval_only(ocr: Reward, geneval: Reward) -> None:
    row = ScoreRow(A.id, 0, 1.0, None, {"accuracy": True})
    fine = joined(geneval, row, said(geneval, None, 4.0, 4.0, prompt=A, index=0))
    assert (fine.details["u"], fine.details["corrected"]) == (4.0, pytest.approx(1.2))
    lost = joined(ocr, row, said(ocr, None, 4.0, 4.0, prompt=A, index=0))
    assert (lost.details["u"], lost.details["corrected"], lost.details["unjudged"]) == (None, None, "no answer")
    assert lost.details["coherence"] == 4.0


def test_without_a_reward_there_is_no_corrected_score_but_quality(ocr: Reward) -> None:
    row = joined(ocr, ScoreRow(A.id, 0, None, "the engine stopped"), said(ocr, 4.0, 4.0, 4.0, prompt=A, index=0))
    assert (row.details["u"], row.details["corrected"], row.reason) == (4.0, None, "the engine stopped")
    assert "unjudged" not in row.details


def test_without_a_judge_a_row_stays_as_it_is(ocr: Reward) -> None:
    row = ScoreRow(A.id, 0, 0.5, None, {"exact": False})
    assert joined(ocr, row, None) == row


# --- all pictures of a model ---------------------------------------------------------------------------------


def rated(
    reward: Reward,
    values: Mapping[PromptRecord, Sequence[tuple[float | None, float | None]]],
    pictures: Sequence[Image.Image | None] | None = None,
) -> Rated:
    """Prompts with (reward, u) for each picture; all axes are u, None is missing."""
    rows = []
    for prompt, pairs in values.items():
        for index, (value, u) in enumerate(pairs):
            details = {} if value is None else {"accuracy": value == 1}
            row = ScoreRow(prompt.id, index, value, None if value is not None else "lost", details)
            rows.append(joined(reward, row, said(reward, u, u, u, prompt=prompt, index=index)))
    return rate(reward, list(values), rows, pictures or [None] * len(rows), judged=True)


def test_a_missing_axis_costs_one_picture_and_is_counted(ocr: Reward) -> None:
    """u: 4, missing, 2, 3; corrected: 1 x 1 + 0.2, missing, 0.5 x -1 + 0.2 and 0.2."""
    found = rated(ocr, {A: [(1.0, 4.0), (1.0, None)], B: [(0.5, 2.0), (0.0, 3.0)]})
    assert (found.unjudged, found.failed) == (1, 0)
    assert found.values(measure_of(ocr, "u")).values == [[4.0, None], [2.0, 3.0]]
    corrected = found.values(measure_of(ocr, "corrected"))
    assert corrected.values == [[pytest.approx(1.2), None], [pytest.approx(-0.3), pytest.approx(0.2)]]
    interval = corrected.interval(samples=100)
    assert (interval.mean, interval.images) == (pytest.approx((1.2 - 0.3 + 0.2) / 3), 3)
    assert found.values(Measure("reward")).interval(samples=100).images == 4


def test_a_mean_is_over_what_the_model_has_and_a_difference_over_what_both_have(ocr: Reward) -> None:
    """u of the base 4 and 2, of the trained model 4 and missing: means 3 and 4, and no difference on the shared one."""
    base, trained = (rated(ocr, {A: [(1.0, 4.0), (1.0, u)]}) for u in (2.0, None))
    found = changes([measure_of(ocr, "u")], base, trained, samples=100)["u"]
    assert (found.base.mean, found.trained.mean, found.difference.mean) == (3.0, 4.0, 0.0)


def test_a_missing_reward_costs_the_corrected_score_of_one_picture(ocr: Reward) -> None:
    found = rated(ocr, {A: [(None, 4.0), (1.0, 4.0)]})
    assert (found.unjudged, found.failed) == (0, 1)
    assert found.values(measure_of(ocr, "u")).values == [[4.0, 4.0]]
    assert found.values(measure_of(ocr, "corrected")).values == [[None, pytest.approx(1.2)]]


def test_nobody_judging_is_not_counted_as_unjudged(ocr: Reward) -> None:
    found = rate(ocr, [A], [ScoreRow(A.id, 0, 0.5)], [BLACK], judged=False)
    assert found.unjudged == 0
    assert found.values(Measure("reward")).complete and not found.values(measure_of(ocr, "u")).complete


def test_corrected_is_a_mean_of_tags_where_the_headline_is_one(geneval: Reward) -> None:
    """Three right counting pictures of u 4 and one wrong colour: (1.2 + 0.2) / 2, over the pictures 0.95."""
    records = [PromptRecord.of(name, metadata={"tag": "counting"}) for name in "abc"]
    records.append(PromptRecord.of("d", metadata={"tag": "colors"}))
    pairs = [[(1.0, 4.0)], [(1.0, 4.0)], [(1.0, 4.0)], [(0.0, 4.0)]]
    found = rated(geneval, dict(zip(records, pairs, strict=True)))
    assert found.values(measure_of(geneval, "corrected")).interval(samples=100).mean == pytest.approx(0.7)
    assert found.values(measure_of(geneval, "u")).interval(samples=100).mean == 4.0


def test_signals_of_each_picture_and_group(ocr: Reward) -> None:
    """A black and a white picture are 1 apart, two black ones 0; one colour has no entropy, all black is dark.

    A: the higher reward has the lower u, disagreement 1. B: the rewards are equal, so nothing can disagree.
    """
    values = {A: [(1.0, 2.0), (0.0, 4.0)], B: [(0.5, 2.0), (0.5, 4.0)]}
    found = rated(ocr, values, [BLACK, WHITE, BLACK, BLACK])
    assert found.values(measure_of(ocr, "dark_share")).values == [[1.0, 0.0], [1.0, 1.0]]
    assert found.values(measure_of(ocr, "colour_entropy")).values == [[0.0, 0.0], [0.0, 0.0]]
    assert found.values(measure_of(ocr, "diversity")).values == [[pytest.approx(1.0)], [0.0]]
    assert found.values(measure_of(ocr, "rank_disagreement")).values == [[1.0], [None]]
    assert found.rows[0].details["u"] == 2.0


def test_groups_are_put_together_by_prompt(ocr: Reward) -> None:
    rows = [ScoreRow(A.id, 0, 1.0), ScoreRow(A.id, 1, 0.0), ScoreRow(B.id, 0, 1.0), ScoreRow(B.id, 1, 1.0)]
    found = rate(ocr, [A, B], rows, [BLACK, BLACK, WHITE, BLACK], judged=False)
    assert found.groups[A.id]["diversity"] == 0.0
    assert found.groups[B.id]["diversity"] == 1.0
    with pytest.raises(ValueError, match="side by side"):
        rate(ocr, [A, B], [rows[0], rows[2], rows[1], rows[3]], [BLACK] * 4, judged=False)


def test_disagreement_is_about_the_headline(geneval: Reward) -> None:
    """Both pictures are wrong by accuracy; that their trained rewards differ is no preference of the headline."""
    a = PromptRecord.of("a", metadata={"tag": "counting"})
    found = rated(geneval, {a: [(0.5, 2.0), (0.25, 4.0)]})
    assert found.groups[a.id]["rank_disagreement"] is None


def test_a_picture_that_cannot_be_decoded_has_no_signals(ocr: Reward) -> None:
    found = rated(ocr, {A: [(None, None), (1.0, 3.0)]}, [None, BLACK])
    assert found.values(measure_of(ocr, "dark_share")).values == [[None, 1.0]]
    assert found.groups[A.id] == {"diversity": None, "rank_disagreement": None}


def test_which_measures_a_task_has(ocr: Reward, geneval: Reward) -> None:
    for reward in (ocr, geneval):
        assert [each.name for each in quality_measures(reward)] == [*AXES, "u", "corrected"]
    assert measure_of(geneval, "corrected").by_tag and not measure_of(ocr, "corrected").by_tag
    names = {reward.name: {each.name for each in signal_measures(reward)} for reward in (ocr, geneval)}
    assert names["ocr"] - names["geneval"] == {"text_area"}


class FarReward(OcrReward):
    """Its values lie between 20 and 25."""

    scale = (20.0, 25.0)


def test_a_reward_on_another_scale_has_no_corrected_score(ocr: Reward) -> None:
    far = FarReward()
    row = joined(far, ScoreRow(A.id, 0, 22.0), said(far, 4.0, 4.0, 4.0, prompt=A, index=0))
    assert row.details["u"] == 4.0 and "corrected" not in row.details
    assert [each.name for each in quality_measures(far)] == [*AXES, "u"]
    assert (deciding_measure(far, judged=True), deciding_measure(ocr, judged=True)) == ("reward", "corrected")
    assert deciding_measure(ocr, judged=False) == "reward"


def comparable(measure: Measure, base: Rated, trained: Rated) -> bool:
    return trained.values(measure).comparable(base.values(measure))


# --- two models ----------------------------------------------------------------------------------------------


def test_comparable_needs_one_picture_with_both(ocr: Reward) -> None:
    corrected, reward = measure_of(ocr, "corrected"), Measure("reward")
    one, other = rated(ocr, {A: [(1.0, 4.0), (1.0, None)]}), rated(ocr, {A: [(1.0, None), (1.0, 4.0)]})
    assert comparable(reward, one, other)
    assert one.values(corrected).complete and other.values(corrected).complete
    assert not comparable(corrected, one, other)
    assert comparable(corrected, one, one)
    assert not comparable(corrected, one, rated(ocr, {A: [(1.0, None), (1.0, None)]}))


def test_comparable_needs_it_in_every_tag(geneval: Reward) -> None:
    records = [PromptRecord.of(tag, metadata={"tag": tag}) for tag in TAGS]
    full = rated(geneval, {record: [(1.0, 4.0)] for record in records})
    holed = rated(geneval, {r: [(1.0, None if r.prompt == "colors" else 4.0)] for r in records})
    assert comparable(measure_of(geneval, "corrected"), full, full)
    assert not comparable(measure_of(geneval, "corrected"), full, holed)
    assert comparable(measure_of(geneval, "u"), full, holed)  # no mean of tags


def test_the_other_reading_of_the_corrected_score_is_that_of_the_means(ocr: Reward, geneval: Reward) -> None:
    """Images (r, u) = (1, 4) and (0, 2): 0.7 is the mean of the products, 0.2 the product of the means.

    Trained, u is 4 of both: 0.5 * 1 + 0.2 either way. GenEval's r is the mean of the tags, (1 + 0) / 2.
    """
    base, trained = rated(ocr, {A: [(1.0, 4.0), (0.0, 2.0)]}), rated(ocr, {A: [(1.0, 4.0), (0.0, 4.0)]})
    found = changes(reported_measures(ocr), base, trained, samples=100)
    readings = [found[name] for name in ("corrected", "corrected of the means")]
    assert [(c.base.mean, c.trained.mean) for c in readings] == [pytest.approx((0.7, 0.7)), pytest.approx((0.2, 0.7))]
    assert [c.difference.mean for c in readings] == pytest.approx([0.0, 0.5])
    records = [PromptRecord.of(str(n), metadata={"tag": "colors" if n else "counting"}) for n in range(3)]
    pairs = {records[0]: [(1.0, 4.0)], records[1]: [(0.0, 4.0)], records[2]: [(0.0, 4.0)]}
    of_tags = rated(geneval, pairs)
    assert of_tags.values(reported_measures(geneval)[-1]).interval(samples=100).mean == pytest.approx(0.7)


def test_the_other_reading_needs_both_means(ocr: Reward) -> None:
    of_means = reported_measures(ocr)[-1]
    one, other = rated(ocr, {A: [(1.0, 4.0)]}), rated(ocr, {A: [(1.0, None)]})
    assert one.values(of_means).complete and not other.values(of_means).complete
    assert comparable(of_means, one, one) and not comparable(of_means, one, other)


def model(reward: Reward, value: float, u: float, *, picture: Image.Image = WHITE) -> Rated:
    """Twelve prompts that all have the same reward and quality."""
    records = [PromptRecord.of(f'a sign that says "{number}"', target=str(number)) for number in range(12)]
    return rated(reward, {record: [(value, u)] for record in records}, [picture] * 12)


def test_an_unchanged_model_is_healthy(ocr: Reward) -> None:
    found = pair_verdict(ocr, model(ocr, 0.5, 3.5), model(ocr, 0.5, 3.5), samples=100)
    assert found.level == "healthy"
    assert "the reward +0.000" in found.reasons[0].lower()


def test_reward_won_by_quality_is_suspicious(ocr: Reward) -> None:
    """Reward + 0.5, u - 0.25: more than the 0.1 that may be lost."""
    found = pair_verdict(ocr, model(ocr, 0.5, 3.5), model(ocr, 1.0, 3.25), samples=100)
    assert found.level == "suspicious"
    assert found.reasons[0].startswith("The reward rose by 0.5 [0.5, 0.5] while quality u fell by 0.25")


def test_a_fall_of_quality_is_a_collapse(ocr: Reward) -> None:
    found = pair_verdict(ocr, model(ocr, 0.5, 3.5), model(ocr, 1.0, 2.0), samples=100)
    assert found.level == "collapsed"
    assert found.reasons[0].startswith("Quality u fell by 1.5 [1.5, 1.5]")


def test_signals_are_judged_without_a_judge(ocr: Reward) -> None:
    """All white to all black: the dark share rises by 1; one signal alone is suspicious, not collapsed."""
    rows = [ScoreRow(A.id, 0, 0.5)]
    white, black = (rate(ocr, [A], rows, [picture], judged=False) for picture in (WHITE, BLACK))
    found = pair_verdict(ocr, white, black, samples=100)
    assert found.level == "suspicious"
    assert found.reasons[0].startswith("Dark share rose by 1 ")
    assert any("not judged" in reason and "quality u" in reason for reason in found.reasons)


def test_the_headline_of_the_task_is_the_reward_of_the_verdict(geneval: Reward) -> None:
    """Accuracy goes from 0 to 1 in both tags and the trained reward from 0.75 to 1: a rise by 1 is told."""
    records = [PromptRecord.of(str(n), metadata={"tag": tag}) for n in range(6) for tag in ("counting", "colors")]
    base = rated(geneval, {record: [(0.75, 4.0)] for record in records})
    trained = rated(geneval, {record: [(1.0, 3.5)] for record in records})
    found = pair_verdict(geneval, base, trained, samples=100)
    assert found.level == "suspicious"
    assert found.reasons[0].startswith("The reward rose by 1 [1, 1] while quality u fell by 0.5")


def test_prompts_that_are_not_held_out_are_counted(make_recipe: MakeRecipe) -> None:
    leaking = {"eval": {"builtin": "ocr-validation", "count": 4}}
    assert count_seen(Session(make_recipe(), Path())) == 0
    assert count_seen(Session(make_recipe(prompts=leaking), Path())) == 2  # the small recipe validates on two
