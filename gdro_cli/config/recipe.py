"""A recipe: one YAML file that says everything about a job, and how it is loaded."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field, JsonValue, PrivateAttr, model_validator
from pydantic_core import PydanticCustomError

from gdro_cli.config.base import StrictModel, digest
from gdro_cli.config.layers import file_layers, find_recipe, merge_layers, override_layer, shipped_recipes
from gdro_cli.config.methods import GdroMethod, GroupMethod, Method, OnlineMethod
from gdro_cli.config.sections import (
    MOST_SEED,
    EvalSection,
    JudgeSection,
    ModelSection,
    PromptsSection,
    RewardSection,
    SampleSection,
    TrainSection,
)

__all__ = ["Recipe", "build_recipe", "load_recipe", "shipped_recipes"]


class Recipe(StrictModel):
    """Everything about a job; immutable. From a file by ``load_recipe``, a mapping by ``build_recipe``."""

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$", max_length=64)
    """Name of the recipe, used in folder names. Letters, digits, `.`, `_`, `-`. Left out: the file's name."""
    description: str = Field("", max_length=2000)
    """One line for `gdro recipes`. At most 2000 letters."""
    seed: int = Field(0, ge=0, le=MOST_SEED)
    """Seed of everything random except the evaluation (`eval.seed`), built-in prompts, and a training that has its own
    (`train.seed`). 0 or more."""
    model: ModelSection = ModelSection()
    """Which text-to-image model is trained."""
    prompts: PromptsSection
    """The task and its prompts."""
    sample: SampleSection = SampleSection()
    """How the groups are made."""
    reward: RewardSection = RewardSection()
    """How stored images are scored."""
    judge: JudgeSection = JudgeSection()
    """Who judges quality, beside the reward."""
    method: Method = GdroMethod(name="gdro")
    """The training method and its numbers; its keys depend on `method.name`."""
    train: TrainSection = TrainSection()
    """Optimisation of the adapter."""
    eval: EvalSection = EvalSection()
    """How a model is measured."""
    ablation: dict[str, Annotated[tuple[JsonValue, ...], Field(strict=False)]] = Field(default_factory=dict)
    """Values that `gdro ablate` sweeps where it is given none, by recipe key or its short name (`tau` for
    `method.tau`)."""

    _base_dir: Path | None = PrivateAttr(default=None)

    @model_validator(mode="after")
    def _keep_the_rules(self) -> Recipe:
        from gdro_cli.config.rules import problems

        found = tuple(problems(self))
        if found:
            text = "; ".join(f"{problem.path}: {problem.message}" for problem in found)
            raise PydanticCustomError("recipe_rules", "{text}", {"text": text, "problems": found})
        return self

    @property
    def base_dir(self) -> Path | None:
        """Folder of the recipe's file; only paths that did not exist when it was loaded still need it."""
        return self._base_dir

    @property
    def eval_steps(self) -> int:
        """Euler steps of the evaluation: ``eval.steps``, else ``sample.steps``."""
        return self.sample.steps if self.eval.steps is None else self.eval.steps

    @property
    def eval_guidance(self) -> float:
        """Guidance scale of the evaluation: ``eval.guidance``, else ``sample.guidance``."""
        return self.sample.guidance if self.eval.guidance is None else self.eval.guidance

    @property
    def train_seed(self) -> int:
        """Seed of the training: ``train.seed``, else ``seed``."""
        return self.seed if self.train.seed is None else self.train.seed

    @property
    def online_method(self) -> OnlineMethod | None:
        """``method``, if it makes its images while it trains."""
        return self.method if isinstance(self.method, OnlineMethod) else None

    @property
    def group_method(self) -> GroupMethod:
        """``method``, which trains on stored groups. Raises TypeError for another."""
        if isinstance(self.method, OnlineMethod):
            raise TypeError(f"{self.method.name} does not train on stored groups")
        return self.method

    def resolved(self) -> dict[str, Any]:
        """Every key with its value, defaults included, as plain JSON; ``build_recipe`` takes it back."""
        return self.model_dump(mode="json")

    def digest(self) -> str:
        """Twelve hexadecimal digits that stand for the values of all keys but name and description."""
        return digest(self.model_dump(mode="json", exclude={"name", "description"}))


def load_recipe(name_or_path: str, *, overrides: Sequence[str] = ()) -> Recipe:
    """The recipe at a path or of a shipped name (``ocr``, ``ocr.yaml``; a path wins), ``--set`` applied.

    Raises ``UserError`` that lists every problem at once, each with the dotted path of its key.
    """
    path = find_recipe(name_or_path)
    data = merge_layers([*file_layers(path), override_layer(overrides)])
    data.setdefault("name", re.sub(r"[^A-Za-z0-9._-]+", "-", path.stem).strip("-._") or "recipe")
    recipe = build_recipe(data, source=f"{path.name} with --set" if overrides else str(path))
    recipe._base_dir = path.resolve().parent
    return recipe


def build_recipe(data: Mapping[str, Any], *, source: str = "recipe") -> Recipe:
    """The recipe of a plain mapping with no ``extends``; ``source`` is what an error message calls it."""
    from gdro_cli.config.validation import validate

    method = data.get("method")
    if isinstance(method, Mapping) and "name" not in method:
        data = {**data, "method": {"name": "gdro", **method}}
    return validate(Recipe, data, source=source)
