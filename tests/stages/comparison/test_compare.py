"""Comparing runs: two prompts, two images each, differences and matched points worked out by hand."""

from __future__ import annotations

import csv
import json
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from gdro_cli.config.load import load_recipe
from gdro_cli.errors import StoreError, UserError
from gdro_cli.rewards.registry import reward_class
from gdro_cli.runtime.metrics import ValidationRow
from gdro_cli.stages.comparison import compare
from gdro_cli.stages.comparison.result import Comparison
from gdro_cli.stages.evaluation.measures import measure_of, reported_measures
from gdro_cli.stages.runs.identity import run_named
from gdro_cli.stages.runs.results import MODELS, read_results
from tests.support.rows import image_row, interval, point, read, results

Values = Sequence[Sequence[float | None]]
RESOLVED = load_recipe("smoke").resolved()
PROTOCOL = {"prompts": "df0ee8531091", "seed": 1000, "reward": {"rule": "substring", "width": 160}, "judge": None}
FIRST: Values = [[0.0, 1.0], [0.5, 0.5]]
OTHER: Values = [[1.0, 1.0], [0.5, None]]


def make_results(
    rewards: Values, *, us: Values | None = None, tags: Sequence[str] = (), **changes: Any
) -> dict[str, Any]:
    """Results of a run; with ``tags`` those of GenEval, one tag per prompt and rewards as accuracies."""
    rows = []
    for prompt, values in enumerate(rewards):
        for index, value in enumerate(values):
            details: dict[str, Any] = {"accuracy": value} if tags else {}
            if us is not None:
                u = us[prompt][index]
                details |= {"u": u, "corrected": None if u is None or value is None else value * (u - 3) + 0.2}
            rows.append(image_row(prompt, index, value, **details))
    names = ["overall", *dict.fromkeys(tags)] if tags else ["reward"]
    names += [] if us is None else ["corrected", "corrected of the means", "u"]
    scored = sum(value is not None for values in rewards for value in values)
    sides = dict.fromkeys(("base", "trained", "difference"), interval(0.5, 0.4, 0.6, images=scored))
    made = results(count=len(rewards), base=rows, trained=rows, measures=dict.fromkeys(names, sides), bootstrap=200)
    for prompt, tag in zip(made["prompts"], tags, strict=False):
        prompt["metadata"] = {"tag": tag}
    protocol = PROTOCOL if us is None else PROTOCOL | {"judge": {"judge": "embedded"}}
    return made | {"task": "geneval" if tags else "ocr", "protocol": protocol, **changes}


@pytest.fixture
def make_run(tmp_path: Path) -> Callable[..., Path]:
    """Writes a run folder into the workspace ``tmp_path``."""

    def make(
        name: str,
        results: dict[str, Any],
        *,
        points: Sequence[ValidationRow] = (),
        sheets: Sequence[int] = (),
        recipe: dict[str, Any] | None = None,
        resolved: dict[str, Any] | None = None,
    ) -> Path:
        run = tmp_path / "runs" / name
        run.mkdir(parents=True)
        (run / "results.json").write_text(json.dumps(results, sort_keys=True))
        (run / "recipe.json").write_text(json.dumps(recipe or {"name": "small"}))
        (run / "resolved.json").write_text(json.dumps(resolved or RESOLVED))
        (run / "metrics.jsonl").write_text("".join(json.dumps(row.to_json()) + "\n" for row in points))
        for step in sheets:
            (run / "validation").mkdir(exist_ok=True)
            Image.new("RGB", (20, 10), (step, 0, 0)).save(run / "validation" / f"step-{step:06d}.png")
        return run

    return make


def differences_of(found: Comparison) -> dict[tuple[str, str], float | None]:
    return {(g.measure, g.run): None if g.difference is None else round(g.difference.mean, 9) for g in found.gains}


# -- paired differences -----------------------------------------------------------------------------------------------


