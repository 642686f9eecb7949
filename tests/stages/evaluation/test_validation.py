"""Evaluation points during training: quality beside reward, the best point's weights, and an end at a collapse."""

from __future__ import annotations

import csv
import itertools
import json
import os
import re
import shutil
import signal
import threading
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from rich.console import Console
from safetensors.torch import load_file

from gdro_cli.config.recipe import Recipe
from gdro_cli.config.sweep import plan_sweep
from gdro_cli.core.corrected import corrected_score
from gdro_cli.errors import Interrupted, PrerequisiteError
from gdro_cli.files import json_bytes, sha256
from gdro_cli.rewards import pool as pool_module
from gdro_cli.rewards.judge.base import AXES
from gdro_cli.runtime.checkpoint import latest_checkpoint
from gdro_cli.runtime.progress import Reporter
from gdro_cli.stages.ablation.trials import trial_runs
from gdro_cli.stages.evaluation import evaluate
from gdro_cli.stages.evaluation.validation import Validation
from gdro_cli.stages.runs.identity import learnt_from
from gdro_cli.stages.runs.results import read_results
from gdro_cli.stages.runs.weights import STOPPED, best_folder
from gdro_cli.stages.setup.scorers import open_reward_table
from gdro_cli.stages.setup.session import Session
from gdro_cli.stages.setup.store import open_training_store
from gdro_cli.stages.training import train
from tests.support.judge_server import MODEL, JudgeServer, Reply, lines, says
from tests.support.rows import timeless as without_times

pytestmark = pytest.mark.slow

Finished = tuple[Path, train.TrainResult, evaluate.EvalResult]
MakeRecipe = Callable[..., Recipe]
PATIENCE = 200.0
QUALITY = {*AXES, "u", "corrected", "unjudged"}
LEVELS = ("healthy", "suspicious", "collapsed")


def points_of(run: Path) -> list[dict[str, Any]]:
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [row for row in rows if row["kind"] == "validation"]


def json_of(path: Path) -> dict[str, Any]:
    held: dict[str, Any] = json.loads(path.read_text())
    return held


def mean(rows: list[dict[str, Any]], name: str) -> float:
    values = [row["details"][name] for row in rows]
    return sum(values) / len(values)


# --- with a judge --------------------------------------------------------------------------------------------


def test_points_hold_quality_and_a_verdict(finished: Finished) -> None:
    points = points_of(finished[1].run.path)
    assert [row["step"] for row in points] == [0, 4]
    for row in points:
        assert QUALITY | {"reward", "low", "high", "protocol", "verdict", "seconds"} <= row.keys()
        assert all(1 <= row[name] <= 5 for name in (*AXES, "u"))
        assert row["u"] == pytest.approx(sum(row[axis] for axis in AXES) / 3)
        assert (row["prompts"], row["images"], row["failed"], row["unjudged"]) == (2, 2, 0, 0)
        assert row["verdict"] in LEVELS
    assert points[0]["verdict"] == "healthy"  # the base model against itself
    assert points[0]["protocol"] == points[1]["protocol"]


def test_the_point_at_step_0_is_the_base_model(finished: Finished) -> None:
    """An adapter that has not learnt yet changes nothing; the rows of the base model are on the disk."""
    run = finished[1].run.path
    base, first = json_of(run / "validation" / "base.json"), points_of(run)[0]
    assert (base["protocol"], base["judged"]) == (first["protocol"], True)
    assert len(base["rows"]) == 2 and set(base["groups"]) == {row["prompt_id"] for row in base["rows"]}
    for name in (*AXES, "u", "corrected"):
        assert mean(base["rows"], name) == pytest.approx(first[name], abs=1e-6)
    for row in base["rows"]:
        assert row["details"]["corrected"] == corrected_score(row["value"], row["details"]["u"])


def test_each_point_has_its_sheet_of_images(finished: Finished) -> None:
    folder = finished[1].run.path / "validation"
    assert sorted(path.name for path in folder.glob("*.png")) == ["step-000000.png", "step-000004.png"]
    for path in folder.glob("*.png"):
        with Image.open(path) as sheet:
            assert sheet.size == (60 + 2 * 168, 2 * 15 + 8 + 160 + 30 + 8)  # two prompts, one row


