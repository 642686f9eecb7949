"""Where the run of a recipe lies: named by all that its training depends on, and by nothing else."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from gdro_cli.config.base import Effect
from gdro_cli.config.keys import values_that_affect
from gdro_cli.config.recipe import Recipe
from gdro_cli.identity import digest
from gdro_cli.runtime.environment import environment
from gdro_cli.runtime.run import RunFolder
from gdro_cli.stages.setup.workspace import runs_folder


def learnt_from(recipe: Recipe) -> dict[str, Any]:
    """The part of a recipe that its training depends on, with the recipe's name, as JSON."""
    effects: set[Effect] = {"scores", "training"}
    if recipe.online_method is None:  # online methods have no store
        effects.add("images")
    if recipe.train.stop_on_collapse:  # then the evaluation points decide where the training ends
        effects.add("measurement")
    return {"name": recipe.name, **values_that_affect(recipe, *effects)}


def run_path(recipe: Recipe, workspace: Path, inputs: dict[str, str]) -> Path:
    """Where the run of a recipe lies: named by all that its training depends on."""
    return runs_folder(workspace) / f"{recipe.name}-{digest({'recipe': learnt_from(recipe), 'inputs': inputs})}"


def open_run(recipe: Recipe, workspace: Path, inputs: dict[str, str]) -> RunFolder:
    """Make or open the run folder of a recipe."""
    return RunFolder.create_or_open(
        run_path(recipe, workspace, inputs),
        recipe=learnt_from(recipe),
        inputs=inputs,
        environment=environment(),
    )


def find_run(recipe: Recipe, workspace: Path, inputs: dict[str, str]) -> RunFolder | None:
    """The run folder of a recipe, if it has been made."""
    return open_run(recipe, workspace, inputs) if run_path(recipe, workspace, inputs).exists() else None
