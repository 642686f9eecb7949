"""A finished run stays finished, whatever of what it was made from is gone or has changed."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from gdro_cli.cli.app import main
from gdro_cli.config.recipe import Recipe
from gdro_cli.errors import PrerequisiteError, StoreError
from gdro_cli.rewards.ocr.reward import OcrReward
from gdro_cli.runtime.progress import Reporter
from gdro_cli.stages.evaluation import evaluate
from gdro_cli.stages.setup.session import Session
from gdro_cli.stages.training import train

MakeRecipe = Callable[..., Recipe]
Finished = tuple[Path, train.TrainResult, evaluate.EvalResult]


@pytest.fixture
def workspace(finished: Finished, tmp_path: Path) -> Path:
    """The finished job without its stores."""
    copy = shutil.copytree(finished[0], tmp_path / "out")
    shutil.rmtree(copy / "stores")
    return copy


def upgraded(monkeypatch: pytest.MonkeyPatch) -> None:
    """The reward's engine has another version than the one that scored the store."""
    before = OcrReward.version.func  # type: ignore[attr-defined]
    monkeypatch.setattr(OcrReward, "version", property(lambda self: {**before(self), "onnxruntime": "99.0"}))


def test_without_its_store_it_is_finished(workspace: Path, make_recipe: MakeRecipe, quiet: Reporter) -> None:
    result = train.run(Session(make_recipe(), workspace, quiet))
    assert result.was_finished and not (workspace / "stores").exists()


def test_without_its_checkpoints_it_is_finished_and_evaluated(
    finished: Finished, workspace: Path, make_recipe: MakeRecipe, quiet: Reporter
) -> None:
    run = workspace / "runs" / finished[1].run.path.name
    adapter = (run / "pytorch_lora_weights.safetensors").read_bytes()
    for folder in (run / "checkpoints", run / "best"):
        shutil.rmtree(folder)
    assert train.run(Session(make_recipe(), workspace, quiet)).was_finished
    assert (run / "pytorch_lora_weights.safetensors").read_bytes() == adapter
    again = evaluate.run(Session(make_recipe(), workspace, quiet))
    assert [measure.trained.mean for measure in again.results.measures.values()] == pytest.approx(
        [measure.trained.mean for measure in finished[2].results.measures.values()], abs=1e-6
    )
    with pytest.raises(PrerequisiteError, match="no checkpoints any more, and its adapter has the ema weights"):
        evaluate.run(Session(make_recipe(eval={"weights": "raw"}), workspace, quiet))


def test_with_other_versions_it_is_named_and_evaluated_by_name(
    finished: Finished,
    workspace: Path,
    make_recipe: MakeRecipe,
    quiet: Reporter,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    upgraded(monkeypatch)
    name = finished[1].run.path.name
    with pytest.raises(PrerequisiteError, match=rf'{name} is finished and differs in scores.onnxruntime: .* -> "99.0"'):
        evaluate.run(Session(make_recipe(), workspace, quiet))
    with pytest.raises(StoreError, match=f"{name} is a finished run .* run `gdro eval {name}` to evaluate it"):
        train.run(Session(make_recipe(), workspace, quiet))
    assert not (workspace / "stores").exists() and len(list((workspace / "runs").iterdir())) == 1
    before = (workspace / "runs" / name / "pytorch_lora_weights.safetensors").read_bytes()
    with pytest.raises(SystemExit) as leaving:
        main(["eval", name, "--set", "eval.images_per_prompt=1", "--out", str(workspace)])
    assert leaving.value.code == 0, capsys.readouterr().err
    results: dict[str, Any] = json.loads((workspace / "runs" / name / "results.json").read_text())
    assert results["protocol"]["reward"]["onnxruntime"] == "99.0" and len(results["images"]["base"]) == 4
    assert (workspace / "runs" / name / "pytorch_lora_weights.safetensors").read_bytes() == before


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["nothing"], 2, "there is no run nothing"),
        (["RUN", "--recipe", "geneval"], 2, "name a run or a recipe with --recipe, not both"),
        (["RUN", "--set", "eval.steps=-1"], 2, "eval.steps: must be at least 1"),
    ],
)
def test_a_run_that_cannot_be_evaluated_is_one_sentence(
    arguments: list[str],
    code: int,
    words: str,
    finished: Finished,
    capsys: pytest.CaptureFixture[str],
) -> None:
    given = [finished[1].run.path.name if word == "RUN" else word for word in arguments]
    with pytest.raises(SystemExit) as leaving:
        main(["eval", *given, "--out", str(finished[0])])
    err = capsys.readouterr().err
    assert leaving.value.code == code and words in err and err.count("\n") == 1
