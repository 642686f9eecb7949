"""Ablations of the small recipe: real trainings of four steps, of which one was carried out before."""

from __future__ import annotations

import csv
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import weakref
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from rich.console import Console
from safetensors.torch import load_file

from gdro_cli.cli.app import main
from gdro_cli.config.load import load_recipe
from gdro_cli.config.recipe import Recipe
from gdro_cli.config.sweep import Sweep, plan_sweep
from gdro_cli.data.prompts import load_prompts
from gdro_cli.errors import Interrupted, StoreError
from gdro_cli.models.base import FlowModel
from gdro_cli.runtime.lock import folder_lock
from gdro_cli.runtime.metrics import ValidationRow
from gdro_cli.runtime.progress import Reporter
from gdro_cli.stages.ablation import ablate
from gdro_cli.stages.ablation.images import draw_images
from gdro_cli.stages.ablation.result import collect
from gdro_cli.stages.ablation.trials import measure_end, trial_runs
from gdro_cli.stages.evaluation import evaluate
from gdro_cli.stages.runs.identity import learnt_from
from gdro_cli.stages.setup.session import Session
from gdro_cli.stages.training import train
from tests.support.prompt_rewards import OCR

pytestmark = pytest.mark.slow

Finished = tuple[Path, train.TrainResult, evaluate.EvalResult]
MakeRecipe = Callable[..., Recipe]
Done = tuple[Path, Sweep, ablate.AblationResult]


def json_of(path: Path) -> dict[str, Any]:
    held: dict[str, Any] = json.loads(path.read_text())
    return held


def rows_of(run: Path, kind: str) -> list[dict[str, Any]]:
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [row for row in rows if row["kind"] == kind]


def timeless(points: tuple[ValidationRow, ...]) -> list[dict[str, Any]]:
    return [point.to_json() | {"seconds": 0} for point in points]


def written(workspace: Path) -> dict[Path, int]:
    """When each file of stores and runs was written last."""
    files = [path for part in ("stores", "runs") for path in (workspace / part).rglob("*") if path.is_file()]
    return {path: path.stat().st_mtime_ns for path in files}


@pytest.fixture(scope="module")
def done(
    finished: Finished, make_recipe: MakeRecipe, tmp_path_factory: pytest.TempPathFactory, quiet: Reporter
) -> Done:
    """tau 0.05 and 0.5 with two seeds; tau 0.05 with seed 0 is the recipe itself, which was trained before."""
    workspace = tmp_path_factory.mktemp("ablation")
    shutil.copytree(finished[0], workspace, dirs_exist_ok=True)
    sweep = plan_sweep(make_recipe(), ["tau"], ["0.05,0.5"], seeds=2)
    return workspace, sweep, ablate.run(Session(sweep.recipe, workspace, quiet), sweep)


def test_one_transformer_at_a_time(
    finished: Finished, make_recipe: MakeRecipe, tmp_path: Path, quiet: Reporter, monkeypatch: pytest.MonkeyPatch
) -> None:
    """When a cell loads its transformer, those of the cells before it are gone: on a GPU they would fill it."""
    load, loaded, alive = FlowModel._load_network, [], []

    def watched(self: FlowModel, name: str) -> torch.nn.Module:
        if name == "transformer":
            alive.append(sum(reference() is not None for reference in loaded))
        module = load(self, name)
        if name == "transformer":
            loaded.append(weakref.ref(module))
        return module

    shutil.copytree(finished[0], tmp_path, dirs_exist_ok=True)
    monkeypatch.setattr(FlowModel, "_load_network", watched)
    sweep = plan_sweep(make_recipe(train={"steps": 1}), ["tau"], ["0.1,0.2,0.3,0.4,0.5"])
    result = ablate.run(Session(sweep.recipe, tmp_path, quiet), sweep)
    assert len(result.ablation.cells) == 5
    assert len(alive) >= 5 and max(alive) == 0