def test_the_best_point_is_kept_and_exported(finished: Finished, make_recipe: MakeRecipe) -> None:
    """Only step 4 can be: the untrained model is no candidate."""
    _, trained, evaluated = finished
    run = trained.run.path
    assert json_of(run / "best" / "best.json") == {"step": 4, "corrected": points_of(run)[-1]["corrected"]}
    assert trained.summary["weights kept"].startswith("those of step 4, the best evaluation point")
    assert evaluated.results.weights.step == 4
    best, last = latest_checkpoint(best_folder(trained.run)), latest_checkpoint(run)
    assert best is not None and last is not None
    for name in ("adapter.safetensors", "ema.safetensors"):
        assert (best / name).read_bytes() == (last / name).read_bytes()
    exported, average = (load_file(folder / "pytorch_lora_weights.safetensors") for folder in (run, last / "ema"))
    assert exported.keys() == average.keys() and all(torch.equal(exported[name], average[name]) for name in exported)


def test_the_base_model_is_measured_once(finished: Finished, make_recipe: MakeRecipe, tmp_path: Path) -> None:
    """A run that goes on from step 3 reads the stored rows; by another protocol it measures the base again.

    The best point of the first protocol is kept until a point of the other one comes.
    """
    workspace, trained, _ = finished
    shutil.copytree(workspace, tmp_path, dirs_exist_ok=True)
    run = tmp_path / "runs" / trained.run.path.name
    base = run / "validation" / "base.json"
    before = base.stat().st_mtime_ns
    shutil.rmtree(run / "checkpoints" / "step-000004")
    again = train.run(Session(make_recipe(), tmp_path, Reporter(quiet=True)))
    assert again.resumed_from == 3
    assert base.stat().st_mtime_ns == before
    first, second = points_of(trained.run.path)[-1], points_of(run)[-1]
    assert {**second, "seconds": 0} == {**first, "seconds": 0}

    shutil.rmtree(run / "checkpoints" / "step-000004")
    other = make_recipe(eval={"validation_images_per_prompt": 2})
    train.run(Session(other, tmp_path, Reporter(quiet=True)))
    third = points_of(run)[-1]
    assert (third["step"], third["images"]) == (4, 4) and third["protocol"] != first["protocol"]
    assert len(json_of(base)["rows"]) == 4 and json_of(base)["protocol"] == third["protocol"]
    assert json_of(run / "best" / "best.json") == {"step": 4, "corrected": third["corrected"]}


def _resealed(change: Callable[[dict[str, Any]], object]) -> Callable[[dict[str, Any]], object]:
    """A change with a digest that fits it."""

    def harm(held: dict[str, Any]) -> None:
        change(held)
        held["sha256"] = sha256(json_bytes({key: value for key, value in held.items() if key != "sha256"}))

    return harm


def _first(held: dict[str, Any]) -> dict[str, Any]:
    group: dict[str, Any] = next(iter(held["groups"].values()))
    return group


HARMS: dict[str, Callable[[dict[str, Any]], object]] = {
    "no digest, as if it was cut out": lambda held: held.pop("sha256"),
    "another digest": lambda held: held.update(sha256="0" * 64),
    "a digest of another kind": lambda held: held.update(sha256=3),
    "a value edited": lambda held: held["rows"][0].update(value=1.0),
    "a detail edited": lambda held: held["rows"][0]["details"].update(u=5.0),
    "details a list": _resealed(lambda held: held["rows"][0].update(details=[1])),
    "details missing": _resealed(lambda held: held["rows"][0].pop("details")),
    "a value that is text": _resealed(lambda held: held["rows"][0].update(value="high")),
    "a row a list": _resealed(lambda held: held["rows"].__setitem__(0, [1])),
    "rows a number": _resealed(lambda held: held.update(rows=3)),
    "rows in another order": _resealed(lambda held: held["rows"].reverse()),
    "a row twice": _resealed(lambda held: held["rows"].append(held["rows"][0])),
    "another image": _resealed(lambda held: held["rows"][0].update(index=1)),
    "groups a list": _resealed(lambda held: held.update(groups=list(held["groups"]))),
    "a group a number": _resealed(lambda held: held["groups"].update(dict.fromkeys(held["groups"], 3))),
    "a signal too few": _resealed(lambda held: _first(held).pop("diversity")),
    "a signal that is text": _resealed(lambda held: _first(held).update(diversity="high")),
    "a signal that is a list": _resealed(lambda held: _first(held).update(rank_disagreement=[1])),
    "judged a text": _resealed(lambda held: held.update(judged="no")),
    "another protocol": _resealed(lambda held: held.update(protocol="x")),
}


