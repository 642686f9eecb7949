"""From files and ``--set`` to one mapping: ``extends:``, overrides, and what a later layer replaces.

A recipe is a pile of layers: the recipe it extends (and what that extends), its own file, then all ``--set``
together. A later layer wins key by key, sections are merged, lists and plain values are replaced. Two choices
replace more:

- A layer that changes ``method.name`` lets go of the inherited method keys that the new method does not have
  and keeps the others, in ``ablation`` too. Keys that this layer itself gives must belong to the new method. An
  online method also lets go of the inherited keys that only training on stored groups has a use for.
- A layer that names a prompt ``file`` where a ``builtin`` set was inherited (or the reverse) replaces the
  whole source.

``name`` and ``description`` belong to one recipe and are not inherited.
"""

from __future__ import annotations

import os
import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from gdro_cli.config.methods import METHODS, OnlineMethod
from gdro_cli.config.rules import STORED_ONLY
from gdro_cli.config.yamlfile import MAX_NESTING, check_keys, describe, parse_yaml, read_yaml, shown
from gdro_cli.errors import UserError

#: Folders of shipped recipes: inside an installed package, or beside it in a checkout.
RECIPE_FOLDERS = (
    Path(__file__).resolve().parents[1] / "recipes",
    Path(__file__).resolve().parents[2] / "recipes",
)
#: Keys that say something about one recipe only.
_OWN_KEYS = ("name", "description")
_PROMPT_SPLITS = ("train", "validation", "eval")
#: What no key has in it.
_KEY_ENDS = re.compile(r"[\s:=]")


def shipped_recipes() -> dict[str, Path]:
    """The recipes that come with the tool: name without ending -> file, sorted by name."""
    for folder in RECIPE_FOLDERS:
        found = {path.stem: path for path in sorted(folder.glob("*.yaml"), key=lambda path: path.stem)}
        if found:
            return found
    return {}


def find_recipe(name_or_path: str) -> Path:
    """The file of a recipe: an existing path, else a shipped recipe by name with or without ``.yaml``."""
    path = Path(os.path.expanduser(name_or_path))  # unlike Path's own, it takes any text
    if os.path.isfile(path):
        return path
    shipped = shipped_recipes()
    if name_or_path.removesuffix(".yaml") in shipped:
        return shipped[name_or_path.removesuffix(".yaml")]
    if os.path.isdir(path):
        raise UserError(f"{name_or_path} is a folder: name the recipe file inside it.")
    raise UserError(
        f"There is no recipe file {describe(name_or_path)} and no shipped recipe of that name "
        f"(shipped: {', '.join(shipped) or 'none'}): correct the path or the name."
    )


def file_layers(path: Path) -> list[dict[str, Any]]:
    """The layers of a recipe file, the root of its ``extends`` chain first; their paths are made absolute."""
    layers: list[dict[str, Any]] = []
    visited: list[Path] = []
    current: Path | None = path
    while current is not None:
        resolved = current.resolve()
        if resolved in visited:
            chain = " -> ".join(part.name for part in [*visited, resolved])
            raise UserError(f"{current} extends itself ({chain}): remove one `extends:`.")
        visited.append(resolved)
        layer = read_yaml(current)
        extends = layer.pop("extends", None)
        if layers:
            layer = {key: value for key, value in layer.items() if key not in _OWN_KEYS}
        resolve_paths(layer, folder=resolved.parent)
        layers.insert(0, layer)
        current = None if extends is None else _extended(extends, by=current)
    return layers


def _extended(extends: object, *, by: Path) -> Path:
    if not isinstance(extends, str) or not extends:
        raise UserError(f"{by}: `extends` must be a path or the name of a shipped recipe, not {describe(extends)}.")
    beside = by.resolve().parent / os.path.expanduser(extends)
    if os.path.isfile(beside):
        return beside
    shipped = shipped_recipes().get(extends.removesuffix(".yaml"))
    if shipped is None:
        raise UserError(
            f"{by} extends {describe(extends)}, which is neither a file beside it nor a shipped recipe: correct it."
        )
    return shipped


