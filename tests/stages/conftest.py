"""A small recipe on the embedded model, and a workspace in which it was carried out once."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from gdro_cli.config.load import build_recipe
from gdro_cli.config.recipe import Recipe
from gdro_cli.models.adapters import save_lora
from gdro_cli.runtime.progress import Reporter
from gdro_cli.runtime.run import RunFolder
from gdro_cli.stages.evaluation import evaluate
from gdro_cli.stages.runs.finished_run import write_adapter_note
from gdro_cli.stages.runs.weights import RunWeights
from gdro_cli.stages.setup.model import attach_adapter
from gdro_cli.stages.setup.session import Session
from gdro_cli.stages.training import train
from tests.support.shared import shared
from tests.support.warm_pools import warm_pools

SMALL: dict[str, Any] = {
    "name": "small",
    "prompts": {
        "train": {"builtin": "ocr-train", "count": 4},
        "validation": {"builtin": "ocr-validation", "count": 2},
        "eval": {"builtin": "ocr-test", "count": 4},
    },
    "sample": {"images_per_prompt": 4, "steps": 3, "height": 64, "width": 64, "prompts_per_shard": 2},
    "reward": {"workers": 1},
    "method": {"name": "gdro", "k": 3},
    "train": {
        "steps": 4,
        "groups_per_step": 2,
        "checkpoint_every": 1,
        "keep_checkpoints": 9,
        "eval_every": 4,
        "lora": {"rank": 4, "alpha": 8, "targets": "all-linear"},
    },
    "eval": {"bootstrap": 100, "grid_prompts": 2},
}


def merged(base: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    """A copy of ``base`` with nested ``changes``."""
    result = dict(base)
    for key, value in changes.items():
        inner = result.get(key)
        result[key] = merged(inner, value) if isinstance(inner, dict) and isinstance(value, dict) else value
    return result


@pytest.fixture(scope="session", autouse=True)
def warm() -> Iterator[None]:
    """Scoring processes outlive the job that starts them."""
    with warm_pools():
        yield


@pytest.fixture(scope="session")
def make_recipe() -> Callable[..., Recipe]:
    """The small recipe with changes: ``make_recipe(train={"steps": 2})``."""

    def make(**changes: Any) -> Recipe:
        return build_recipe(merged(SMALL, changes))

    return make


@pytest.fixture(scope="session")
def make_online() -> Callable[..., Recipe]:
    """A small recipe of Flow-GRPO with changes: two rounds of 2 x 3 images, two optimizer steps each."""
    base = {key: value for key, value in SMALL.items() if key != "method"}
    base["sample"] = {key: value for key, value in SMALL["sample"].items() if key != "images_per_prompt"}
    base["train"] = {key: value for key, value in SMALL["train"].items() if key != "groups_per_step"}
    small = {
        "name": "online",
        "sample": {"batch_size": 3},
        "method": {"name": "flow-grpo", "group_size": 3, "prompts_per_round": 2, "train_sample_steps": 4},
    }

    def make(**changes: Any) -> Recipe:
        whole = merged(base, small)
        if "name" in changes.get("method", {}):
            whole["method"] = {key: value for key, value in whole["method"].items() if key != "name"}
        return build_recipe(merged(whole, changes))

    return make


@pytest.fixture(scope="session")
def quiet() -> Reporter:
    """Says nothing."""
    return Reporter(quiet=True)


@pytest.fixture(scope="session")
def make_run(make_recipe: Callable[..., Recipe]) -> Callable[..., Path]:
    """A finished run made by hand, with a real adapter of random weights: ``make_run(folder, recipe)``."""

    def make(path: Path, recipe: Recipe | None = None, results: dict[str, Any] | None = None) -> Path:
        recipe = make_recipe() if recipe is None else recipe
        about = {"python": "3.11", "platform": "Linux", "devices": ["cpu"], "packages": {"torch": "2.9"}}
        inputs = {"store": "aaaa11112222", "scores": "bbbb33334444"}
        run = RunFolder.create_or_open(path, recipe={"name": recipe.name}, inputs=inputs, environment=about)
        session = Session(recipe, path.parent)
        generator = torch.Generator().manual_seed(3)
        for parameter in attach_adapter(recipe, session.model):
            parameter.data = 0.05 * torch.randn(parameter.shape, generator=generator)
        save_lora(session.model, path)
        run.write_json("resolved.json", recipe.resolved())
        weights = RunWeights(4, "best", {}, {}, {"measure": "corrected", "score": 0.5}, "ema 0")
        write_adapter_note(session, run, weights)
        if results is not None:
            run.write_json("results.json", results)
        return path

    return make


@pytest.fixture(scope="session")
def finished(
    tmp_path_factory: pytest.TempPathFactory, make_recipe: Callable[..., Recipe], quiet: Reporter
) -> tuple[Path, train.TrainResult, evaluate.EvalResult]:
    """Workspace, training and evaluation of the small recipe, undisturbed; shared, so not to be changed."""

    def job(workspace: Path) -> tuple[Path, train.TrainResult, evaluate.EvalResult]:
        trained = train.run(Session(make_recipe(), workspace, quiet))
        return workspace, trained, evaluate.run(Session(make_recipe(), workspace, quiet))

    return shared(tmp_path_factory, "finished", job)
