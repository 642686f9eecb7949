"""A sweep: one recipe, one or more of its keys with several values each, and the cells, one recipe per combination.

A cell is an ordinary recipe, made as ``--set`` makes one. What cannot be compared is refused here, before any work.
"""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gdro_cli.config.base import digest
from gdro_cli.config.keys import field_names
from gdro_cli.config.layers import merge_layers, resolve_paths
from gdro_cli.config.methods import METHODS
from gdro_cli.config.recipe import Recipe, build_recipe
from gdro_cli.config.suggest import similar_key
from gdro_cli.config.yamlfile import check_keys, parse_yaml
from gdro_cli.errors import UserError

SHORT_NAMES = {
    "method": "method.name",
    "lr": "train.lr",
    "rank": "train.lora.rank",
    "alpha": "train.lora.alpha",
}
"""Short names beside those of the keys of `method`, which may be named alone: `tau` is `method.tau`."""
POINTS = 4
"""Evaluation points of a training whose recipe asks for none."""

MOST_CELLS = 1000
"""Trainings of one ablation; all of their recipes are held at once."""

_MEASURED = "changes what is measured, so the cells could not be compared"
_UNLEARNT = "changes speed, files or messages and not what is learnt"
_SAID = "says something about the recipe and not about the training"
_REFUSED: dict[str, str] = {
    "seed": "is not swept: `--seeds N` repeats every cell with N training seeds",
    "train.seed": "is not swept: `--seeds N` repeats every cell with N training seeds",
    **dict.fromkeys(("name", "description", "ablation"), _SAID),
    **dict.fromkeys(("prompts.task", "reward.kind"), "is the task itself, and cells of two tasks cannot be compared"),
    **dict.fromkeys(("prompts.validation", "prompts.eval", "judge", "eval", "reward.ocr"), _MEASURED),
    **dict.fromkeys(("reward.geneval.detector", "reward.geneval.detector_model"), _MEASURED),
    **dict.fromkeys(("reward.geneval.colours", "reward.geneval.colour_model"), _MEASURED),
    **dict.fromkeys(("sample.height", "sample.width"), _MEASURED),
    "model": "changes the base model that all cells are compared with",
    "train.eval_every": "changes when is measured and not what is learnt",
    **dict.fromkeys(("reward.workers", "reward.max_failed_share"), _UNLEARNT),
    **dict.fromkeys(("sample.batch_size", "sample.prompts_per_shard", "sample.image_format"), _UNLEARNT),
    **dict.fromkeys(("train.micro_batch", "train.group_gradient", "train.gradient_checkpointing"), _UNLEARNT),
    **dict.fromkeys(("train.checkpoint_every", "train.keep_checkpoints"), _UNLEARNT),
    **dict.fromkeys(("train.log_every", "train.trackers", "train.cache_reference", "train.prefetch"), _UNLEARNT),
}
"""Keys and whole sections that are not swept, and why."""
_ALSO_EVALUATED = {"sample.steps": "eval.steps", "sample.guidance": "eval.guidance"}
"""Keys that the evaluation takes over where its own is not set."""
_RESAMPLED = ("sample", "prompts.train")
"""Sections that the images of the store depend on."""


@dataclass(frozen=True, slots=True)
class Axis:
    """One swept key."""

    name: str
    """As it was asked for, perhaps short."""
    key: str
    """Its dotted path."""
    values: tuple[Any, ...]

    @property
    def resamples(self) -> bool:
        """Whether another value means other images in the store."""
        return _within(self.key, _RESAMPLED)


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
    axes: tuple[Axis, ...]
    seeds: tuple[int, ...]
    cells: tuple[Cell, ...]
    notes: tuple[str, ...]
    """What was decided on the way and should be known, a sentence each."""

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
        return any(_within(axis.key, ("reward.geneval.objective",)) for axis in self.axes)


def full_key(name: str) -> str | None:
    """The dotted path of the recipe key that a name stands for; None where there is none."""
    known = field_names()
    candidates = (name, SHORT_NAMES.get(name, ""), f"method.{name}")
    return next((key for key in candidates if key in known), None)


def plan_sweep(recipe: Recipe, names: Sequence[str], values: Sequence[str] | None = None, *, seeds: int = 1) -> Sweep:
    """Every cell of a sweep, checked.

    Args:
        recipe: what all cells have in common.
        names: swept keys, in full or short.
        values: for each name its values, separated by commas, as YAML; None takes them from ``recipe.ablation``.
        seeds: trainings per combination of values, with the recipe's training seed and the next ones.

    Raises:
        UserError: an unknown key or one that makes no sense to sweep, values that are missing, repeated or no
            valid values of their key, cells that could not be compared, or more of them than ``MOST_CELLS``.
    """
    if not names:
        known = ", ".join(recipe.ablation)
        there = f"the recipe {recipe.name} has values for {known}" if known else "for example --param tau"
        raise UserError(f"name the key to sweep with --param ({there}).")
    keys = [_key(name, recipe) for name in names]
    twice = [name for number, name in enumerate(names) if keys[number] in keys[:number]]
    if twice:
        raise UserError(f"--param {twice[0]} is given twice: name each key once.")
    if values and len(values) != len(names):
        raise UserError(
            f"--values is given {len(values)} times for {len(names)} --param: give it once for each, in the same"
            " order, as in --values 0.5,0.05"
        )
    axes = tuple(
        Axis(name, key, _values(name, key, recipe, values[number] if values else None))
        for number, (name, key) in enumerate(zip(names, keys, strict=True))
    )
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
    return Sweep(recipe, axes, numbers, cells, tuple(_notes(recipe, axes, cells)))