def test_cells_share_one_store_and_reuse_an_earlier_run(finished: Finished, done: Done) -> None:
    workspace, _, result = done
    before = [path.name for path in (finished[0] / "stores").iterdir()]
    assert sorted(path.name for path in (workspace / "stores").iterdir()) == sorted(before)
    runs = [each.run for each in result.ablation.cells]
    assert len(set(runs)) == 4 and runs[0].name == finished[1].run.path.name
    assert (runs[0] / "metrics.jsonl").read_bytes() == finished[1].run.metrics_path.read_bytes()
    assert [len(rows_of(run, "train")) for run in runs] == [4, 4, 4, 4]


def test_seeds_vary_the_training_alone(done: Done) -> None:
    """The same step of two seeds sees other groups, sigma and noise; the untrained model is the same."""
    first, _, second, _ = done[2].ablation.cells
    assert (first.cell.label, second.cell.label) == ("tau 0.05", "tau 0.05")
    assert first.cell.seed != second.cell.seed and first.points[0]["reward"] == second.points[0]["reward"]
    assert rows_of(first.run, "train")[0]["loss"] != rows_of(second.run, "train")[0]["loss"]
    one, other = (load_file(each.run / "pytorch_lora_weights.safetensors") for each in (first, second))
    assert any(not one[name].equal(other[name]) for name in one)


def test_a_run_is_named_the_same_with_its_own_seed_named(make_recipe: MakeRecipe) -> None:
    plain = learnt_from(make_recipe())
    assert learnt_from(make_recipe(train={"seed": 0})) == plain
    assert learnt_from(make_recipe(train={"seed": 1})) != plain


def test_the_base_model_is_measured_once_for_all_cells(done: Done) -> None:
    workspace, _, result = done
    (shared,) = (workspace / "validation").iterdir()
    rows = json_of(shared / "base.json")["rows"]
    for each in result.ablation.cells:
        assert json_of(each.run / "validation" / "base.json")["rows"] == rows
        sheets = sorted(path.name for path in (each.run / "validation").glob("*.png"))
        assert sheets == ["step-000000.png", "step-000004.png"]
        rewards = [row["value"] for row in rows]
        assert each.points[0]["reward"] == pytest.approx(sum(rewards) / len(rewards))


def test_numbers_are_those_of_the_runs(done: Done) -> None:
    _, sweep, result = done
    document = json_of(result.files[0])
    assert (document["kind"], document["schema"], document["seeds"]) == ("gdro ablation", 2, [0, 1])
    assert document["parameters"] == [{"name": "tau", "key": "method.tau", "values": [0.05, 0.5]}]
    peaks: dict[str, list[float]] = {}
    for cell, each in zip(document["cells"], result.ablation.cells, strict=True):
        points = rows_of(each.run, "validation")
        assert cell["points"] == points and [point["step"] for point in points] == [0, 4]
        last = points[-1]
        assert cell["figures"]["final_reward"] == cell["figures"]["peak_reward"] == last["reward"]
        assert cell["figures"]["peak_corrected"] == last["corrected"] and cell["figures"]["peak_u"] == last["u"]
        assert cell["verdict_final"] == cell["verdict_peak"] == last["verdict"]
        assert (cell["state"], cell["kept_step"], cell["run"]) == ("finished", 4, each.run.name)
        own = sum(row["seconds"] for row in rows_of(each.run, "train")) + sum(row["seconds"] for row in points)
        assert cell["seconds"] == pytest.approx(own)
        peaks.setdefault(cell["label"], []).append(last["corrected"])
    for setting in document["settings"]:
        values = peaks[setting["label"]]
        expected = {"mean": sum(values) / 2, "low": min(values), "high": max(values), "seeds": 2}
        assert setting["deciding"] == setting["peak_corrected"] == pytest.approx(expected)
    means = {label: sum(values) / 2 for label, values in peaks.items()}
    assert document["best"] == [label for label in sweep.labels if means[label] == max(means.values())]
    assert document["deciding_measure"] == "corrected" and document["best"][0] in document["summary"]
    assert "2 prompts, 2 images per point" in document["summary"] and "mean of 2 seeds" in document["summary"]


