"""The other methods on stored groups: a training in one pass and in two, and one that was stopped."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from gdro_cli.config.recipe import Recipe
from gdro_cli.runtime.checkpoint import latest_checkpoint, load_checkpoint
from gdro_cli.runtime.progress import Reporter
from gdro_cli.runtime.run import RunFolder
from gdro_cli.stages.evaluation import evaluate
from gdro_cli.stages.setup.session import Session
from gdro_cli.stages.training import train

pytestmark = pytest.mark.slow

MakeRecipe = Callable[..., Recipe]
Finished = tuple[Path, train.TrainResult, evaluate.EvalResult]
METHODS = {
    "sft": ({"name": "sft", "k": 3}, "supervised fine-tuning"),
    "lair": ({"name": "regression"}, "Diffusion LAIR"),
    "crd": ({"name": "regression", "target": "crd"}, "CRD"),
    "dgpo": ({"name": "dgpo"}, "DGPO"),
    "nft": ({"name": "nft"}, "DiffusionNFT"),
}


def last_checkpoint(run: RunFolder) -> dict[str, dict[str, torch.Tensor]]:
    path = latest_checkpoint(run.path)
    assert path is not None
    return load_checkpoint(path).tensors


@pytest.mark.parametrize(("method", "title"), METHODS.values(), ids=METHODS.keys())
def test_a_method_trains_in_one_pass_in_two_and_after_a_stop(
    method: dict[str, object], title: str, finished: Finished, make_recipe: MakeRecipe, tmp_path: Path, quiet: Reporter
) -> None:
    shutil.copytree(finished[0] / "stores", tmp_path / "stores", ignore=shutil.ignore_patterns("references"))
    small = {"lr": 0.003, "eval_every": 0}  # in few steps, away from where the policy is the reference
    one = train.run(Session(make_recipe(method=method, train=small), tmp_path, quiet))
    whole = last_checkpoint(one.run)
    assert title in (one.run.path / "README.md").read_text()
    first, *_, last = (row for row in one.run.metrics() if row["kind"] == "train")
    assert first["grad_norm"] > 1e-6 and last["s_rank_1"] != 0.0

    for step in ("step-000003", "step-000004"):
        shutil.rmtree(one.run.path / "checkpoints" / step)
    again = train.run(Session(make_recipe(method=method, train=small), tmp_path, quiet))
    assert again.resumed_from == 2
    resumed = last_checkpoint(again.run)
    assert resumed.keys() == whole.keys()
    for name, tensors in whole.items():
        assert all(torch.equal(value, resumed[name][key]) for key, value in tensors.items())

    rows = [row for row in again.run.metrics() if row["kind"] == "train"]
    shutil.rmtree(tmp_path / "runs")
    passes = {"group_gradient": "two_pass", "micro_batch": 2}
    two = train.run(Session(make_recipe(method=method, train=small | passes), tmp_path, quiet))
    for one_row, two_row in zip(rows, two.run.metrics(), strict=True):
        for name in ("loss", "grad_norm"):
            assert two_row[name] == pytest.approx(one_row[name], rel=1e-2, abs=1e-5)


def test_nft_keeps_no_reference_errors_and_trains_in_rounds(
    finished: Finished, make_recipe: MakeRecipe, tmp_path: Path, quiet: Reporter
) -> None:
    """It takes the reference's velocities, which are not kept, and groups of the trained model as they come."""
    shutil.copytree(finished[0] / "stores", tmp_path / "stores", ignore=shutil.ignore_patterns("references"))
    recipe = make_recipe(method={"name": "nft"}, train={"rounds": 2, "lr": 0.003, "eval_every": 0})
    trained = train.run(Session(recipe, tmp_path, quiet))
    assert len([row for row in trained.run.metrics() if row["kind"] == "train"]) == 4
    assert len([*trained.run.path.glob("rounds/*.json")]) == 1
    assert not [*tmp_path.glob("**/references")]