def test_paired_differences_by_hand(make_run: Callable[..., Path], tmp_path: Path) -> None:
    """OTHER - FIRST: 1, 0, 0, and one image without a score: 1/3 over three pairs of two prompts."""
    make_run("first", make_results(FIRST))
    make_run("other", make_results(OTHER))
    found = compare.run(["first", "other"], workspace=tmp_path)
    own, gain = found.gains
    assert own.difference is None and gain.difference is not None
    assert gain.difference.mean == pytest.approx(1 / 3)
    assert (gain.difference.prompts, gain.difference.images) == (2, 3)
    assert gain.difference.low <= gain.difference.mean <= gain.difference.high


def test_images_are_paired_by_prompt_and_index_not_by_place(make_run: Callable[..., Path], tmp_path: Path) -> None:
    results = make_results(FIRST)
    results["images"] = {**results["images"], "trained": results["images"]["trained"][::-1]}
    make_run("first", make_results(FIRST))
    make_run("turned", results)
    found = compare.run(["first", "turned"], workspace=tmp_path)
    assert found.gains[1].difference is not None
    assert (found.gains[1].difference.low, found.gains[1].difference.high) == (0.0, 0.0)


def test_geneval_overall_and_corrected_are_means_of_tags(make_run: Callable[..., Path], tmp_path: Path) -> None:
    """Three prompts of counting gain 0.3 each, one of colors loses 0.5; u is 5 throughout.

    overall = mean of the tags = (0.3 - 0.5) / 2 = -0.1, where the mean over images would be +0.1; the corrected
    score is 2 * reward + 0.2 in either reading, so -0.2. u is a plain mean: 0.
    """
    tags = ["counting", "counting", "counting", "colors"]
    us = [[5.0]] * 4
    make_run("first", make_results([[0.5]] * 4, us=us, tags=tags))
    make_run("other", make_results([[0.8], [0.8], [0.8], [0.0]], us=us, tags=tags))
    found = compare.run(["first", "other"], workspace=tmp_path)
    assert {name: value for (name, run), value in differences_of(found).items() if run == "other"} == {
        "overall": -0.1,
        "counting": 0.3,
        "colors": -0.5,
        "u": 0.0,
        "corrected": -0.2,
        "corrected of the means": -0.2,
    }
    assert [gain.measure for gain in found.gains[::2]] == [
        *("overall", "counting", "colors", "u", "corrected", "corrected of the means")
    ]


def test_what_was_measured_in_one_run_only_has_no_difference(make_run: Callable[..., Path], tmp_path: Path) -> None:
    nothing = make_results([[None, None], [None, None]])
    nothing["measures"] = {"exact match": make_results(FIRST)["measures"]["reward"]}
    make_run("first", make_results(FIRST))
    make_run("nothing", nothing)
    found = compare.run(["first", "nothing"], workspace=tmp_path)
    assert found.gains[1].trained is None and found.gains[1].difference is None
    assert found.measure_table[1][1] == ["reward", "nothing", "-", "-", "0", "0"]


@pytest.mark.parametrize("task", ["ocr", "geneval"])
def test_measures_are_read_where_the_evaluation_put_them(task: str) -> None:
    reward = reward_class(task)
    for measure in reported_measures(reward):
        assert measure_of(measure.name, reward) == measure


# -- protocols --------------------------------------------------------------------------------------------------------


def test_every_difference_of_the_protocols_is_named(make_run: Callable[..., Path], tmp_path: Path) -> None:
    changed = {"prompts": "df0ee8531091", "seed": 7, "reward": {"rule": "exact", "width": 160}, "judge": {"name": "j"}}
    a, b = make_results(FIRST), make_results(FIRST, protocol=changed | {"extra": 1})
    told = [
        "seed: 1000 / 7",
        'reward.rule: "substring" / "exact"',
        'judge: null / {"name": "j"}',
        "extra: (absent) / 1",
    ]
    assert compare.differing_protocol(read(a), read(b)) == told
    assert compare.differing_protocol(read(a), read(a)) == []
    for name, made in (("a", a), ("b", b), ("c", make_results(FIRST, protocol=PROTOCOL | {"seed": 8}))):
        make_run(name, made)
    with pytest.raises(UserError) as refused:
        compare.run(["a", "b", "c"], workspace=tmp_path)
    message = str(refused.value)
    assert all(each in message for each in (*told, "a and b in ", "a and c in seed: 1000 / 8"))
    assert "\n" not in message and not (tmp_path / "comparisons").exists()