def test_a_best_value_with_doubtful_images_is_named_with_them(done: Done) -> None:
    found = done[2].ablation
    (best,) = found.best()

    def summary_with(verdict: str) -> str:
        cells = []
        for each in found.cells:
            peak = each.chosen.peak
            assert isinstance(peak, ValidationRow)
            if each.cell.label == best:
                peak = peak.model_copy(update={"verdict": verdict})
            cells.append(replace(each, chosen=replace(each.chosen, peak=peak)))
        return replace(found, cells=tuple(cells)).summary()

    assert " Look at its images first: of the verdicts there, 2 suspicious." in summary_with("suspicious")
    assert "Look at its images" not in summary_with("healthy")


def test_the_table_has_a_line_per_point(done: Done) -> None:
    result = done[2]
    with result.files[1].open(newline="") as file:
        table = list(csv.DictReader(file))
    assert [(row["method.tau"], row["seed"], row["step"]) for row in table] == [
        (tau, seed, step) for seed in ("0", "1") for tau in ("0.05", "0.5") for step in ("0", "4")
    ]
    for row, point in zip(table, [p for each in result.ablation.cells for p in each.points], strict=True):
        assert float(row["corrected"]) == point["corrected"] and row["verdict"] == point["verdict"]
        assert "overall" not in row  # a measure of another reward


def test_the_page_needs_nothing_else(done: Done) -> None:
    """A curve, and per setting and for the base model the two prompts of `eval.grid_prompts`."""
    page = done[2].page.read_text()
    assert not re.search(r"(?:src|href)=\"(?!data:|#)", page) and "<script" not in page
    assert page.count("data:image/png;base64,") == 3 * 2 and page.count("<svg") == 1
    assert page.index("base model") < page.index("step 4 (best), seed 0")
    for words in ("tau 0.05", "tau 0.5", "mean of the seeds", "Over seeds"):
        assert words in page


def test_images_are_those_of_the_kept_weights(done: Done) -> None:
    document, folder = json_of(done[2].files[0])["images"], done[2].page.parent
    files = [[(folder / name).read_bytes() for name in row["files"]] for row in document["rows"]]
    assert [row["label"] for row in document["rows"]] == ["base model", "tau 0.05", "tau 0.5"]
    assert [len(row) for row in files] == [2, 2, 2]
    assert files[0][0] != files[0][1]  # another prompt
    assert files[0] != files[1]  # the same prompts and noise, after four steps


def test_images_that_cannot_be_opened_are_drawn_anew(done: Done, tmp_path: Path, quiet: Reporter) -> None:
    """Those of a setting of which one is empty, garbage, cut off or a link; the others are kept."""
    folder, found = tmp_path / "ablation", done[2].ablation
    shutil.copytree(done[2].page.parent, folder)
    names = [row["files"][0] for row in json_of(done[2].files[0])["images"]["rows"]]
    before = {path: path.read_bytes() for path in (folder / "images").iterdir()}
    first, second, third = (folder / name for name in names)
    times = {path: path.stat().st_mtime_ns for path in before}
    first.write_bytes(b"")
    second.write_bytes(before[second][:200])
    draw_images(Session(found.sweep.recipe, tmp_path, quiet), found, folder)
    assert {path: path.read_bytes() for path in before} == before
    assert third.stat().st_mtime_ns == times[third] and first.stat().st_mtime_ns != times[first]
    first.write_bytes(b"no image")
    third.unlink()
    third.symlink_to(second)
    draw_images(Session(found.sweep.recipe, tmp_path, quiet), found, folder)
    assert {path: path.read_bytes() for path in before} == before and not third.is_symlink()


