"""What names a store and a run: what the images and the training depend on, and nothing else."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from gdro_cli.config.recipe import load_recipe
from gdro_cli.stages.runs.identity import learnt_from, run_path
from gdro_cli.stages.setup.session import Session
from gdro_cli.stages.setup.store import training_identity


def names(*overrides: str) -> tuple[str, dict[str, Any]]:
    """Name of the run of ``ocr`` with changes, and the identity of its store."""
    session = Session(load_recipe("ocr", overrides=["model.dtype=float32", *overrides]), Path())
    return run_path(session).name, training_identity(session)


def test_keys_that_came_later_leave_older_names_alone() -> None:
    recipe = load_recipe("ocr")
    kept = learnt_from(recipe)
    assert "quantization" not in kept["model"] and "optimizer" not in kept["train"]
    assert run_path(Session(recipe, Path())).name == RUN


RUN = "ocr-a44c17f8e1a4"
"""The run of the shipped recipe on the CPU, as it was called before there were these keys."""


@pytest.mark.parametrize(
    ("override", "run", "store"),
    [
        ("model.offload=true", False, False),
        ("model.vae_slicing=true", False, False),
        ("model.vae_tiling=true", True, True),
        ("model.quantization=int8", True, True),
        ("train.optimizer=adamw8bit", True, False),
    ],
)
def test_what_a_memory_key_renames(override: str, run: bool, store: bool) -> None:
    plain, changed = names(), names(override)
    assert (plain[0] != changed[0], plain[1] != changed[1]) == (run, store)
