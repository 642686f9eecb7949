"""The name of a recipe's run: everything that its training depends on, and nothing else."""

from __future__ import annotations

import glob
from pathlib import Path
from typing import Any

from gdro_cli.config.base import Effect
from gdro_cli.config.keys import values_that_affect
from gdro_cli.config.recipe import Recipe
from gdro_cli.data.imported_scores import content_version
from gdro_cli.errors import UserError
from gdro_cli.identity import differences, digest
from gdro_cli.runtime.environment import environment
from gdro_cli.runtime.run import RunFolder
from gdro_cli.stages.setup.scorers import open_training_scores
from gdro_cli.stages.setup.session import Session
from gdro_cli.stages.setup.store import runs_folder, training_identity, training_store
from gdro_cli.suggest import similar


def learnt_from(recipe: Recipe) -> dict[str, Any]:
    """The part of a recipe that its training depends on, with the recipe's name, as JSON."""
    effects: set[Effect] = {"scores", "training"}
    if recipe.online_method is None:  # online methods have no store
        effects.add("images")
    if recipe.train.stop_on_collapse:  # then the evaluation points decide where the training ends
        effects.add("measurement")
    return {"name": recipe.name, **values_that_affect(recipe, *effects)}


def run_inputs(session: Session) -> dict[str, str]:
    """Digests of what the recipe's training starts from, which exist before any store does: they name the run.

    A group method starts from a store and its scores. An online method keeps no store; it starts from prompts, model
    and reward.
    """
    scores = digest(_scores_version(session))
    if session.recipe.online_method is None:
        return {"store": digest(training_identity(session)), "scores": scores}
    model = {key: value for key, value in session.model.identity.items() if key != "path"}
    text = [str(session.model.dtype), session.recipe.model.max_sequence_length]
    return {"prompts": session.prompts("train").digest, "model": digest([model, *text]), "scores": scores}


def _scores_version(session: Session) -> dict[str, Any]:
    """What the rewards that are trained on depend on."""
    if session.recipe.train.scores is None:
        return session.reward_version
    return content_version(open_training_scores(session, training_store(session)))


def run_path(session: Session) -> Path:
    """Folder of the recipe's run, whether or not it exists."""
    name = digest({"recipe": learnt_from(session.recipe), "inputs": run_inputs(session)})
    return runs_folder(session.workspace) / f"{session.recipe.name}-{name}"


def open_run(session: Session) -> RunFolder:
    """Make or open the recipe's run folder."""
    return RunFolder.create_or_open(
        run_path(session),
        recipe=learnt_from(session.recipe),
        inputs=run_inputs(session),
        provenance=_provenance(session),
        environment=environment(),
    )


def _provenance(session: Session) -> dict[str, Any]:
    """What ``run_inputs`` are digests of, to say what differs."""
    scores = _scores_version(session)
    if session.recipe.online_method is None:
        return {"store": training_identity(session), "scores": scores}
    model = {key: value for key, value in session.model.identity.items() if key != "path"}
    return {"prompts": session.prompts("train").digest, "model": model, "scores": scores}


def runs_of_other_length(session: Session) -> list[tuple[RunFolder, int]]:
    """Runs that differ from the recipe's in ``train.steps`` alone, with their steps."""
    learnt, present = learnt_from(session.recipe), _provenance(session)
    runs = []
    for run in _runs_of(session):
        changes = differences(run.recipe, learnt)
        if [change.path for change in changes] == ["train.steps"] and not differences(_started_from(run), present):
            runs.append((run, changes[0].before))
    return runs


def _runs_of(session: Session) -> list[RunFolder]:
    """The runs with the recipe's name, other than its own."""
    pattern = f"{glob.escape(session.recipe.name)}-*/manifest.json"
    folders = (path.parent for path in sorted(runs_folder(session.workspace).glob(pattern)))
    return [RunFolder(folder) for folder in folders if folder != run_path(session)]


def _started_from(run: RunFolder) -> Any:
    return run.read_object("manifest.json").get("provenance", {})


def similar_runs(session: Session) -> list[tuple[RunFolder, list[str]]]:
    """Runs of the same recipe that started from something else, and what differs, as ``scores.rule: "a" -> "b"``."""
    learnt, present = learnt_from(session.recipe), _provenance(session)
    return [
        (run, [str(change) for change in differences(_started_from(run), present)])
        for run in _runs_of(session)
        if not differences(run.recipe, learnt)
    ]


def find_run(session: Session) -> RunFolder | None:
    """The recipe's run folder, or None if it does not exist."""
    return open_run(session) if run_path(session).exists() else None


_LISTED = 8
"""Runs that a message names."""


def run_named(name: str, workspace: Path) -> Path:
    """The folder of a run, given as a path or by its name among the workspace's runs. Raises UserError."""
    folders = [path for path in (Path(name), runs_folder(workspace) / name) if path.is_dir()]
    for path in folders:
        if (path / "recipe.json").is_file():
            return path
    if folders:
        raise UserError(f"{folders[0]} is not a run: name a folder that `gdro train` made (gdro runs lists them)")
    names = sorted(path.parent.name for path in runs_folder(workspace).glob("*/recipe.json"))
    listed = ", ".join(names[:_LISTED]) + (", ..." if len(names) > _LISTED else "")
    present = f"its runs are {listed}" if names else "it has no runs"
    raise UserError(f"there is no run {name} in {workspace}{similar(name, names)} ({present})")
