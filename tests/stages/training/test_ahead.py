"""What only a later stage needs is checked before the first image: no mistake is reported after hours of sampling."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from gdro_cli.config.recipe import Recipe
from gdro_cli.stages.evaluation import evaluate
from gdro_cli.stages.training import train
from tests.support.faulty import check, command

Finished = tuple[Path, train.TrainResult, evaluate.EvalResult]

ENDPOINT = "http://127.0.0.1:9/v1"
"""Nobody answers there."""
JUDGE = ("judge.kind=unified-reward", f"judge.base_url={ENDPOINT}", "judge.model=judge")
VLM = ("reward.kind=vlm", f"reward.vlm.base_url={ENDPOINT}", "reward.vlm.model=vlm", "judge.kind=none")
MIX = ("reward.kind=mix", "reward.mix.weights={ocr: 1, vlm: 1}", *VLM[1:])
LATE = {
    "a layer": (("train.lora.targets=[to_q,FAKE]",), 2, "train.lora.targets names FAKE"),
    "a package": (("train.optimizer=adamw8bit",), 3, "needs the package bitsandbytes"),
    "a judge": (JUDGE, 3, f"the judge's endpoint {ENDPOINT} cannot be reached"),
    "a local judge": (("judge.kind=unified-reward-local", "judge.model=/nowhere"), 3, "/nowhere does not exist"),
    "prompts": (("prompts.validation.file=nope.txt",), 2, "the prompt file nope.txt cannot be read"),
    "a reward": (VLM, 3, f"endpoint {ENDPOINT} cannot be reached"),
    "a part of a mixture": (MIX, 3, f"endpoint {ENDPOINT} cannot be reached"),
}
"""Settings, exit code and words of the message."""


def settings(values: tuple[str, ...]) -> list[str]:
    return [f"--set={value}" for value in values]


@pytest.fixture(autouse=True)
def no_bitsandbytes(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("bitsandbytes", "bitsandbytes.optim"):
        monkeypatch.setitem(sys.modules, name, None)  # as if it were not installed


@pytest.fixture
def recipe(make_recipe: Callable[..., Recipe], tmp_path: Path) -> str:
    """The small recipe, its reward's section aside."""
    path = tmp_path / "small.yaml"
    path.write_text(yaml.safe_dump({k: v for k, v in make_recipe().resolved().items() if k not in ("reward", "judge")}))
    return f"--recipe={path}"


@pytest.mark.parametrize("name", ["train", "ablate"])
@pytest.mark.parametrize("mistake", LATE)
def test_before_the_first_image_of_a_training(mistake: str, name: str, recipe: str, tmp_path: Path) -> None:
    values, code, words = LATE[mistake]
    swept = ["--param=method.tau", "--values=0.1,0.2"] if name == "ablate" else []
    check(command(name, recipe, f"--out={tmp_path / 'out'}", *swept, *settings(values)), code, words)
    assert not list((tmp_path / "out").rglob("shards/*/*"))


def test_before_the_first_image_that_gdro_score_makes(recipe: str, tmp_path: Path) -> None:
    check(command("score", recipe, f"--out={tmp_path / 'out'}", *settings(VLM)), 3, "cannot be reached")
    assert not list((tmp_path / "out").rglob("shards/*/*"))


def test_before_the_first_image_of_an_evaluation(finished: Finished, tmp_path: Path) -> None:
    workspace = Path(shutil.copytree(finished[0], tmp_path / "out"))
    before = set(workspace.rglob("shards/*"))
    done = command("eval", finished[1].run.path.name, f"--out={workspace}", *settings((*JUDGE, "eval.seed=99")))
    check(done, 3, f"the judge's endpoint {ENDPOINT} cannot be reached")
    assert set(workspace.rglob("shards/*")) == before


@pytest.mark.slow
def test_what_is_not_needed_is_not_asked_for(recipe: str, tmp_path: Path) -> None:
    """Without evaluation points a training needs no judge."""
    values = (*JUDGE, "train.eval_every=0", "train.steps=1")
    assert command("train", recipe, f"--out={tmp_path / 'out'}", *settings(values)).code == 0
