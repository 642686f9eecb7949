"""The name of a recipe's run: everything that its training depends on, and nothing else."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from gdro_cli.config.base import digest
from gdro_cli.config.recipe import Recipe
from gdro_cli.config.suggest import similar
from gdro_cli.errors import UserError
from gdro_cli.runtime.environment import environment
from gdro_cli.runtime.run import RunFolder
from gdro_cli.stages.setup.session import Session
from gdro_cli.stages.setup.store import runs_folder, training_identity

# Keys that change how fast or how verbosely a run goes, or what is done after it, but not what it learns.
_NOT_LEARNT_FROM: dict[str, Any] = {
    "description": True,
    "ablation": True,
    "model": {"offload", "vae_slicing", "sharding", "compile", "attention"},
    "judge": True,
    "eval": True,
    "prompts": {"eval", "validation"},
    "sample": {"batch_size", "prompts_per_shard", "image_format"},
    "reward": {"workers", "max_failed_share"},
    "train": {
        "checkpoint_every",
        "keep_checkpoints",
        "log_every",
        "eval_every",
        "trackers",
        "cache_reference",
        "prefetch",
    },
}
# Keys that came later and count only where they are not at their defaults, so that runs made before keep their names.
_LATER: dict[str, dict[str, Any]] = {
    "model": {"quantization": "none", "vae_tiling": False},
    "method": {"noise_bank": None},
    "train": {"optimizer": "adamw", "rounds": 1},
}
# Keys that online methods do not learn from: they keep no store, and sample in their own number of steps.
_STORED_ONLY = {"sample": {"images_per_prompt", "steps"}, "train": {"groups_per_step", "group_gradient", "rounds"}}


def learnt_from(recipe: Recipe) -> dict[str, Any]:
    """The part of a recipe that its training depends on, as JSON."""
    whole = recipe.model_dump(mode="json")
    kept = recipe.model_dump(mode="json", exclude=_NOT_LEARNT_FROM)
    for kind in ("ocr", "geneval"):
        if kind != recipe.reward.kind:
            kept["reward"].pop(kind)
    for section, defaults in _LATER.items():
        kept[section] = {k: v for k, v in kept[section].items() if k not in defaults or v != defaults[k]}
    if recipe.online_method is not None:
        for section, keys in _STORED_ONLY.items():
            kept[section] = {key: value for key, value in kept[section].items() if key not in keys}
    if recipe.train_seed == recipe.seed:  # named or not, it is the same training
        kept["train"].pop("seed")
    if recipe.train.stop_on_collapse:  # then the evaluation points decide where the training ends
        unseen = ("checkpoint", "images_per_prompt", "grid_prompts")  # `gdro eval` alone reads them
        kept |= {"judge": whole["judge"], "eval": {k: v for k, v in whole["eval"].items() if k not in unseen}}
        kept["prompts"]["validation"] = whole["prompts"]["validation"]
        kept["train"]["eval_every"] = whole["train"]["eval_every"]
        kept["sample"]["steps"] = whole["sample"]["steps"]  # what `eval.steps` falls back to
    return kept


def run_inputs(session: Session) -> dict[str, str]:
    """Digests of what the recipe's training starts from, which exist before any store does: they name the run.

    A group method starts from a store and its scores. An online method keeps no store; it starts from prompts, model
    and reward.
    """
    scores = digest(dict(session.reward.version))
    if session.recipe.online_method is None:
        return {"store": digest(training_identity(session)), "scores": scores}
    model = {key: value for key, value in session.model.identity.items() if key != "path"}
    text = [str(session.model.dtype), session.recipe.model.max_sequence_length]
    return {"prompts": session.prompts("train").digest, "model": digest([model, *text]), "scores": scores}


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
        environment=environment(),
    )


def find_run(session: Session) -> RunFolder | None:
    """The recipe's run folder, or None if it does not exist."""
    return open_run(session) if run_path(session).exists() else None


_LISTED = 8
"""Runs that a message names."""


def run_named(name: str, workspace: Path) -> Path:
    """The folder of a run, given as a path or by its name among the workspace's runs. Raises UserError."""
    for path in (Path(name), runs_folder(workspace) / name):
        if path.is_dir():
            return path
    names = sorted(path.parent.name for path in runs_folder(workspace).glob("*/recipe.json"))
    listed = ", ".join(names[:_LISTED]) + (", ..." if len(names) > _LISTED else "")
    present = f"its runs are {listed}" if names else "it has no runs"
    raise UserError(f"there is no run {name} in {workspace}{similar(name, names)} ({present})")