def test_runs_of_different_tasks_are_refused_by_their_tasks(make_run: Callable[..., Path], tmp_path: Path) -> None:
    make_run("a", make_results(FIRST))
    make_run("b", make_results(FIRST, tags=["colors", "counting"], protocol=PROTOCOL | {"seed": 7}))
    with pytest.raises(UserError, match=r"different tasks cannot be compared \(a: ocr, b: geneval\): name runs of one"):
        compare.run(["a", "b"], workspace=tmp_path)


def test_other_images_than_the_protocol_says_are_refused(make_run: Callable[..., Path], tmp_path: Path) -> None:
    make_run("first", make_results(FIRST))
    make_run("fewer", make_results([[0.5], [0.5]]))
    with pytest.raises(StoreError, match="other images than their protocol says"):
        compare.run(["first", "fewer"], workspace=tmp_path)


# -- what is given ----------------------------------------------------------------------------------------------------


def test_runs_are_found_by_name_or_folder(make_run: Callable[..., Path], tmp_path: Path) -> None:
    path = make_run("first-0123", make_results(FIRST))
    assert run_named("first-0123", tmp_path) == path
    assert run_named(str(path), tmp_path / "elsewhere") == path
    with pytest.raises(UserError, match="did you mean `first-0123`"):
        run_named("first-0124", tmp_path)
    with pytest.raises(UserError, match="it has no runs"):
        run_named("first-0123", tmp_path / "elsewhere")
    with pytest.raises(UserError, match=f"{tmp_path} is not a run"):
        run_named(str(tmp_path), tmp_path)


def test_a_run_that_was_not_evaluated_is_named(make_run: Callable[..., Path], tmp_path: Path) -> None:
    """Damaged results are in tests/faults."""
    make_run("first", make_results(FIRST))
    (make_run("other", make_results(OTHER)) / "results.json").unlink()
    with pytest.raises(UserError, match="other has no results.json: run `gdro eval .*other` first"):
        compare.run(["first", "other"], workspace=tmp_path)


def test_two_different_runs_and_a_number_are_needed(make_run: Callable[..., Path], tmp_path: Path) -> None:
    run = make_run("first", make_results(FIRST))
    make_run("other", make_results(OTHER))
    with pytest.raises(UserError, match="at least two"):
        compare.run(["first"], workspace=tmp_path)
    with pytest.raises(UserError, match="named twice"):
        compare.run(["first", str(run)], workspace=tmp_path)
    with pytest.raises(UserError, match="finite"):
        compare.run(["first", "other"], at_reward=float("nan"), workspace=tmp_path)


# -- at the same reward -----------------------------------------------------------------------------------------------

FAST = [point(0, 0.3), point(10, 0.5, u=4.0, corrected=0.6, verdict="healthy"), point(20, 0.9, u=2.0, corrected=-0.7)]
SLOW = [point(0, 0.3), point(10, 0.4), point(20, 0.55, u=4.5, corrected=1.0), point(30, 0.5, u=4.4)]


def test_runs_are_matched_at_the_lowest_of_their_highest_rewards(make_run: Callable[..., Path], tmp_path: Path) -> None:
    """Highest: 0.9 and 0.55, so at 0.55. Nearest: 0.5 at step 10 (0.05 off, 0.9 is 0.35 off), and 0.55 at step 20.

    Corrected of the means: 0.5 * (4 - 3) + 0.2 and 0.55 * (4.5 - 3) + 0.2.
    """
    make_run("fast", make_results(FIRST), points=FAST, sheets=[10])
    make_run("slow", make_results(OTHER), points=SLOW)
    found = compare.run(["fast", "slow"], workspace=tmp_path)
    assert found.matching.reward == 0.55
    assert found.matched_table[1] == [
        ["fast", "10", "0.500", "4.000", "0.600", "0.700", "healthy"],
        ["slow", "20", "0.550", "4.500", "1.000", "1.025", "-"],
    ]
    assert [each.sheet for each in found.matching.points] == ["validation/step-000010.png", None]
    assert found.page.read_text().count('<img class="sheet" src="data:image/png;base64,') == 1
    assert "over seeds. Matched is" in found.page.read_text()
    assert "-0.050" in found.page.read_text()


