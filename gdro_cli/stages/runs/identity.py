"""Where the run of a recipe lies: named by all that its training depends on, and by nothing else."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from gdro_cli.config.base import StrictModel, digest
from gdro_cli.config.recipe import Recipe
from gdro_cli.runtime.environment import environment
from gdro_cli.runtime.run import RunFolder
from gdro_cli.stages.setup.workspace import runs_folder

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
    for name, value in recipe.reward:
        if isinstance(value, StrictModel) and name != recipe.reward.kind:  # the settings of another reward
            kept["reward"].pop(name)
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
