"""Load a recipe from a file, a shipped name or a mapping."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from gdro_cli.config.layers import (
    file_layers,
    find_recipe,
    merge_layers,
    override_layer,
    shipped_recipes,
    with_overrides,
)
from gdro_cli.config.recipe import Recipe
from gdro_cli.config.rewards import reward_names
from gdro_cli.config.sections import RewardSection
from gdro_cli.config.validation import validate
from gdro_cli.errors import UserError
from gdro_cli.files import read_object
from gdro_cli.suggest import similar

__all__ = ["build_recipe", "load_recipe", "load_resolved", "load_reward_section", "shipped_recipes"]


def load_recipe(name_or_path: str, *, overrides: Sequence[str] = ()) -> Recipe:
    """The recipe at a path or with a shipped name (``ocr``, ``ocr.yaml``; a path wins), ``--set`` applied.

    Raises a ``UserError`` that lists every problem, each with the dotted path of its key. What sweeps fix
    (``ablation.KEY.set``) is part of that, unless ``--set`` changes only other keys: then it may not fit what another
    command does, and ``plan_sweep`` checks it.
    """
    path, changes = find_recipe(name_or_path), override_layer(overrides)
    data = with_overrides(file_layers(path), changes)
    data.setdefault("name", re.sub(r"[^A-Za-z0-9._-]+", "-", path.stem).strip("-._") or "recipe")
    source = f"{path.name} with --set" if overrides else str(path)
    return build_recipe(data, source=source, check_fixed=not changes or "ablation" in changes)


def load_resolved(path: Path, *, overrides: Sequence[str] = ()) -> Recipe:
    """The recipe that a run keeps as JSON, ``--set`` applied. Raises as ``load_recipe``, and ``StoreError``."""
    remedy = "run `gdro train` with the run's recipe again"
    data = with_overrides([read_object(path, remedy=remedy)], override_layer(overrides))
    return build_recipe(data, source=f"{path} with --set" if overrides else str(path))


def load_reward_section(kind: str, *, overrides: Sequence[str] = ()) -> RewardSection:
    """The section ``reward`` of a recipe with the reward ``kind`` and ``--set`` applied. Raises as ``load_recipe``."""
    names = reward_names()
    if kind not in names:
        raise UserError(
            f"there is no reward {kind!r} in this installation (it has {', '.join(names)}): install the package that"
            f" has it (docs/adding-a-reward.md){similar(kind, names)}"
        )
    source = {"file": "prompts.txt"}  # never read
    prompts = {"train": source, "validation": source, "eval": source}
    data = merge_layers([{"name": "reward", "prompts": prompts, "reward": {"kind": kind}}, override_layer(overrides)])
    section = build_recipe(data, source=f"the reward {kind} with --set" if overrides else "gdro rewards").reward
    if section.kind != kind:
        raise UserError(f"--set names the reward {section.kind!r}, and the command {kind!r}: remove reward.kind")
    return section


def build_recipe(data: Mapping[str, Any], *, source: str = "recipe", check_fixed: bool = False) -> Recipe:
    """The recipe of a plain mapping without ``extends``. Raises as ``load_recipe``; messages call it ``source``.

    ``check_fixed``: refuse values in ``ablation.KEY.set`` that the recipe cannot have.
    """
    method = data.get("method")
    if isinstance(method, Mapping) and "name" not in method:
        data = {**data, "method": {"name": "gdro", **method}}
    return validate(data, source=source, check_fixed=check_fixed)