def test_held_out_prompts_are_not_looked_at(done: Done, make_recipe: MakeRecipe) -> None:
    result = done[2]
    held_out = load_prompts(make_recipe().prompts.eval, reward=OCR).records
    seen = b"".join(path.read_bytes() for path in (result.page, *result.files)).decode()
    assert not any(prompt.id in seen or str(prompt.target) in seen for prompt in held_out)
    assert [each.run.name for each in result.ablation.cells if (each.run / "evaluations").exists()] == [
        result.ablation.cells[0].run.name  # evaluated before the ablation
    ]


def test_the_same_command_again_does_nothing_again(done: Done, quiet: Reporter) -> None:
    workspace, sweep, result = done
    before, page = written(workspace), result.page.read_bytes()
    again = ablate.run(Session(sweep.recipe, workspace, quiet), sweep)
    assert written(workspace) == before
    assert again.page == result.page and again.page.read_bytes() == page
    lines, cells = ablate.describe(Session(sweep.recipe, workspace, planning=True), sweep)
    assert dict(lines)["cells"] == "4, 4 of them finished" and dict(lines)["training"] == "0 steps are left"
    assert [cell[2] for cell in cells] == ["finished"] * 4


def test_an_ablation_in_use_is_refused(done: Done, quiet: Reporter) -> None:
    workspace, sweep, result = done
    with (
        folder_lock(result.page.parent / "lock"),
        pytest.raises(StoreError, match=f"is in use by process {os.getpid()}"),
    ):
        ablate.run(Session(sweep.recipe, workspace, quiet), sweep)


def test_a_run_without_points_gets_its_last_one(
    finished: Finished, make_recipe: MakeRecipe, tmp_path: Path, quiet: Reporter
) -> None:
    """It was trained with `train.eval_every: 0`; the ablation adds what it needs and trains nothing again."""
    shutil.copytree(finished[0] / "stores", tmp_path / "stores")
    recipe = make_recipe(train={"eval_every": 0})
    run = train.run(Session(recipe, tmp_path, quiet)).run.path
    assert not rows_of(run, "validation")
    steps = rows_of(run, "train")
    sweep = plan_sweep(recipe, ["tau"], ["0.05"])
    (cell,) = ablate.run(Session(sweep.recipe, tmp_path, quiet), sweep).ablation.cells
    assert cell.run == run and rows_of(run, "train") == steps
    points = rows_of(finished[1].run.path, "validation")
    assert timeless(cell.points) == [{**point, "seconds": 0} for point in points]


def test_without_a_judge_the_headline_measure_decides_and_this_is_said(
    done: Done, make_recipe: MakeRecipe, tmp_path: Path, quiet: Reporter
) -> None:
    """The same runs, measured anew at their end: nothing is learnt from a judge."""
    shutil.copytree(done[0], tmp_path, dirs_exist_ok=True)
    sweep = plan_sweep(make_recipe(judge={"kind": "none"}), ["tau"], ["0.05,0.5"])
    result = ablate.run(Session(sweep.recipe, tmp_path, quiet), sweep)
    assert [each.run.name for each in result.ablation.cells] == [each.run.name for each in done[2].ablation.cells[:2]]
    document = json_of(result.files[0])
    assert document["deciding_measure"] == "reward" and "there is no judge" in document["summary"]
    for cell in document["cells"]:
        assert [point["step"] for point in cell["points"]] == [0, 4]
        assert cell["figures"]["peak_corrected"] is None and cell["figures"]["final_u"] is None
    rewards = {cell["label"]: cell["points"][-1]["reward"] for cell in document["cells"]}
    assert document["best"] == [label for label, reward in rewards.items() if reward == max(rewards.values())]
    columns, _ = result.ablation.cell_table
    assert len(set(columns)) == len(columns) and not any("corrected" in column for column in columns)


