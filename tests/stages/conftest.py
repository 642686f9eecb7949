"""A small recipe on the embedded model, and a workspace in which it was carried out once."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from gdro_cli.config.recipe import Recipe, build_recipe
from gdro_cli.runtime.progress import Reporter
from gdro_cli.stages import evaluate, train

SMALL: dict[str, Any] = {
    "name": "small",
    "prompts": {
        "task": "ocr",
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
def finished(
    tmp_path_factory: pytest.TempPathFactory, make_recipe: Callable[..., Recipe], quiet: Reporter
) -> tuple[Path, train.TrainResult, evaluate.EvalResult]:
    """Workspace, training and evaluation of the small recipe, undisturbed."""
    workspace = tmp_path_factory.mktemp("workspace")
    trained = train.run(make_recipe(), workspace, quiet)
    return workspace, trained, evaluate.run(make_recipe(), workspace, quiet)