def test_a_reward_can_be_given_and_the_earlier_of_equal_points_is_taken(
    make_run: Callable[..., Path], tmp_path: Path
) -> None:
    make_run("fast", make_results(FIRST), points=FAST)
    make_run("slow", make_results(OTHER), points=[*SLOW[:2], point(15, 0.5), point(30, 0.5)])
    found = compare.run(["fast", "slow"], at_reward=0.5, workspace=tmp_path)
    assert [each.step for each in found.matching.points] == [10, 15]


def test_the_untrained_model_is_no_match_unless_there_is_nothing_else(
    make_run: Callable[..., Path], tmp_path: Path
) -> None:
    make_run("fast", make_results(FIRST), points=FAST)
    make_run("slow", make_results(OTHER), points=SLOW[:1])
    found = compare.run(["fast", "slow"], at_reward=0.31, workspace=tmp_path)
    assert [each.step for each in found.matching.points] == [10, 0]


def test_points_of_which_too_much_is_missing_are_left_out(make_run: Callable[..., Path], tmp_path: Path) -> None:
    """One image of 100 was scored at step 40 and has all of the reward; at step 30 one of 100 was not."""
    lucky = point(40, 1.0, images=1, failed=99)
    make_run("fast", make_results(FIRST), points=[*FAST, point(30, 0.95, images=99, failed=1), lucky])
    make_run("slow", make_results(OTHER), points=[*SLOW, point(40, 0.54, images=9, failed=0, unjudged=1)])
    found = compare.run(["fast", "slow"], at_reward=1.0, workspace=tmp_path)
    assert [each.step for each in found.matching.points] == [30, 20]
    assert found.matching.note == "; ".join(
        [
            "below this reward at all their points: fast, slow",
            *(
                f"left out of {name}, since too many images have no reward or judgement: step 40"
                for name in ("fast", "slow")
            ),
        ]
    )


def test_how_much_may_be_missing_is_what_the_recipe_allows(make_run: Callable[..., Path], tmp_path: Path) -> None:
    """Half of the images at step 40 have no reward: left out by default, and kept by a recipe that allows it."""
    lenient = load_recipe("smoke", overrides=["reward.max_failed_share=0.5"]).resolved()
    points = [*FAST, point(40, 0.54, images=5, failed=5)]
    make_run("strict", make_results(FIRST), points=points)
    make_run("lenient", make_results(OTHER), points=points, resolved=lenient)
    found = compare.run(["strict", "lenient"], at_reward=0.54, workspace=tmp_path)
    assert [each.step for each in found.matching.points] == [10, 40]
    assert "left out of strict" in found.matching.note and "lenient" not in found.matching.note


def test_only_points_of_one_protocol_are_matched(make_run: Callable[..., Path], tmp_path: Path) -> None:
    """The first run went on under the new protocol; the other knows the old one, the third none."""
    later = [point(30, 0.6, protocol="new"), point(40, 0.65, protocol="new")]
    make_run("fast", make_results(FIRST), points=[*FAST, *later])
    make_run("slow", make_results(OTHER), points=SLOW)
    make_run("none", make_results(OTHER))
    found = compare.run(["fast", "slow", "none"], at_reward=0.62, workspace=tmp_path)
    assert found.matching.protocol == "p"
    assert [each.step for each in found.matching.points] == [10, 20, None]
    assert found.matching.note == (
        "no evaluation points of this protocol: none; below this reward at all their points: slow"
    )
    assert found.matched_table[1][2] == ["none", *"------"]