def test_rows_of_the_base_model_that_are_not_as_they_were_written_are_measured_again(
    finished: Finished, make_recipe: MakeRecipe, tmp_path: Path
) -> None:
    shutil.copytree(finished[1].run.path / "validation", tmp_path / "runs" / "small" / "validation")
    file = tmp_path / "runs" / "small" / "validation" / "base.json"
    recipe, whole = make_recipe(), file.read_bytes()
    with ExitStack() as stack:
        found = Validation.open(Session(recipe, tmp_path), tmp_path / "runs" / "small", stack)
        assert found._recall_base() and found.base is not None
        assert [row.to_json() for row in found.base.rows] == json.loads(whole)["rows"]
        for name, harm in HARMS.items():
            held = json.loads(whole)
            harm(held)
            file.write_text(json.dumps(held))
            assert not found._recall_base(), name
        for data in (b"", b"[]", b"3", whole[:-30], b"\xff", b'{"sha256": NaN}'):
            file.write_bytes(data)
            assert not found._recall_base(), data[:20]
        file.unlink()
        assert not found._recall_base()
        file.write_bytes(whole)
        assert found._recall_base()


def test_a_best_point_has_a_checkpoint_of_its_own(
    finished: Finished, make_recipe: MakeRecipe, tmp_path: Path, quiet: Reporter
) -> None:
    """A run that is stopped goes on from there or later, so its best weights are always of its own past."""
    shutil.copytree(finished[0] / "stores", tmp_path / "stores")
    recipe = make_recipe(train={"steps": 6, "eval_every": 1, "checkpoint_every": 6, "lr": 3e-3})
    run = train.run(Session(recipe, tmp_path, quiet)).run.path
    records, best = [], (-1, -100.0)
    for point in points_of(run)[1:]:
        standing = ("collapsed", "suspicious", "healthy").index(point["verdict"]), point["corrected"]
        if standing > best:
            records, best = [*records, point["step"]], standing
    kept = sorted(int(path.name[-6:]) for path in (run / "checkpoints").iterdir())
    assert kept == sorted({*records, 6}) and json_of(run / "best" / "best.json")["step"] == records[-1]


def test_a_best_point_beyond_where_a_run_goes_on_is_forgotten(
    finished: Finished, make_recipe: MakeRecipe, tmp_path: Path, quiet: Reporter
) -> None:
    """Its checkpoint is lost, and the run goes on without evaluation points: it ends with its last weights."""
    shutil.copytree(finished[0], tmp_path, dirs_exist_ok=True)
    run = tmp_path / "runs" / finished[1].run.path.name
    shutil.rmtree(run / "checkpoints" / "step-000004")
    again = train.run(Session(make_recipe(train={"eval_every": 0}), tmp_path, quiet))
    assert again.run.path == run and again.resumed_from == 3
    assert not (run / "best").exists() and "weights kept" not in again.summary


class Listener(Reporter):
    """Keeps what is said."""

    def __init__(self) -> None:
        super().__init__(Console(quiet=True))
        self.said: list[str] = []

    def say(self, text: str) -> None:
        self.said.append(text)


