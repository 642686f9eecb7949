"""The parts of a recipe that may leave the machine: names instead of local paths, and no addresses."""

from __future__ import annotations

import re
import shlex
from collections.abc import Mapping
from pathlib import Path, PureWindowsPath
from typing import Any

from gdro_cli.config.keys import full_key
from gdro_cli.config.load import load_recipe, shipped_recipes
from gdro_cli.config.recipe import Recipe
from gdro_cli.config.rewards import REWARDS
from gdro_cli.config.schema import OWN_KEYS
from gdro_cli.config.yamlfile import dump_yaml, dump_yaml_line
from gdro_cli.errors import UserError
from gdro_cli.identity import differences
from gdro_cli.stages.setup.model import EMBEDDED

ADDRESS = "https://judge.invalid/v1"
"""Replaces the address of a judge."""
_REWARD_ADDRESS = "https://reward.invalid"
"""Replaces those of rewards."""
_ADDRESSES = {"judge.base_url": ADDRESS, "reward.http.url": _REWARD_ADDRESS, "reward.vlm.base_url": ADDRESS}
_FILES = (
    "prompts.train.file", "prompts.validation.file", "prompts.eval.file", "reward.ocr.model_dir", "judge.template",
    "reward.vlm.template", "train.lora.init",
)  # fmt: skip
_FILES_OR_IDS = (
    "model.path", "judge.model", "reward.geneval.detector_model", "reward.geneval.colour_model", "reward.clip.model",
    "reward.pickscore.model", "reward.pickscore.processor", "reward.hpsv2.model", "reward.hpsv2.base",
    "reward.aesthetic.model", "reward.aesthetic.head",
)  # fmt: skip
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[\w.-]+)?")
# A path begins after no letter, and not with the host of an address but file's; no name is longer than 255 letters.
_PATHS_IN_TEXT = re.compile(
    r"(?<![\w/.~])(?:~|[A-Za-z]:|(?<=[Ff][Ii][Ll][Ee]:)//[\w.-]{1,255}|(?!(?<=:)//[^/])/{1,4})"
    r"[\w.~+-]{0,255}(?:[/\\][\w.+~ -]{0,255}[\w.+~-])+"
)
_MOST_CHANGES = 12
"""With more changed keys a recipe file is easier to read than a command."""
_OWN = ("name", "description", "ablation")


def public_recipe(recipe: Recipe) -> dict[str, Any]:
    """The resolved recipe without local paths and addresses; it is a recipe itself."""
    public: dict[str, Any] = _public(recipe.resolved(), "")
    return public


def recipe_yaml(recipe: Recipe) -> str:
    """The public recipe as a YAML file."""
    return dump_yaml(public_recipe(recipe))


def changed_keys(recipe: Recipe) -> dict[str, Any]:
    """The keys whose values are not the defaults, nested, without local paths and addresses."""
    changed = recipe.model_dump(mode="json", exclude_defaults=True)
    public: dict[str, Any] = _public({key: value for key, value in changed.items() if key not in _OWN}, "")
    return public


def command(recipe: Recipe, stage: str, *, file: str) -> str:
    """The command line that does ``stage`` again: a shipped recipe with ``--set``, else with the recipe ``file``."""
    wanted = public_recipe(recipe)
    if recipe.name in shipped_recipes():
        sets = [
            f"{key.path}={dump_yaml_line(key.after)}"
            for key in differences(load_recipe(recipe.name), wanted)
            if key.after_present and key.path.split(".")[0] not in _OWN
        ]
        if len(sets) <= _MOST_CHANGES and _gives(recipe.name, sets, wanted):
            return shlex.join(["gdro", stage, "--recipe", recipe.name, *(w for s in sets for w in ("--set", s))])
    return shlex.join(["gdro", stage, "--recipe", file])


def _gives(name: str, sets: list[str], wanted: Mapping[str, Any]) -> bool:
    try:
        resolved = load_recipe(name, overrides=sets).resolved()
    except UserError:
        return False
    return all(resolved[key] == value for key, value in wanted.items() if key not in _OWN)


def _public(value: Any, path: str) -> Any:
    if path == "ablation":
        return {name: _public_entry(entry, name) for name, entry in value.items()}
    if isinstance(value, Mapping):
        return {key: _public(inner, f"{path}.{key}".lstrip(".")) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_public(inner, path) for inner in value]
    if not isinstance(value, str):
        return value
    if path in _ADDRESSES:
        return _ADDRESSES[path]
    if "://" in value and _of_plugin(path):
        return _REWARD_ADDRESS
    local = path in _FILES or (path in _FILES_OR_IDS and not is_hub_id(value))
    return last_part(value) if local or Path(value).is_absolute() else without_paths(value)


def _public_entry(entry: Any, name: str) -> Any:
    """The values and settings of a sweep as public as those of the keys themselves."""
    if not isinstance(entry, Mapping):
        return _public(entry, full_key(name) or name)
    settings = {short: _public(value, full_key(short) or short) for short, value in entry["set"].items()}
    return {"values": _public(entry["values"], full_key(name) or name), "set": settings}


def _of_plugin(path: str) -> bool:
    """Whether a key is a setting of a plug-in."""
    section, _, rest = path.partition(".")
    name = rest.partition(".")[0]
    return section == "reward" and name != rest and name not in OWN_KEYS and name not in REWARDS


def is_hub_id(name: str) -> bool:
    """Whether a name that may be a folder's is a Hub id (or the embedded model) and no folder here."""
    return name == EMBEDDED or (_HUB_ID.fullmatch(name) is not None and not Path(name).exists())


def last_part(path: str) -> str:
    """The name of a file or folder, without its path."""
    return PureWindowsPath(path.rstrip("/\\")).name or "root"


def without_paths(text: str) -> str:
    """A text in which absolute paths are replaced by the names of their files."""
    return _PATHS_IN_TEXT.sub(lambda path: last_part(path[0]), text)
