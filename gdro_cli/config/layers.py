"""From files and ``--set`` to one mapping: ``extends:``, overrides, and what a later layer replaces.

A recipe is a stack of layers: the recipe it extends (and whatever that one extends), its own file, then all ``--set``
together. A later layer wins key by key: sections are merged, lists and plain values are replaced. Some choices replace
more:

- A layer that changes ``method.name`` drops the inherited keys that the new method does not use, also in ``ablation``.
  The keys that this layer itself sets must belong to the new method.
- What ``--set`` gives is dropped from ``ablation.KEY.set``, which is below it.
- A layer that gives a mixture weights replaces the inherited weights and ranges; other ranges replace the ranges.
- A layer that gives weights of objectives or of a prompt set's tags replaces the inherited ones.
- A layer that names another kind of prompt source than the inherited one (``file``, ``builtin``, ``imported``)
  replaces the whole source.

``name`` and ``description`` are not inherited.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Collection, Mapping, Sequence
from itertools import permutations
from pathlib import Path
from typing import Any

from gdro_cli.config.keys import foreign_keys, full_key
from gdro_cli.config.methods import METHODS
from gdro_cli.config.recipe import Recipe
from gdro_cli.config.rewards import MIX
from gdro_cli.config.sections import SOURCE_KINDS
from gdro_cli.config.yamlfile import describe, parse_value, read_yaml, shown
from gdro_cli.errors import UserError

#: Folders of shipped recipes: inside an installed package, or beside it in a checkout.
_RECIPE_FOLDERS = tuple(folder / "recipes" for folder in Path(__file__).resolve().parents[1:3])
#: Keys that are not inherited.
_OWN_KEYS = ("name", "description")
_PATHS = (
    *(f"prompts.{split}.file" for split in ("train", "validation", "eval")),
    "model.path",
    "reward.ocr.model_dir",
    "reward.vlm.template",
    "reward.clip.model",
    *(f"reward.{key}" for key in ("pickscore.model", "pickscore.processor", "hpsv2.model", "hpsv2.base")),
    *(f"reward.aesthetic.{key}" for key in ("model", "head")),
    "judge.template",
    "train.lora.init",
)
_ABSENT = object()
#: Mappings of weights, in which a name that is missing has the weight 0.
_WEIGHTS = (
    *(f"reward.{name}.objective" for name in ("ocr", "geneval")),
    *(f"prompts.{name}.tags" for name in ("train", "validation", "eval")),
)
#: Characters that end a key.
_KEY_ENDS = re.compile(r"[\s:=]")


def shipped_recipes() -> dict[str, Path]:
    """The recipes that come with the tool: name without ending -> file, sorted by name."""
    paths = next(filter(None, (list(folder.glob("*.yaml")) for folder in _RECIPE_FOLDERS)), [])
    return {path.stem: path for path in sorted(paths, key=lambda path: path.stem)}


def find_recipe(name_or_path: str) -> Path:
    """The file of a recipe: an existing path, else a shipped recipe by its name, with or without ``.yaml``."""
    path = _find(name_or_path, folder=Path())
    if path is not None:
        return path
    if os.path.isdir(os.path.expanduser(name_or_path)):
        raise UserError(f"{name_or_path} is a folder: name the recipe file inside it")
    raise UserError(
        f"there is no recipe file {describe(name_or_path)} and no shipped recipe of that name "
        f"(shipped: {', '.join(shipped_recipes()) or 'none'}): correct the path or the name"
    )


def _find(name: str, *, folder: Path) -> Path | None:
    path = folder / os.path.expanduser(name)  # Path's own raises for an unknown user
    return path if os.path.isfile(path) else shipped_recipes().get(name.removesuffix(".yaml"))


def file_layers(path: Path) -> list[dict[str, Any]]:
    """The layers of a recipe file, the root of its ``extends`` chain first, with absolute paths."""
    layers: list[dict[str, Any]] = []
    visited: list[Path] = []
    current: Path | None = path
    while current is not None:
        resolved = current.resolve()
        if resolved in visited:
            chain = " -> ".join(part.name for part in [*visited, resolved])
            raise UserError(f"{current} extends itself ({chain}): remove one `extends:`")
        visited.append(resolved)
        layer = read_yaml(current)
        extends = layer.pop("extends", None)
        if layers:
            layer = {key: value for key, value in layer.items() if key not in _OWN_KEYS}
        resolve_paths(layer, folder=resolved.parent)
        _resolve_fixed_paths(layer, folder=resolved.parent)
        layers.insert(0, layer)
        current = None if extends is None else _extended(extends, by=current)
    return layers


def _extended(extends: object, *, by: Path) -> Path:
    if not isinstance(extends, str) or not extends:
        raise UserError(f"{by}: `extends` must be a path or the name of a shipped recipe, not {describe(extends)}")
    path = _find(extends, folder=by.resolve().parent)
    if path is None:
        raise UserError(
            f"{by} extends {describe(extends)}, which is neither a file beside it nor a shipped recipe: correct it"
        )
    return path


def override_layer(overrides: Sequence[str]) -> dict[str, Any]:
    """All ``--set key=value`` as one layer. Values are YAML. If a key is repeated, the last value counts."""
    layer: dict[str, Any] = {}
    for override in overrides:
        key, separator, text = (part.strip() for part in override.partition("="))
        parts = key.split(".")
        if not separator or not all(parts) or _KEY_ENDS.search(key):
            start = describe(_KEY_ENDS.split(override.strip(), maxsplit=1)[0])  # the rest may be a secret
            raise UserError(f"--set {start} must look like key=value, for example --set method.tau=0.1")
        if parts[0] == "extends":
            raise UserError("--set cannot change `extends`: name the other recipe with --recipe")
        value = parse_value(text, source=f"the value of --set {shown(key)}")
        layer = merge(layer, nested(parts, value))
    resolve_paths(layer, folder=Path())
    _resolve_fixed_paths(layer, folder=Path())
    return layer


def nested(parts: Sequence[str], value: Any) -> dict[str, Any]:
    """A layer with one key, by the parts of its dotted path."""
    for part in reversed(parts):
        value = {part: value}
    return dict(value)


def resolve_paths(layer: dict[str, Any], *, folder: Path) -> None:
    """Make the layer's relative paths absolute if they exist in ``folder`` or, failing that, in the current folder."""
    is_local = _inner(layer.get("judge"), "kind") == "unified-reward-local"  # otherwise judge.model is a name
    for path in (*_PATHS, *(["judge.model"] if is_local else [])):
        *parents, key = path.split(".")
        section: Any = layer
        for parent in parents:
            section = _inner(section, parent)
        value = _inner(section, key)
        if isinstance(value, str) and value and (path, value) != ("model.path", "tiny"):
            candidates = [base / os.path.expanduser(value) for base in (folder, Path())]
            section[key] = next((os.path.abspath(file) for file in candidates if os.path.exists(file)), value)