def _within(key: str, sections: Sequence[str]) -> bool:
    return any(key == section or key.startswith(f"{section}.") for section in sections)


def _key(name: str, recipe: Recipe) -> str:
    key = full_key(name)
    if key is None:
        if any(each.startswith(f"{name}.") for each in field_names()):
            raise UserError(f"--param {name}: {name} is a section; name one of its keys (gdro recipes fields {name}).")
        hint = similar_key(name, [*field_names(), *SHORT_NAMES])
        raise UserError(f"--param {name}: there is no recipe key {name!r}{hint or '; gdro recipes fields lists them.'}")
    for section, reason in _REFUSED.items():
        if _within(key, (section,)):
            raise UserError(f"--param {name}: {key} {reason}.")
    pinned = _ALSO_EVALUATED.get(key)
    if pinned is not None and getattr(recipe.eval, pinned.removeprefix("eval.")) is None:
        present = getattr(recipe.sample, key.removeprefix("sample."))
        raise UserError(
            f"--param {name}: {key} also changes how the validation pictures are drawn: pin that first, as in"
            f" --set {pinned}={present}."
        )
    return key


def _values(name: str, key: str, recipe: Recipe, text: str | None) -> tuple[Any, ...]:
    if text is not None:
        source = f"--values {text!r} for {name}"
        found = parse_yaml(f"[{text}]", source=source)
        for value in found:
            if isinstance(value, dict):
                check_keys(value, source=source)
    else:
        found = next((values for short, values in recipe.ablation.items() if full_key(short) == key), ())
    if not found:
        raise UserError(
            f"--param {name}: there are no values, and the recipe {recipe.name} has none in its section `ablation`:"
            " give some with --values, as in --values 0.5,0.05"
        )
    return tuple(found)


def _cell_recipe(recipe: Recipe, axes: Sequence[Axis], values: Sequence[Any], seed: int) -> Recipe:
    """The recipe with the values in it, as ``--set`` would put them."""
    layer: dict[str, Any] = {"train": {"seed": seed}}
    for axis, value in zip(axes, values, strict=True):
        section = layer
        *parents, last = axis.key.split(".")
        for parent in parents:
            section = section.setdefault(parent, {})
        section[last] = value
    resolve_paths(layer, folder=Path.cwd())
    data = merge_layers([recipe.resolved(), layer])
    data["ablation"] = recipe.resolved()["ablation"]  # a cell of another method keeps it, unread
    steps = data["train"]["steps"]
    if recipe.train.eval_every == 0 and isinstance(steps, int) and steps > 0:
        data["train"]["eval_every"] = math.ceil(steps / POINTS)
    return build_recipe(data, source=f"{recipe.name} with {_label(axes, values)}")


def _label(axes: Sequence[Axis], values: Sequence[Any]) -> str:
    return ", ".join(f"{axis.name} {value_text(value)}" for axis, value in zip(axes, values, strict=True))


def value_text(value: Any) -> str:
    """A value as it is told: text as it is, the rest as JSON."""
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def _refuse_equal(cells: Sequence[Cell]) -> None:
    """12 and 12.0 are one value; so the recipes are compared and not what was written."""
    seen: dict[str, str] = {}
    for cell in cells:
        found = cell.recipe.digest()
        if found in seen:
            both = cell.label if seen[found] == cell.label else f"{seen[found]} and {cell.label}"
            raise UserError(f"{both}: the same value twice; name each value once.")
        seen[found] = cell.label


def _notes(recipe: Recipe, axes: Sequence[Axis], cells: Sequence[Cell]) -> Iterator[str]:
    for axis in axes:
        if axis.resamples:
            yield f"{axis.name} changes how the store is sampled: each of its {len(axis.values)} values has a store"
        if axis.key == "method.name":
            yield from _dropped(recipe, axis.values)
        if axis.key == "train.lora.rank":
            yield f"rank is swept with train.lora.alpha kept at {recipe.train.lora.alpha:g}"
    if recipe.train.eval_every == 0:
        every = ", ".join(dict.fromkeys(str(cell.recipe.train.eval_every) for cell in cells))
        yield f"the recipe has no evaluation points: train.eval_every is set to {every}, a quarter of train.steps"
    if len({cell.seed for cell in cells}) > 1:
        yield "seeds vary the training alone (train.seed); the store, its scores and the validation are the same"


def _dropped(recipe: Recipe, methods: Sequence[Any]) -> Iterator[str]:
    own = METHODS[recipe.method.name].model_fields
    for method in methods:
        other = METHODS[method].model_fields
        lost = [name for name in own if name not in other]
        gained = [f"{name} {value_text(other[name].default)}" for name in other if name not in own]
        if lost:
            yield f"{method} has no {' or '.join(lost)}; the other keys of the method are the recipe's"
        if gained:
            yield f"{method} takes its default {', '.join(gained)}, which {recipe.method.name} does not have"