def override_layer(overrides: Sequence[str]) -> dict[str, Any]:
    """All ``--set key=value`` as one layer. Values are YAML; of two for the same key the last counts."""
    layer: dict[str, Any] = {}
    for override in overrides:
        key, separator, text = override.partition("=")
        parts = key.strip().split(".")
        if not separator or not all(parts) or _KEY_ENDS.search(key.strip()):
            told = describe(_KEY_ENDS.split(override.strip(), maxsplit=1)[0])  # what follows may be a secret
            raise UserError(f"--set {told} must look like key=value, for example --set method.tau=0.1.")
        if parts[0] == "extends":
            raise UserError("--set cannot change `extends`: name the other recipe with --recipe.")
        if len(parts) > MAX_NESTING:
            raise UserError(f"The key of --set {shown(key.strip())} is nested too deeply: name a key of the recipe.")
        section = layer
        for part in parts[:-1]:
            inner = section.get(part)
            if not isinstance(inner, dict):
                inner = section[part] = {}
            section = inner
        source = f"The value of --set {shown(key.strip())}"
        value = parse_yaml(text, source=source)
        if isinstance(value, dict):
            check_keys(value, source=source)
        section.update(merge(section, {parts[-1]: value}))
    resolve_paths(layer, folder=Path.cwd())
    return layer


def resolve_paths(layer: dict[str, Any], *, folder: Path) -> None:
    """Make the layer's relative paths absolute where they exist: in ``folder``, else where we are."""
    prompts = layer.get("prompts")
    if isinstance(prompts, dict):
        for split in _PROMPT_SPLITS:
            _resolve(prompts.get(split), key="file", folder=folder)
    model = layer.get("model")
    if isinstance(model, dict) and model.get("path") != "tiny":
        _resolve(model, key="path", folder=folder)
    reward = layer.get("reward")
    if isinstance(reward, dict):
        _resolve(reward.get("ocr"), key="model_dir", folder=folder)
    judge = layer.get("judge")
    if isinstance(judge, dict) and judge.get("kind") == "unified-reward-local":
        _resolve(judge, key="model", folder=folder)


def _resolve(section: object, *, key: str, folder: Path) -> None:
    if not isinstance(section, dict) or not isinstance(section.get(key), str) or not section[key]:
        return
    given = os.path.expanduser(section[key])
    for base in (folder, Path.cwd()):
        candidate = base / given
        if os.path.exists(candidate):
            section[key] = os.path.abspath(candidate)
            return


def merge_layers(layers: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """One mapping of all layers, later ones winning, by the rules in this module's docstring."""
    merged: dict[str, Any] = {}
    for layer in layers:
        merged = merge(_released(merged, layer), layer)
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


def _released(below: dict[str, Any], layer: Mapping[str, Any]) -> dict[str, Any]:
    """``below`` without what the layer's choice of method or prompt source takes out of use."""
    released = dict(below)
    method, chosen = below.get("method"), _inner(layer.get("method"), "name")
    if isinstance(method, dict) and isinstance(chosen, str) and chosen != method.get("name") and chosen in METHODS:
        known = METHODS[chosen].model_fields
        released["method"] = {key: value for key, value in method.items() if key in known}
        released["ablation"] = _sweepable(released.get("ablation", {}), known)
        if issubclass(METHODS[chosen], OnlineMethod):
            released = _without(released, STORED_ONLY)
    prompts, given = below.get("prompts"), layer.get("prompts")
    if isinstance(prompts, dict) and isinstance(given, Mapping):
        released["prompts"] = {
            key: {} if _other_kind(value, given.get(key)) else value for key, value in prompts.items()
        }
    return released


def _sweepable(ablation: object, known: Collection[str]) -> object:
    """An ablation section without the values of keys of other methods."""
    if not isinstance(ablation, Mapping):
        return ablation
    foreign = {key for model in METHODS.values() for key in model.model_fields if key not in known}
    return {name: values for name, values in ablation.items() if str(name).removeprefix("method.") not in foreign}


def _without(data: Mapping[str, Any], paths: Iterable[str]) -> dict[str, Any]:
    """A copy that lacks the keys at the given dotted paths, each of two parts."""
    result = dict(data)
    for path in paths:
        section, _, key = path.partition(".")
        inner = result.get(section)
        if isinstance(inner, Mapping):
            result[section] = {name: value for name, value in inner.items() if name != key}
    return result


def _inner(section: object, key: str) -> object:
    return section.get(key) if isinstance(section, Mapping) else None


def _other_kind(inherited: object, given: object) -> bool:
    """Whether a prompt source changes from file to built-in set or back."""
    for old, new in (("file", "builtin"), ("builtin", "file")):
        if _inner(inherited, old) is not None and _inner(given, new) is not None and _inner(given, old) is None:
            return True
    return False