def _resolve_fixed_paths(layer: Mapping[str, Any], *, folder: Path) -> None:
    """``resolve_paths`` for the settings in ``ablation.KEY.set``."""
    entries = layer.get("ablation")
    for entry in entries.values() if isinstance(entries, Mapping) else ():
        settings = _inner(entry, "set")
        if isinstance(settings, dict):
            fixed = fixed_layer(settings)
            resolve_paths(fixed, folder=folder)
            for name in settings:
                value = _at(fixed, full_key(name) or name)
                settings[name] = settings[name] if value is _ABSENT else value


def fixed_layer(settings: Mapping[str, Any]) -> dict[str, Any]:
    """The settings of ``ablation.KEY.set``, by full or short name, as a layer."""
    layer: dict[str, Any] = {}
    for name, value in settings.items():
        layer = merge(layer, nested((full_key(name) or name).split("."), value))
    return layer


def with_fixed(recipe: Recipe, settings: Mapping[str, Any]) -> dict[str, Any]:
    """The recipe as a mapping, with the settings of ``ablation.KEY.set``."""
    resolved = recipe.resolved()
    return {**merge_layers([resolved, fixed_layer(settings)]), "ablation": resolved["ablation"]}


def with_overrides(layers: Sequence[Mapping[str, Any]], overrides: Mapping[str, Any]) -> dict[str, Any]:
    """One mapping of ``layers`` with ``--set`` on top, also of what a sweep fixes."""
    data = merge_layers([*layers, overrides])
    if isinstance(data.get("ablation"), Mapping):
        data["ablation"] = _without_fixed(data["ablation"], lambda key: _at(overrides, key) is not _ABSENT)
    return data


