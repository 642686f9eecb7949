"""A sweep: one recipe, one or more of its keys with several values each, and the cells, one recipe per combination.

A cell is an ordinary recipe, the one that ``--set`` would give. Cells that could not be compared are refused here,
before any work.
"""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from operator import attrgetter
from pathlib import Path
from typing import Any

from gdro_cli.config.keys import SHORT_NAMES, describe_fields, field_doc, field_names, full_key, values_that_affect
from gdro_cli.config.layers import merge, merge_layers, nested, resolve_paths, with_fixed
from gdro_cli.config.load import build_recipe
from gdro_cli.config.methods import METHODS
from gdro_cli.config.recipe import Recipe
from gdro_cli.config.yamlfile import describe, parse_value
from gdro_cli.errors import UserError
from gdro_cli.identity import Difference, differences, digest
from gdro_cli.suggest import similar_key

POINTS = 4
"""Evaluation points that are added to a training whose recipe has none."""

MOST_CELLS = 1000
"""Trainings of one ablation; all of their recipes are in memory together."""

_SEEDS = "cannot be swept: `--seeds N` repeats every cell with N training seeds"
_REASONS = {
    "seed": _SEEDS,
    "train.seed": _SEEDS,
    "reward.kind": "is what is measured, and cells with two rewards cannot be compared",
    "train.lora.init": "changes the base model that all cells are compared with",
}
"""Why a key cannot be swept, if what it affects (``_reason``) does not say so."""


@dataclass(frozen=True, slots=True)
class Axis:
    """One swept key."""

    name: str
    """As the user gave it, perhaps short."""
    key: str
    """Its dotted path."""
    values: tuple[Any, ...]


@dataclass(frozen=True, slots=True)
class Cell:
    """One training: a combination of values and a seed."""

    label: str
    """The values, as in ``beta 4, tau 0.05``."""
    values: tuple[Any, ...]
    """One per axis."""
    seed: int
    recipe: Recipe


@dataclass(frozen=True, slots=True)
class Sweep:
    """All cells of an ablation: every combination of values with the first seed, then with the next."""

    recipe: Recipe
    """What all cells share: the user's recipe with the settings that it fixes for these keys."""
    fixed: tuple[Difference, ...]
    """Those settings, where they differ from the user's recipe."""
    axes: tuple[Axis, ...]
    seeds: tuple[int, ...]
    cells: tuple[Cell, ...]
    notes: tuple[str, ...]
    """Decisions that the user should know about, a sentence each."""

    @property
    def name(self) -> str:
        """Name of the ablation's folder."""
        keys = "-".join(axis.key.rpartition(".")[2] if "." in axis.name else axis.name for axis in self.axes)
        return f"{self.recipe.name}-{keys}-{digest([[cell.label, cell.recipe.digest()] for cell in self.cells])}"

    @property
    def labels(self) -> tuple[str, ...]:
        """The combinations of values, each once, in order."""
        return tuple(dict.fromkeys(cell.label for cell in self.cells))

    @property
    def title(self) -> str:
        """The swept keys, as in ``beta and tau``."""
        return " and ".join(axis.name for axis in self.axes)

    @property
    def trains_on_another(self) -> bool:
        """Whether the cells are trained on different rewards, so that `reward` is not one measure."""
        return any(axis.key in ("reward.ocr.objective", "reward.geneval.objective") for axis in self.axes)