def test_objectives_are_compared_by_the_headline_measure(tmp_path: Path) -> None:
    """Their points are not of one curve's protocol, but all else is measured alike."""
    sweep = plan_sweep(load_recipe("geneval"), ["reward.geneval.objective"], ["soft,accuracy"])
    one, other = trial_runs(Session(sweep.recipe, tmp_path), sweep)
    assert one.protocol.points != other.protocol.points
    assert (one.protocol.measures, one.protocol.base) == (other.protocol.measures, other.protocol.base)
    found = collect(sweep, (one, other), tmp_path)
    assert (found.reward, found.measure) == ("overall", "overall")
    assert [each.outcome.state for each in found.cells] == ["unfinished", "unfinished"] and found.best() == ()


def test_only_keys_of_the_store_make_more_than_one(make_recipe: MakeRecipe, tmp_path: Path) -> None:
    def stores(recipe: Recipe, key: str, values: str) -> list[str]:
        session = Session(recipe, tmp_path, planning=True)
        lines, _ = ablate.describe(session, plan_sweep(recipe, [key], [values]))
        return [text for name, text in lines if name == "store"]

    assert len(set(stores(make_recipe(), "k", "2,3,4"))) == 1
    assert len(set(stores(make_recipe(eval={"steps": 3}), "sample.steps", "2,3,4"))) == 3
    assert not list(tmp_path.iterdir())


def test_the_untrained_model_is_measured_without_the_adapter(
    finished: Finished, make_recipe: MakeRecipe, tmp_path: Path, quiet: Reporter
) -> None:
    """A run without evaluation points, whose base model's rows are known, but not its sheet of images."""
    shutil.copytree(finished[0] / "stores", tmp_path / "stores")
    recipe = make_recipe(train={"eval_every": 0, "steps": 3, "lr": 0.03})
    run = train.run(Session(recipe, tmp_path, quiet)).run.path
    for _ in range(2):
        session = Session(recipe, tmp_path, quiet)
        (trial,) = trial_runs(session, plan_sweep(recipe, ["tau"], [str(recipe.method.tau)]))
        measure_end(session, trial)
        (run / "validation" / "step-000000.png").unlink()
    first, trained, again, last = rows_of(run, "validation")
    quality = [[row[name] for name in ("reward", "u", "corrected")] for row in (first, again, trained, last)]
    assert quality[0] == pytest.approx(quality[1]) and quality[2] == pytest.approx(quality[3])
    assert quality[0] != pytest.approx(quality[2])


class _Listener(Reporter):
    """Presses Ctrl-C when it hears certain words."""

    def __init__(self, words: str) -> None:
        super().__init__(Console(quiet=True))
        self.words = words

    def say(self, text: str) -> None:
        if self.words in text:
            os.kill(os.getpid(), signal.SIGINT)


def test_ctrl_c_stops_and_the_same_command_goes_on(
    done: Done, make_recipe: MakeRecipe, tmp_path: Path, quiet: Reporter
) -> None:
    """Asked for when the second cell begins: it stops after one step of it; what comes out in the end is the same."""
    shutil.copytree(done[0] / "stores", tmp_path / "stores")
    sweep = plan_sweep(make_recipe(), ["tau"], ["0.05,0.5"])
    with pytest.raises(Interrupted, match="after step 1 of 4; run the same command again"):
        ablate.run(Session(sweep.recipe, tmp_path, _Listener("cell 2 of 2")), sweep)
    _, cells = ablate.describe(Session(sweep.recipe, tmp_path, planning=True), sweep)
    assert [cell[2] for cell in cells] == ["finished", "step 1 of 4"]
    found = ablate.run(Session(sweep.recipe, tmp_path, quiet), sweep).ablation
    for each, straight in zip(found.cells, done[2].ablation.cells, strict=False):
        assert timeless(each.points) == timeless(straight.points)


def small_file(recipe: Recipe, folder: Path) -> str:
    path = folder / "small.yaml"
    path.write_text(yaml.safe_dump(recipe.resolved()))
    return str(path)