def test_without_common_points_nothing_is_matched(make_run: Callable[..., Path], tmp_path: Path) -> None:
    make_run("fast", make_results(FIRST), points=FAST)
    make_run("other", make_results(OTHER), points=[point(0, 0.5, protocol="q")])
    found = compare.run(["fast", "other"], workspace=tmp_path)
    assert found.matching.reward is None and "so none are matched" in found.summary["note"]
    assert "There are no evaluation points to draw." in found.page.read_text()


# -- files ------------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_files_hold_the_same_numbers_and_the_same_bytes_again(make_run: Callable[..., Path], tmp_path: Path) -> None:
    recipe = {"name": "small", "method": {"beta": 6}}
    make_run("first", make_results(FIRST), points=FAST, recipe=recipe)
    make_run("other", make_results(OTHER), points=SLOW, recipe={"name": "small", "method": {"beta": 12}})
    found = compare.run(["first", "other"], workspace=tmp_path)
    paths = (found.page, *found.files)
    before = [path.read_bytes() for path in paths]
    assert compare.run(["first", "other"], workspace=tmp_path) == found
    assert [path.read_bytes() for path in paths] == before
    assert [path.name for path in paths] == ["compare.html", "compare.json", "compare.csv"]
    assert found.page.parent.parent == tmp_path / "comparisons"
    document = json.loads(found.files[0].read_text())
    assert document["measures"]["reward"]["other"]["difference"]["mean"] == pytest.approx(1 / 3)
    assert document["matched"]["points"][0]["step"] == 10 and document["first"] == "first"
    with found.files[1].open(newline="") as file:
        rows = [(row["kind"], row["measure"], row["run"], row["step"], row["mean"]) for row in csv.DictReader(file)]
    assert rows[:2] == [("trained", "reward", "first", "", "0.5"), ("trained", "reward", "other", "", "0.5")]
    assert rows[2][:3] == ("difference to first", "reward", "other") and float(rows[2][4]) == pytest.approx(1 / 3)
    assert rows[3:6] == [
        ("matched reward", "reward", "first", "10", "0.5"),
        ("matched reward", "u", "first", "10", "4.0"),
        ("matched reward", "corrected", "first", "10", "0.6"),
    ]
    assert rows[6][:4] == ("matched reward", "corrected of the means", "first", "10") and float(rows[6][4]) == 0.7
    page = found.page.read_text()
    assert "method.beta" in page and "+0.333" in page and "2 prompts, 3 pairs" in page


@pytest.mark.slow
def test_another_question_gets_another_folder(make_run: Callable[..., Path], tmp_path: Path) -> None:
    make_run("first", make_results(FIRST), points=FAST)
    make_run("other", make_results(OTHER), points=SLOW)
    asked = [(["first", "other"], None), (["other", "first"], None), (["first", "other"], 0.4)]
    pages = {compare.run(names, at_reward=reward, workspace=tmp_path).page for names, reward in asked}
    assert len(pages) == 3


def test_names_in_the_page_are_text_and_nothing_is_loaded(make_run: Callable[..., Path], tmp_path: Path) -> None:
    make_run("<b>first", make_results(FIRST, verdict={"level": "collapsed", "reasons": ["<i>bad"]}), points=FAST)
    make_run("other", make_results(OTHER), points=SLOW)
    page = compare.run(["<b>first", "other"], workspace=tmp_path).page.read_text()
    assert "<b>" not in page and "<i>" not in page and "&lt;b&gt;first" in page
    assert "<script" not in page and not re.search(r'(?:src|href)="(?!#|data:)', page)


def test_an_evaluation_of_this_version_is_read_and_its_differences_come_out_again(
    finished: tuple[Path, Any, Any],
) -> None:
    """The recorded difference trained - base, recomputed from the rows of the images."""
    results = read_results(finished[2].run)
    assert "corrected of the means" in results.measures
    for name, recorded in results.measures.items():
        measure = measure_of(name, reward_class(results.task))
        base, trained = (compare.values_of(measure, results, model=model) for model in MODELS)
        assert trained.gain(base, samples=results.bootstrap) == recorded.difference