def plan_sweep(recipe: Recipe, names: Sequence[str], values: Sequence[str] | None = None, *, seeds: int = 1) -> Sweep:
    """Every cell of a sweep, checked.

    Args:
        recipe: the user's recipe. What its section ``ablation`` fixes for these keys holds in all cells.
        names: full or short names of the keys to sweep.
        values: the values of each key as YAML, separated by commas; empty or None takes them from ``recipe.ablation``.
        seeds: trainings per combination of values, with the recipe's training seed and the next ones.

    Raises:
        UserError: an unknown key or one that cannot be swept, values that are missing, repeated or invalid, settings
            that contradict each other, cells that could not be compared, or more of them than ``MOST_CELLS``.
    """
    own, recipe = recipe, _with_fixed(recipe, names)
    axes = _axes(recipe, names, values or ())
    count = math.prod(len(axis.values) for axis in axes) * seeds
    if count > MOST_CELLS:
        raise UserError(
            f"the sweep has {count:,} cells (every combination of values, with {seeds:,} seeds), more than the"
            f" {MOST_CELLS:,} of one ablation: name fewer values or --seeds, or make several ablations"
        )
    first = recipe.train_seed
    numbers = tuple(range(first, first + seeds))
    cells = tuple(
        Cell(_label(axes, combination), combination, seed, _cell_recipe(recipe, axes, combination, seed))
        for seed in numbers
        for combination in itertools.product(*(axis.values for axis in axes))
    )
    _refuse_equal(cells[: len(cells) // seeds])
    fixed = differences(own, recipe)
    notes = (*_fixed_notes(own, recipe, fixed), *_notes(recipe, axes, cells))
    return Sweep(recipe, fixed, axes, numbers, cells, notes)


def _with_fixed(recipe: Recipe, names: Sequence[str]) -> Recipe:
    """The recipe with the settings that it fixes for these keys. Raises UserError if they contradict each other."""
    swept = {key: name for name in names if (key := full_key(name, type(recipe))) is not None}
    fixed: dict[str, Any] = {}
    owners: dict[str, str] = {}
    for param, entry in recipe.ablation.items():
        for name, value in entry.set.items() if full_key(param, type(recipe)) in swept else ():
            key = full_key(name, type(recipe)) or name
            text = f"ablation.{param}.set has {name} {describe(value)}"
            if key in swept:
                raise UserError(f"{text}, and --param {swept[key]} sweeps it: sweep one of them, or remove it there")
            if fixed.setdefault(key, value) != value:
                raise UserError(f"{text}, and {owners[key]}: sweep one of them, or give both the same value")
            owners.setdefault(key, f"ablation.{param}.set {describe(value)}")
    if not fixed:
        return recipe
    source = f"{recipe.name} with what it fixes for {' and '.join(names)}"
    return build_recipe(with_fixed(recipe, fixed), source=source)


def _axes(recipe: Recipe, names: Sequence[str], values: Sequence[str]) -> tuple[Axis, ...]:
    if not names:
        keys_with_values = ", ".join(recipe.ablation)
        hint = f"the recipe {recipe.name} has values for {keys_with_values}" if keys_with_values else "such as tau"
        raise UserError(f"no key to sweep: name one with --param ({hint})")
    keys = [_key(name, recipe) for name in names]
    repeated = [name for number, name in enumerate(names) if keys[number] in keys[:number]]
    if repeated:
        raise UserError(f"--param {repeated[0]} is given twice: name each key once")
    if values and len(values) != len(names):
        raise UserError(
            f"--values is given {len(values)} times for {len(names)} --param: give it once for each, in the same"
            " order, as in --values 0.5,0.05"
        )
    texts: Sequence[str | None] = values or [None] * len(names)
    return tuple(
        Axis(name, key, _values(name, key, recipe, text)) for name, key, text in zip(names, keys, texts, strict=True)
    )


def _key(name: str, recipe: Recipe) -> str:
    """The key with this full or short name. Raises UserError if it cannot be swept."""
    schema = type(recipe)
    key = full_key(name, schema)
    if key is None:
        if any(path.startswith(f"{name}.") for path in field_names(schema)):
            raise UserError(f"--param {name}: {name} is a section: name one of its keys (gdro recipes fields {name})")
        hint = similar_key(name, [*field_names(schema), *SHORT_NAMES])
        raise UserError(f"--param {name}: there is no recipe key {name!r}{hint or ': gdro recipes fields lists them'}")
    reason = _REASONS.get(key) or _reason(key, schema)
    if reason is not None:
        raise UserError(f"--param {name}: {key} {reason}")
    for doc in describe_fields(schema):
        if doc.falls_back_to == key and "measurement" in doc.affects and attrgetter(doc.path)(recipe) is None:
            raise UserError(
                f"--param {name}: {key} also changes how the validation images are drawn: pin that first, as in"
                f" --set {doc.path}={attrgetter(key)(recipe)}"
            )
    return key


def _reason(key: str, schema: type[Recipe]) -> str | None:
    """Why a key cannot be swept, by what it affects; None if it can."""
    affects = field_doc(key, schema).affects
    if "label" in affects:
        return "says something about the recipe and not about the training"
    if key.startswith("model.") and "measurement" in affects:
        return "changes the base model that all cells are compared with"
    if not affects.isdisjoint(("measurement", "evaluation")):
        return "changes what is measured, so the cells could not be compared"
    return "changes speed, files or messages, not what is learnt" if affects == {"speed"} else None


def _values(name: str, key: str, recipe: Recipe, text: str | None) -> tuple[Any, ...]:
    if text is not None:
        values = parse_value(f"[{text}]", source=f"--values {text!r} for {name}")
    else:
        entries = (entry for short, entry in recipe.ablation.items() if full_key(short, type(recipe)) == key)
        values = next((entry.values for entry in entries), ())
    if not values:
        raise UserError(
            f"--param {name}: there are no values, and the recipe {recipe.name} has none in its section `ablation`:"
            " give some with --values, as in --values 0.5,0.05"
        )
    return tuple(values)


def _cell_recipe(recipe: Recipe, axes: Sequence[Axis], values: Sequence[Any], seed: int) -> Recipe:
    """The recipe with these values, as ``--set`` would give it."""
    layer: dict[str, Any] = {"train": {"seed": seed}}
    for axis, value in zip(axes, values, strict=True):
        layer = merge(layer, nested(axis.key.split("."), value))
    resolve_paths(layer, folder=Path())
    data = merge_layers([recipe.resolved(), layer])
    data["ablation"] = recipe.resolved()["ablation"]  # a cell of another method keeps it, unused
    steps = data["train"]["steps"]
    if recipe.train.eval_every == 0 and isinstance(steps, int) and steps > 0:
        data["train"]["eval_every"] = math.ceil(steps / POINTS)
    return build_recipe(data, source=f"{recipe.name} with {_label(axes, values)}")


def _label(axes: Sequence[Axis], values: Sequence[Any]) -> str:
    return ", ".join(f"{axis.name} {value_text(value)}" for axis, value in zip(axes, values, strict=True))


def value_text(value: Any) -> str:
    """A value in a label: text unchanged, other values as JSON."""
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def _refuse_equal(cells: Sequence[Cell]) -> None:
    """Refuse cells with equal recipes: 12 and 12.0 are one value, though their texts differ."""
    labels: dict[str, str] = {}
    for cell in cells:
        key = cell.recipe.digest()
        if key in labels:
            both = " and ".join(dict.fromkeys((labels[key], cell.label)))
            raise UserError(f"{both}: the same value twice: name each value once")
        labels[key] = cell.label


def _fixed_notes(own: Recipe, shared: Recipe, fixed: Sequence[Difference]) -> Iterator[str]:
    if fixed:
        yield f"the recipe fixes for this sweep: {', '.join(map(fixed_text, fixed))}"
    if shared.online_method is None and values_that_affect(own, "images") != values_that_affect(shared, "images"):
        yield "the fixed settings change the images, so the cells share a store that is not the recipe's"
    elif values_that_affect(own, "scores") != values_that_affect(shared, "scores"):
        yield "the fixed settings change the scores, so the cells share scores that are not the recipe's"


def fixed_text(setting: Difference) -> str:
    """A fixed setting and the recipe's own value, as in ``method.k 8 (otherwise 6)``."""
    before, after = setting.texts
    return f"{setting.path} {after} (otherwise {before})"


def _notes(recipe: Recipe, axes: Sequence[Axis], cells: Sequence[Cell]) -> Iterator[str]:
    for axis in axes:
        if "images" in field_doc(axis.key, type(recipe)).affects:
            yield f"{axis.name} changes the images of the store: its {len(axis.values)} values have a store each"
        if axis.key == "method.name":
            yield from _dropped(recipe, axis.values)
        if axis.key == "train.lora.rank":
            yield f"train.lora.alpha stays at {recipe.train.lora.alpha:g} for every rank"
    if recipe.train.eval_every == 0:
        every = ", ".join(dict.fromkeys(str(cell.recipe.train.eval_every) for cell in cells))
        yield f"the recipe has no evaluation points: train.eval_every is set to {every}, a quarter of train.steps"
    if len({cell.seed for cell in cells}) > 1:
        yield "seeds vary only the training (train.seed); the store, its scores and the validation are the same"


def _dropped(recipe: Recipe, methods: Sequence[Any]) -> Iterator[str]:
    own = METHODS[recipe.method.name].model_fields
    for method in methods:
        other = METHODS[method].model_fields
        lost = [name for name in own if name not in other]
        gained = [f"{name} {value_text(other[name].default)}" for name in other if name not in own]
        if lost:
            yield f"{method} has no {' or '.join(lost)}; its other keys have the recipe's values"
        if gained:
            yield f"{method} has the default {', '.join(gained)}, which {recipe.method.name} does not have"