@pytest.mark.parametrize("allowed", [0.4, 0.6])
def test_a_point_without_judgements_is_no_candidate(
    finished: Finished, make_recipe: MakeRecipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, allowed: float
) -> None:
    """Half of the answers make no sense: more than 0.4 allows, not more than 0.6."""
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    shutil.copytree(finished[0] / "stores", tmp_path / "stores")
    listener, answers = Listener(), itertools.count()
    server = JudgeServer()
    server.otherwise = lambda text: says(lines(3, 3, 3) if next(answers) % 2 else "no idea")
    judge = {"kind": "unified-reward", "base_url": server.url, "model": MODEL, "retries": 0, "concurrency": 1}
    try:
        recipe = make_recipe(judge={**judge, "max_failed_share": allowed})
        run = train.run(Session(recipe, tmp_path, listener)).run.path
    finally:
        server.close()
    assert [row["unjudged"] for row in points_of(run)] == [1, 1]
    told = [text for text in listener.said if "cannot be the best" in text]
    assert (run / "best").exists() == (allowed > 0.5) == (not told)
    assert told in (
        [],
        [
            "step 4: 0 images have no reward and 1 no judgement, more than reward.max_failed_share or"
            " judge.max_failed_share: this point cannot be the best"
        ],
    )


@pytest.mark.parametrize("point", [2, 4])
def test_a_judge_that_hangs_does_not_hold_a_stop_up(
    point: int, finished: Finished, make_recipe: MakeRecipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The point is given up, its step is kept, and the next start measures it and ends as if nothing had happened."""
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setattr(pool_module, "STOP_GRACE", 0.2)
    disturbed, undisturbed = tmp_path / "disturbed", tmp_path / "undisturbed"
    for workspace in (disturbed, undisturbed):
        shutil.copytree(finished[0] / "stores", workspace / "stores")
    server, hanging, asked = JudgeServer(), threading.Event(), itertools.count()

    def answer(text: str) -> Reply:
        if next(asked) < 2 * (point // 2 - 1):  # two pictures a point
            return says(lines(3.5, 4.0, 2.25))
        hanging.set()
        return says(lines(1, 1, 1), delay=PATIENCE)

    def stop_when_it_hangs() -> None:
        if hanging.wait(PATIENCE):
            os.kill(os.getpid(), signal.SIGTERM)

    judge = {"kind": "unified-reward", "base_url": server.url, "model": MODEL, "timeout": PATIENCE, "concurrency": 1}
    recipe = make_recipe(judge=judge, train={"eval_every": 2, "checkpoint_every": 100})
    try:
        whole = train.run(Session(recipe, undisturbed, Listener())).run.path
        base = next(undisturbed.glob("validation/*/base.json"))
        shutil.copytree(
            base.parent, disturbed / "validation" / base.parent.name
        )  # so that step 2 is the first to judge
        server.otherwise, began = answer, time.monotonic()
        waiting = threading.Thread(target=stop_when_it_hangs, daemon=True)
        waiting.start()
        with pytest.raises(
            Interrupted, match=f"stopped after step {point} of 4; run the same command again to continue"
        ):
            train.run(Session(recipe, disturbed, Listener()))
        waiting.join()
        assert time.monotonic() - began < PATIENCE / 2
        (run,) = (disturbed / "runs").iterdir()
        assert not (run / "lock.owner").exists() and [row["step"] for row in points_of(run)] == list(range(0, point, 2))
        with pytest.raises(PrerequisiteError, match=f"is at step {point} of 4: run `gdro train`"):
            evaluate.run(Session(recipe, disturbed, Listener()))
        with (run / "metrics.jsonl").open("ab") as file:  # as a kill does that comes before the checkpoint says so
            rows = (whole / "metrics.jsonl").read_bytes().splitlines(keepends=True)
            file.writelines(row for row in rows if b'"validation"' in row and b'"step": %d,' % point in row)
        assert [row["step"] for row in points_of(run)] == list(range(0, point + 1, 2))
        server.otherwise = lambda text: says(lines(3.5, 4.0, 2.25))
        again = train.run(Session(recipe, disturbed, Listener()))
        assert (again.run.path, again.resumed_from, again.was_finished) == (run, point, False)
    finally:
        server.close()
    assert timeless(run) == timeless(whole)
    for name in ("pytorch_lora_weights.safetensors", "best/best.json", "checkpoints/step-000004/state.json"):
        assert (run / name).read_bytes() == (whole / name).read_bytes(), name
    assert train.run(Session(recipe, disturbed, Listener())).was_finished


def test_groups_that_are_not_trained_on_are_told_and_counted(
    finished: Finished, make_recipe: MakeRecipe, tmp_path: Path
) -> None:
    shutil.copytree(finished[0] / "stores", tmp_path / "stores")
    recipe = make_recipe()
    listener = Listener()
    session = Session(recipe, tmp_path, listener)
    table = open_reward_table(session, open_training_store(session))
    rewards = [[row.value for row in table.rows()][4 * place : 4 * place + 4] for place in range(4)]
    spreads = sorted(max(group) - min(group) for group in rewards)
    limit = (spreads[1] + spreads[2]) / 2  # two of the four groups lie within
    run = train.run(Session(make_recipe(method={"min_spread": limit}, train={"eval_every": 0}), tmp_path, listener)).run
    (told,) = [text for text in listener.said if "can be trained on" in text]
    assert told == f"2 of 4 groups can be trained on; left out: 2 with no spread of rewards above {limit:g}"
    assert [row["dropped_groups_share"] for row in run.metrics()] == [0.5] * 4
    equal = sum(spread == 0 for spread in spreads)
    shares = [row["dropped_groups_share"] for row in finished[1].run.metrics() if row["kind"] == "train"]
    assert shares == [equal / 4] * 4


def test_the_page_names_every_key_of_the_results(finished: Finished) -> None:
    page = (Path(__file__).parents[3] / "docs" / "evaluation.md").read_text()
    table = page.split("## results.json")[1].split("\n## ")[0]
    rows = [line.split("|")[1] for line in table.splitlines() if line.startswith("| `")]
    named = [key for row in rows for key in re.findall(r"`(\w+)`", row)]
    assert sorted(named) == sorted(json_of(finished[1].run.path / "results.json"))


def test_an_evaluation_writes_its_report(finished: Finished) -> None:
    workspace, trained, evaluated = finished
    run = trained.run.path
    results = json_of(run / "results.json")
    assert evaluated.file == run / "results.json" and evaluated.page == run / "report.html"
    assert (results["kind"], results["schema"], results["task"]) == ("gdro results", 2, "ocr")
    point = points_of(run)[-1]
    chosen = {"measure": "corrected", "score": point["corrected"]} | {
        key: point[key] for key in ("protocol", "verdict")
    }
    assert results["weights"] == {"kind": "ema", "checkpoint": "best", "step": 4, "chosen_by": chosen}
    assert set(results["measures"]) == {
        *("reward", "exact match", "similarity", "confident reward", "text area"),
        *(*AXES, "u", "corrected", "corrected of the means"),
    }
    signals = {"dark_share", "edge_density", "colour_entropy", "high_frequency", "stripe_peak", "diversity"}
    assert signals | {"text_area"} <= set(results["signals"]) <= signals | {"text_area", "rank_disagreement"}
    assert results["verdict"]["level"] in LEVELS and results["verdict"]["reasons"]
    assert read_results(run) == evaluated.results
    assert (results["failed"], results["unjudged"]) == (0, 0)
    assert results["protocol"]["judge"]["axes"] == list(AXES)
    for side in ("base", "trained"):
        rows = results["images"][side]
        change = results["measures"]["corrected of the means"][side]
        reward = sum(row["value"] for row in rows) / len(rows)
        assert change["mean"] == pytest.approx(reward * (mean(rows, "u") - 3) + 0.2)
        assert len(rows) == 8 and all((workspace / row["file"]).is_file() for row in rows)
        for name in ("u", "corrected", "dark_share"):
            interval = (results["measures"] | results["signals"])[name][side]
            assert interval["mean"] == pytest.approx(mean(rows, name)) and interval["images"] == 8
    gain = results["measures"]["u"]
    assert gain["difference"]["mean"] == pytest.approx(gain["trained"]["mean"] - gain["base"]["mean"])
    with (run / "results.csv").open(newline="") as file:
        table = list(csv.DictReader(file))
    assert len(table) == 16 and all(row["u"] and row["corrected"] for row in table)
    assert "corrected" in (run / "report.html").read_text()
    one = run / "evaluations" / f"{Path(results['grid']).stem}.json"
    assert json_of(one) == results


# --- a model that is destroyed on purpose ----------------------------------------------------------------------

DESTROYED: dict[str, Any] = {
    "prompts": {"validation": {"count": 12}},
    "method": {"gamma": 0.0, "beta": 0.01},
    "train": {"lr": 0.3, "steps": 6, "eval_every": 1, "checkpoint_every": 6, "stop_on_collapse": True},
}


@pytest.fixture(scope="module")
def destroyed(
    finished: Finished, make_recipe: MakeRecipe, tmp_path_factory: pytest.TempPathFactory, quiet: Reporter
) -> tuple[Path, train.TrainResult]:
    workspace = tmp_path_factory.mktemp("destroyed")
    shutil.copytree(finished[0] / "stores", workspace / "stores")
    return workspace, train.run(Session(make_recipe(**DESTROYED), workspace, quiet))


def test_training_ends_where_the_pictures_collapse(destroyed: tuple[Path, train.TrainResult]) -> None:
    run = destroyed[1].run.path
    points = points_of(run)
    stopped = json_of(run / STOPPED)
    assert [row["verdict"] for row in points][-1] == "collapsed"
    assert all(row["verdict"] != "collapsed" for row in points[:-1])
    assert stopped["step"] == points[-1]["step"] < 6 and stopped["reasons"]
    assert points[-1]["u"] < points[0]["u"] - 0.5
    last = latest_checkpoint(run)
    assert last is not None and last.name == f"step-{stopped['step']:06d}"
    assert (run / STOPPED).stat().st_mtime_ns > (last / "manifest.json").stat().st_mtime_ns  # a kill between repeats
    assert "collapsed" in destroyed[1].summary["training"]
    assert destroyed[1].summary["steps"] == str(stopped["step"])


def test_a_run_that_ended_early_is_not_continued(
    destroyed: tuple[Path, train.TrainResult], make_recipe: MakeRecipe, quiet: Reporter
) -> None:
    workspace, first = destroyed
    before = first.run.metrics_path.read_text()
    again = train.run(Session(make_recipe(**DESTROYED), workspace, quiet))
    assert again.run.path == first.run.path
    assert first.run.metrics_path.read_text() == before
    assert "collapsed" in again.summary["training"]


def timeless(run: Path) -> list[dict[str, Any]]:
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [without_times(row) for row in rows]


@pytest.fixture
def destroyed_copy(destroyed: tuple[Path, train.TrainResult], tmp_path: Path) -> tuple[Path, Path]:
    """A copy of the workspace, and the run in it without what is written after the last checkpoint."""
    workspace = shutil.copytree(destroyed[0], tmp_path / "copy")
    run = workspace / "runs" / destroyed[1].run.path.name
    (run / "pytorch_lora_weights.safetensors").unlink()
    return workspace, run


def test_a_kill_before_the_note_of_the_end_does_not_move_it(
    destroyed_copy: tuple[Path, Path], make_recipe: MakeRecipe, quiet: Reporter
) -> None:
    workspace, run = destroyed_copy
    before, note = (run / "metrics.jsonl").read_text(), (run / STOPPED).read_bytes()
    (run / STOPPED).unlink()
    again = train.run(Session(make_recipe(**DESTROYED), workspace, quiet))
    assert (run / STOPPED).read_bytes() == note and (run / "metrics.jsonl").read_text() == before
    assert again.resumed_from == json_of(run / STOPPED)["step"] and "collapsed" in again.summary["training"]
    assert (run / "pytorch_lora_weights.safetensors").is_file()


def test_a_note_without_its_checkpoint_ends_nothing(
    destroyed_copy: tuple[Path, Path], destroyed: tuple[Path, train.TrainResult], make_recipe: MakeRecipe
) -> None:
    """The user deleted the last checkpoint, as a message about damage says: the run goes on, to the same end."""
    workspace, run = destroyed_copy
    last = latest_checkpoint(run)
    assert last is not None
    shutil.rmtree(last)
    recipe = make_recipe(**DESTROYED)
    (place,) = trial_runs(Session(recipe, workspace), plan_sweep(recipe, ["gamma"], ["0.0"]))
    assert place.run == run and not place.trained
    again = train.run(Session(recipe, workspace, Listener()))
    assert again.resumed_from < json_of(run / STOPPED)["step"]
    assert timeless(run) == timeless(destroyed[1].run.path)
    assert (run / STOPPED).read_bytes() == (destroyed[1].run.path / STOPPED).read_bytes()
    files = [folder / last.name / "ema.safetensors" for folder in (last.parent, destroyed[1].run.path / "checkpoints")]
    assert files[0].read_bytes() == files[1].read_bytes()


def test_a_destroyed_model_can_be_evaluated(
    destroyed: tuple[Path, train.TrainResult], make_recipe: MakeRecipe, quiet: Reporter
) -> None:
    workspace, trained = destroyed
    recipe = make_recipe(**DESTROYED, eval={"checkpoint": "last"})
    found = evaluate.run(Session(recipe, workspace, quiet))
    assert found.results.weights.step == json_of(trained.run.path / STOPPED)["step"]
    assert found.results.measures["u"].difference.mean < -0.5
    assert found.results.verdict.level == "collapsed"


def test_where_it_ends_is_learnt_from_only_if_points_decide_it(make_recipe: MakeRecipe) -> None:
    """What the verdict depends on names a run that may end early; what `gdro eval` alone reads never names one."""
    watched = [
        {"prompts": {"validation": {"count": 3}}},
        {"judge": {"kind": "none"}},
        {"eval": {"seed": 7}},
        {"eval": {"weights": "raw"}},
        {"train": {"eval_every": 2}},
    ]
    unwatched = [{"eval": {"checkpoint": "last"}}, {"eval": {"images_per_prompt": 3}}, {"eval": {"grid_prompts": 1}}]
    for stop in (False, True):
        plain = learnt_from(make_recipe(train={"stop_on_collapse": stop}))
        for change in [*watched, *unwatched]:
            section = {**change.get("train", {}), "stop_on_collapse": stop}
            other = learnt_from(make_recipe(**{**change, "train": section}))
            assert (other != plain) == (stop and change in watched), change


# --- without a judge -------------------------------------------------------------------------------------------


def test_without_a_judge_there_is_no_quality_and_the_best_point_goes_by_the_reward(
    finished: Finished, make_recipe: MakeRecipe, tmp_path: Path, quiet: Reporter
) -> None:
    shutil.copytree(finished[0] / "stores", tmp_path / "stores")
    for table in tmp_path.glob("stores/*/scores/*"):
        if json_of(table / "manifest.json")["name"] == "judge":
            shutil.rmtree(table)
    recipe = make_recipe(judge={"kind": "none"})
    trained = train.run(Session(recipe, tmp_path, quiet))
    assert trained.run.path.name == finished[1].run.path.name  # nothing is learnt from a judge
    points = points_of(trained.run.path)
    for row in points:
        assert not QUALITY & row.keys()
        assert row["verdict"] in LEVELS
    assert points[0]["protocol"] != points_of(finished[1].run.path)[0]["protocol"]
    assert json_of(trained.run.path / "best" / "best.json") == {"step": 4, "reward": points[-1]["reward"]}
    found = evaluate.run(Session(recipe, tmp_path, quiet))
    results = json_of(found.file)
    assert set(results["measures"]) == {"reward", "exact match", "similarity", "confident reward", "text area"}
    assert "rank_disagreement" not in results["signals"] and "dark_share" in results["signals"]
    assert results["protocol"]["judge"] is None and results["unjudged"] == found.results.unjudged == 0
    assert results["verdict"] is not None
    for side in ("base", "trained"):
        assert all(not QUALITY & row["details"].keys() for row in results["images"][side])
    assert {json_of(path)["name"] for path in tmp_path.glob("**/scores/*/manifest.json")} == {"ocr"}
    assert found.page.is_file()