def test_a_cell_that_fails_does_not_end_the_others(
    done: Done, make_recipe: MakeRecipe, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A learning rate of 1e30 makes the second step's loss infinite; the other is the recipe's own, trained before."""
    out = tmp_path / "out"
    shutil.copytree(done[0], out)
    command = ["ablate", "--recipe", small_file(make_recipe(), tmp_path), "--param", "lr", "--values", "1e30,3e-4"]
    with pytest.raises(SystemExit) as leaving:
        main([*command, "--out", str(out)])
    assert leaving.value.code == StoreError.exit_code
    shown = capsys.readouterr().out
    assert "Best by corrected score on the validation prompts: lr 0.0003" in shown
    assert "Failed: lr 1e+30, seed 0." in shown and "1 of 2 finished" in shown
    (path,) = out.glob("ablations/small-lr-*/ablation.json")
    failed, other = json_of(path)["cells"]
    assert failed["state"] == "failed" and "the loss became" in failed["reason"]
    assert other["state"] == "finished" and json_of(path)["best"] == ["lr 0.0003"]
    assert "the loss became" in path.with_name("report.html").read_text()


def test_what_the_recipe_fixes_holds_in_all_cells_and_is_on_the_page(
    done: Done, make_recipe: MakeRecipe, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The recipe has another K and two steps more; with what it fixes, the cells are trainings of `done`."""
    out = tmp_path / "out"
    shutil.copytree(done[0], out)
    entry = {"values": [0.05, 0.5], "set": {"k": 3, "train.steps": 4}}
    recipe = make_recipe(method={"k": 2}, train={"steps": 6}, ablation={"tau": entry})
    command = ["ablate", "--recipe", small_file(recipe, tmp_path), "--param", "tau", "--out", str(out)]
    before = written(out)
    for more in (["--dry-run"], []):
        with pytest.raises(SystemExit) as leaving:
            main([*command, *more])
        assert leaving.value.code == 0
        assert "2, 2 of them finished" in capsys.readouterr().out or not more
    assert written(out) == before
    (path,) = set(out.glob("ablations/*/ablation.json")) - {out / done[2].files[0].relative_to(done[0])}
    document, page = json_of(path), path.with_name("report.html").read_text()
    assert [cell["run"] for cell in document["cells"]] == [each.run.name for each in done[2].ablation.cells[:2]]
    assert document["fixed"] == {"method.k": {"value": 3, "recipe": 2}, "train.steps": {"value": 4, "recipe": 6}}
    assert "The recipe fixes for this sweep: method.k 3 (otherwise 2), train.steps 4 (otherwise 6)." in page
    assert json_of(done[2].files[0])["fixed"] == {}


def test_two_jobs_share_the_cells(done: Done, make_recipe: MakeRecipe, tmp_path: Path) -> None:
    """Each process trains on its own: the points are those of one process."""
    out = tmp_path / "out"
    shutil.copytree(done[0] / "stores", out / "stores")
    command = [sys.executable, "-m", "gdro_cli", "ablate", "--recipe", small_file(make_recipe(), tmp_path)]
    command += ["--param", "tau", "--values", "0.05,0.5", "--jobs", "2", "--out", str(out)]
    ended = subprocess.run(command, capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stderr
    assert "[tau 0.05, seed 0] cell 1 of 2" in ended.stderr and "[tau 0.5, seed 0] cell 2 of 2" in ended.stderr
    (path,) = out.glob("ablations/small-tau-*/ablation.json")
    cells = json_of(path)["cells"]
    assert [cell["state"] for cell in cells] == ["finished", "finished"]
    for cell, straight in zip(cells, done[2].ablation.cells, strict=False):
        assert cell["run"] == straight.run.name
        assert [point["step"] for point in cell["points"]] == [0, 4]
        assert cell["points"][-1]["u"] == pytest.approx(straight.points[-1]["u"], abs=0.05)
