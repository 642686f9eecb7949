"""The whole job with the GenEval reward on the embedded model: sample, score, train, evaluate, export images."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from PIL import Image

from gdro_cli.cli.app import main
from gdro_cli.config.recipe import Recipe
from gdro_cli.core.geneval import TAGS
from gdro_cli.core.measures import Measure
from gdro_cli.data.dataset import GroupDataset
from gdro_cli.data.records import PromptRecord
from gdro_cli.data.scores import ScoreRow, ScoreTable
from gdro_cli.data.store import GroupStore
from gdro_cli.errors import StoreError, UserError
from gdro_cli.rewards.geneval.reward import GenEvalReward, seen
from gdro_cli.runtime.progress import Reporter
from gdro_cli.stages.evaluation import evaluate, image_folder
from gdro_cli.stages.evaluation.measures import measured
from gdro_cli.stages.reporting.image_sheet import caption
from gdro_cli.stages.runs.identity import run_path
from gdro_cli.stages.scoring import score
from gdro_cli.stages.setup.reward import open_reward
from gdro_cli.stages.setup.scorers import open_reward_table
from gdro_cli.stages.setup.session import Session
from gdro_cli.stages.setup.store import open_training_store
from gdro_cli.stages.training import train

pytestmark = pytest.mark.slow

MakeRecipe = Callable[..., Recipe]
Job = tuple[Path, train.TrainResult, evaluate.EvalResult, Path]

GENEVAL: dict[str, Any] = {
    "name": "small-geneval",
    "prompts": {
        "train": {"builtin": "geneval-train", "count": 6},
        "validation": {"builtin": "geneval-validation", "count": 2},
        "eval": {"builtin": "geneval-test", "count": 12},
    },
    "reward": {"kind": "geneval"},
    "method": {"k": 2},
    "train": {"steps": 2, "eval_every": 2},
    "judge": {"kind": "none"},
}


def small(make_recipe: MakeRecipe, **reward: Any) -> Recipe:
    """The small recipe with another reward; keywords are keys of ``reward.geneval``."""
    sections = {**GENEVAL, "reward": {"kind": "geneval", "workers": 1, "geneval": reward}}
    return make_recipe(**sections)


@pytest.fixture(scope="module")
def job(tmp_path_factory: pytest.TempPathFactory, make_recipe: MakeRecipe, quiet: Reporter) -> Job:
    """Workspace, training, evaluation and exported images of the small recipe."""
    workspace, export = tmp_path_factory.mktemp("geneval"), tmp_path_factory.mktemp("images")
    trained = train.run(Session(small(make_recipe), workspace, quiet))
    return workspace, trained, evaluate.run(Session(small(make_recipe), workspace, quiet), export=export), export


def results_of(job: Job) -> dict[str, Any]:
    results: dict[str, Any] = json.loads(job[2].file.read_text())
    return results


def training_table(job: Job, recipe: Recipe) -> tuple[GroupStore, ScoreTable]:
    session = Session(recipe, job[0])
    store = open_training_store(session)
    return store, open_reward_table(session, store)


def test_all_three_rewards_are_stored(job: Job, make_recipe: MakeRecipe) -> None:
    _, table = training_table(job, small(make_recipe))
    rows = list(table.rows())
    assert len(rows) == 6 * 4
    for row in rows:
        assert {"accuracy", "strict", "soft", "parts", "detections", "tag"} <= set(row.details)
        assert row.value == row.details["soft"] == row.measured("soft")
        assert row.measured("strict") in (0.0, 1.0) and row.measured("accuracy") in (0.0, 1.0)
    provenance = table.provenance
    assert (provenance["detector"]["detector"], provenance["colours"]["colours"]) == ("segmenter", "palette")


def test_another_objective_is_trained_on_without_new_scores(job: Job, make_recipe: MakeRecipe, quiet: Reporter) -> None:
    """The rewards of each objective are in the rows; store and table are the same, the runs are not."""
    store, table = training_table(job, small(make_recipe))
    rows = list(table.rows())
    paths = set()
    for objective in ("soft", "strict", "accuracy"):
        recipe = small(make_recipe, objective=objective)
        other_store, other_table = training_table(job, recipe)
        assert (other_store.path, other_table.path) == (store.path, table.path)
        assert score.run(Session(recipe, job[0], quiet)).shards_made == 0
        paths.add(run_path(Session(recipe, job[0])))
        detail = open_reward(recipe).trained_on
        by_hand = torch.tensor([float(row.details[objective]) for row in rows]).reshape(6, 4)
        varied = by_hand.amax(dim=1) > by_hand.amin(dim=1)
        if not varied.any():
            with pytest.raises(StoreError, match="no reward spread"):
                GroupDataset.load(store, table, k=2, detail=detail)
            continue
        dataset = GroupDataset.load(store, table, k=2, detail=detail)
        assert torch.equal(dataset.rewards, by_hand[varied])
    assert job[1].run.path in paths and len(paths) == 3


def test_validation_reports_the_objective_and_the_overall_score(job: Job) -> None:
    points = [row for row in job[1].run.metrics() if row["kind"] == "validation"]
    assert [row["step"] for row in points] == [0, 2]
    for row in points:
        assert 0 <= row["low"] <= row["reward"] <= row["high"] <= 1
        assert row["overall"] in (0.0, 0.5, 1.0)  # the verdicts on two images of two tags
        assert (row["prompts"], row["images"], row["failed"]) == (2, 2, 0)
        assert not {"u", "corrected", "unjudged"} & row.to_json().keys()  # the recipe has no judge
    best = json.loads((job[1].run.path / "best" / "best.json").read_text())
    assert best == {"step": 2, "overall": points[-1]["overall"]}


def test_every_tag_is_compared(job: Job) -> None:
    results = results_of(job)
    names = ["overall", *TAGS, "strict reward", "soft reward"]
    assert list(job[2].results.measures)[: len(names)] == names
    assert set(results["measures"]) >= set(names)
    for tag in TAGS:
        assert results["measures"][tag]["base"]["prompts"] == 2
        assert results["measures"][tag]["base"]["images"] == 4
    assert results["measures"]["overall"]["base"]["images"] == 24
    assert results["protocol"]["reward"]["reward"] == "geneval"


@pytest.mark.parametrize("side", ["base", "trained"])
def test_the_overall_score_is_the_mean_of_the_tags_means_of_the_rows(job: Job, side: str) -> None:
    results = results_of(job)
    tags: dict[str, list[bool]] = {}
    for row in results["images"][side]:
        tags.setdefault(row["details"]["tag"], []).append(row["details"]["accuracy"])
    assert set(tags) == set(TAGS)
    means = {tag: sum(values) / len(values) for tag, values in tags.items()}
    assert results["measures"]["overall"][side]["mean"] == pytest.approx(sum(means.values()) / 6)
    for tag, mean in means.items():
        assert results["measures"][tag][side]["mean"] == pytest.approx(mean)
    soft = [row["value"] for row in results["images"][side]]
    assert results["measures"]["soft reward"][side]["mean"] == pytest.approx(sum(soft) / 24)


def test_unequal_tags_weigh_alike() -> None:
    """Three correct counting images and one wrong colour: overall 1/2, over the images 3/4."""
    prompts = [
        PromptRecord.of(name, metadata={"tag": tag})
        for name, tag in [("a", "counting"), ("b", "counting"), ("c", "counting"), ("d", "colors")]
    ]
    rows = [ScoreRow(p.id, 0, 0.9, None, {"accuracy": p.prompt != "d"}) for p in prompts]
    overall = measured(Measure("overall", "accuracy", by_tag=True), prompts, rows)
    assert overall.interval(samples=100).mean == 0.5
    assert measured(Measure("all", "accuracy"), prompts, rows).interval(samples=100).mean == 0.75
    assert measured(Measure("counting", "accuracy", tag="counting"), prompts, rows).values == [[1.0], [1.0], [1.0]]
    missing = [*rows[:3], ScoreRow(prompts[3].id, 0, None, "broken")]
    lost = measured(Measure("overall", "accuracy", by_tag=True), prompts, missing)
    with pytest.raises(StoreError, match="no scored image to average in colors: fix"):
        lost.interval(samples=100)
    with pytest.raises(StoreError, match="no scored image to average in colors: fix"):
        overall.gain(lost, samples=100)


def test_the_grid_shows_what_was_seen(job: Job) -> None:
    assert job[2].grid is not None
    with Image.open(job[2].grid) as grid:
        assert grid.size == (60 + 2 * 168, 2 * 15 + 8 + 2 * (160 + 30 + 8))
    circle, star = {"label": "circle", "colour": "red"}, {"label": "star"}
    assert seen([circle, star, circle]) == "2 red circle, star"
    assert seen([]) == "-"
    details = {"accuracy": True, "detections": [star]}
    assert caption(ScoreRow("p", 0, 0.5, None, details), GenEvalReward) == ("correct, soft reward 0.50", "seen: star")
    assert caption(ScoreRow("p", 0, None, "cut off"), GenEvalReward) == ("no score", "cut off")


def test_exported_images_score_as_in_the_evaluation(
    job: Job, make_recipe: MakeRecipe, quiet: Reporter, tmp_path: Path
) -> None:
    results, export = results_of(job), job[3]
    assert sorted(path.name for path in export.iterdir()) == ["base", "trained"]
    recipe = small(make_recipe)
    for side in ("base", "trained"):
        scored = image_folder.run(Session(recipe, tmp_path, quiet), folder=export / side)
        folder = json.loads(scored.results.read_text())
        for again, row in zip(folder["images"], results["images"][side], strict=True):
            expected = {key: row[key] for key in again}  # the evaluation may have more details
            expected["details"] = {key: row["details"][key] for key in again["details"]}
            assert again == expected
            assert {"accuracy", "strict", "soft", "detections"} <= set(again["details"])
        assert {"overall", *TAGS, "strict reward", "soft reward"} <= dict(scored.measures).keys()
        for name, interval in scored.measures:
            evaluated = results["measures"][name][side]
            assert (interval.mean, interval.low, interval.high) == (
                evaluated["mean"],
                evaluated["low"],
                evaluated["high"],
            )
        assert (scored.failed, scored.summary["prompts"], scored.summary["images"]) == (0, "12", "24")
    assert len(list((tmp_path / "folders").iterdir())) == 2


def test_scoring_a_folder_continues_after_the_finished_parts(
    job: Job, make_recipe: MakeRecipe, quiet: Reporter, tmp_path: Path
) -> None:
    """12 prompts are two parts of 8 and 4: the first stays as it is, the lost one is made again."""
    recipe, folder = small(make_recipe), job[3] / "base"
    first = image_folder.run(Session(recipe, tmp_path, quiet), folder=folder)
    parts = sorted(first.results.parent.glob("*.jsonl"))
    assert [path.name for path in parts] == ["00000.jsonl", "00008.jsonl"]
    kept_at, made_at = (path.stat().st_mtime_ns for path in parts)
    parts[1].unlink()
    assert image_folder.run(Session(recipe, tmp_path, quiet), folder=folder) == first
    assert parts[0].stat().st_mtime_ns == kept_at and parts[1].stat().st_mtime_ns > made_at
    parts[1].write_bytes(parts[1].read_bytes()[:-20])
    with pytest.raises(StoreError, match=r"00008\.jsonl is damaged \(its SHA-256 differs\): delete it"):
        image_folder.run(Session(recipe, tmp_path, quiet), folder=folder)


def copied(job: Job, tmp_path: Path, prompts: int) -> Path:
    """The first prompts of the exported base images."""
    for number in range(prompts):
        shutil.copytree(job[3] / "base" / f"{number:05d}", tmp_path / "copy" / f"{number:05d}")
    return tmp_path / "copy"


def test_a_truncated_image_is_missing_with_a_reason(
    job: Job, make_recipe: MakeRecipe, quiet: Reporter, tmp_path: Path
) -> None:
    folder = copied(job, tmp_path, 2)
    cut = folder / "00001" / "samples" / "0000.png"
    cut.write_bytes(cut.read_bytes()[:60])
    scored = image_folder.run(Session(small(make_recipe), tmp_path / "out", quiet), folder=folder)
    images = json.loads(scored.results.read_text())["images"]
    assert scored.failed == 1 and scored.summary["images without a score"] == "1"
    assert [row["value"] is None for row in images] == [False, False, True, False]
    assert "cannot be decoded" in images[2]["reason"] and str(cut) in images[2]["reason"]
    soft = dict(scored.measures)["soft reward"]
    assert soft.images == 3
    assert soft.mean == pytest.approx(math.fsum(row["value"] for row in images if row["value"] is not None) / 3)


def test_a_folder_without_a_single_score_has_a_reason_and_a_remedy(
    job: Job, make_recipe: MakeRecipe, quiet: Reporter, tmp_path: Path
) -> None:
    folder = copied(job, tmp_path, 1)
    for path in (folder / "00000" / "samples").iterdir():
        Image.new("RGB", (60, 60)).save(path)
    with pytest.raises(StoreError, match=r"no scored image .*delete .*folders/geneval-.*2 x .*multiples of 8"):
        image_folder.run(Session(small(make_recipe), tmp_path / "out", quiet), folder=folder)


def test_a_tag_without_any_score_is_reported(job: Job, make_recipe: MakeRecipe) -> None:
    """In two tables of one store different colour images have no score, so no pair is left."""
    store, table = training_table(job, small(make_recipe))

    def without(name: str, lost: tuple[int, ...]) -> ScoreTable:
        other = ScoreTable.create_or_open(store, name, provenance={"test": name})
        for number in other.missing_shards():
            rows = [
                ScoreRow(r.prompt_id, r.index, None, "lost") if tag == "colors" and r.index in lost else r
                for r in table.read_shard(number)
                for tag in [r.details["tag"]]
            ]
            other.write_shard(number, rows)
        return other

    overall = Measure("overall", "accuracy", by_tag=True)
    tables = without("a", (0, 1)), without("b", (2, 3))
    base, trained = (measured(overall, store.prompts, table.rows()) for table in tables)
    assert base.interval(samples=100).images == trained.interval(samples=100).images == 6 * 4 - 2
    with pytest.raises(StoreError, match="no scored image to average in colors"):
        trained.gain(base, samples=100)


def test_a_class_that_the_detector_lacks_is_refused_before_anything_is_made(
    make_recipe: MakeRecipe, quiet: Reporter, tmp_path: Path
) -> None:
    file = tmp_path / "prompts.jsonl"
    file.write_text('{"tag": "counting", "include": [{"class": "cirle", "count": 2}], "prompt": "two cirles"}\n')
    prompts = {**GENEVAL["prompts"], "train": {"builtin": None, "count": None, "file": str(file)}}
    recipe = make_recipe(**{**GENEVAL, "prompts": prompts})
    with pytest.raises(UserError) as caught:
        train.run(Session(recipe, tmp_path / "out", quiet))
    assert f"{file} has a bad line; line 1: " in str(caught.value)
    assert "'cirle', which the detector does not know; did you mean `circle`?" in str(caught.value)
    assert not (tmp_path / "out" / "stores").exists()
    coco = {**GENEVAL["prompts"], "train": {"builtin": "geneval-coco-train", "count": 6}}
    with pytest.raises(UserError, match="the detector does not know.* choose one of geneval-train"):
        train.run(Session(make_recipe(**{**GENEVAL, "prompts": coco}), tmp_path / "out", quiet))


# --- through the command line --------------------------------------------------------------------------------


def run(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> tuple[int, str, str]:
    with pytest.raises(SystemExit) as leaving:
        main(arguments)
    captured = capsys.readouterr()
    assert isinstance(leaving.value.code, int)
    return leaving.value.code, captured.out, captured.err


@pytest.fixture
def options(job: Job, make_recipe: MakeRecipe, tmp_path: Path) -> list[str]:
    """Recipe and workspace of the finished job."""
    path = tmp_path / "small.yaml"
    path.write_text(yaml.safe_dump(small(make_recipe).resolved()))
    return ["--recipe", str(path), "--out", str(job[0])]


def test_score_images_prints_each_measure_and_makes_no_store(
    job: Job, options: list[str], capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    out = tmp_path / "out"
    images = copied(job, tmp_path, 6)
    code, shown, _ = run(["score", *options[:2], "--out", str(out), "--images", str(images)], capsys)
    assert code == 0
    lines = [line.split() for line in shown.splitlines()]
    for tag in TAGS:
        (line,) = [line for line in lines if line[:1] == [tag]]
        assert line[-2:] == ["1", "2"]  # prompts, images
    assert any(line[:1] == ["overall"] and line[-2:] == ["6", "12"] for line in lines)
    assert [path.name for path in out.iterdir()] == ["folders"]


def test_eval_export_writes_both_models_images(
    options: list[str], capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    export = tmp_path / "export"
    assert run(["eval", *options, "--export", str(export)], capsys)[0] == 0
    assert len(list(export.glob("base/*/samples/*.png"))) == len(list(export.glob("trained/*/samples/*.png"))) == 24
    code, _, err = run(["eval", *options, "--export", str(export)], capsys)
    assert code == 2
    assert f"{export} is not empty: name a new folder" in err