def _without_fixed(entries: Mapping[str, Any], dropped: Callable[[str], bool]) -> dict[str, Any]:
    """``ablation`` without the settings in ``set`` whose keys are dropped."""
    result = dict(entries)
    for name, entry in entries.items():
        settings = _inner(entry, "set")
        if isinstance(settings, Mapping):
            kept = {short: value for short, value in settings.items() if not dropped(full_key(short) or short)}
            result[name] = {**entry, "set": kept}
    return result


def merge_layers(layers: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """One mapping of all layers by the rules in this module's docstring."""
    merged: dict[str, Any] = {}
    for layer in layers:
        merged = merge(_without_replaced(merged, layer), layer)
    return merged


def merge(below: Mapping[str, Any], above: Mapping[str, Any]) -> dict[str, Any]:
    """``above`` over ``below``: sections key by key, everything else replaced."""
    merged = dict(below)
    for key, value in above.items():
        inherited = merged.get(key)
        if isinstance(inherited, dict) and isinstance(value, dict):
            value = merge(inherited, value)
        merged[key] = value
    return merged


def _without_replaced(below: dict[str, Any], layer: Mapping[str, Any]) -> dict[str, Any]:
    """``below`` without what the layer's choice of another method, mixture, weights or prompt source replaces."""
    remaining = dict(below)
    method, chosen = below.get("method"), _inner(layer.get("method"), "name")
    if isinstance(method, dict) and isinstance(chosen, str) and chosen != method.get("name") and chosen in METHODS:
        remaining = _without(remaining, foreign_keys(chosen))
    mix = _inner(layer.get("reward"), MIX)
    if isinstance(mix, Mapping):
        for key in ("weights", "ranges") if _inner(mix, "weights") is not None else mix:
            remaining = _without_value(remaining, ["reward", MIX, key])
    prompts, sources = below.get("prompts"), layer.get("prompts")
    if isinstance(prompts, dict) and isinstance(sources, Mapping):
        remaining["prompts"] = {
            key: {} if _other_kind(value, sources.get(key)) else value for key, value in prompts.items()
        }
    for path in _WEIGHTS:
        if _at(layer, path) is not _ABSENT:
            remaining = _without_value(remaining, path.split("."))
    return remaining


def _without_value(data: dict[str, Any], path: Sequence[str]) -> dict[str, Any]:
    """A copy without the value at the path, if it is there."""
    key, *rest = path
    if not rest:
        return {name: value for name, value in data.items() if name != key}
    inner = data.get(key)
    return {**data, key: _without_value(inner, rest)} if isinstance(inner, dict) else data


def _without(data: Mapping[str, Any], paths: Collection[str]) -> dict[str, Any]:
    """A copy without the keys at these dotted paths of two parts, and without their values in ``ablation``."""
    result = {
        section: {key: value for key, value in inner.items() if f"{section}.{key}" not in paths}
        if isinstance(inner, Mapping)
        else inner
        for section, inner in data.items()
    }
    if isinstance(result.get("ablation"), Mapping):
        kept = {name: entry for name, entry in result["ablation"].items() if full_key(name) not in paths}
        result["ablation"] = _without_fixed(kept, lambda key: key in paths)
    return result


def _inner(section: object, key: str) -> object:
    return section.get(key) if isinstance(section, Mapping) else None


def _at(layer: object, path: str) -> Any:
    """The value at a dotted path, or ``_ABSENT``."""
    for part in path.split("."):
        if not isinstance(layer, Mapping) or part not in layer:
            return _ABSENT
        layer = layer[part]
    return layer


def _other_kind(inherited: object, source: object) -> bool:
    """Whether a prompt source changes its kind."""
    return any(
        _inner(inherited, old) is not None and _inner(source, new) is not None and _inner(source, old) is None
        for old, new in permutations(SOURCE_KINDS, 2)
    )
