"""A recipe: everything about a job. ``load`` makes it from a YAML file or a mapping."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import Field

from gdro_cli.config.base import Affects, StrictModel
from gdro_cli.config.methods import GdroMethod, GroupMethod, Method, OnlineMethod
from gdro_cli.config.sections import (
    AblationEntry,
    EvalSection,
    JudgeSection,
    ModelSection,
    PromptsSection,
    RewardSection,
    SampleSection,
    TrainSection,
)
from gdro_cli.identity import digest


class Recipe(StrictModel):
    """Everything about a job; immutable.

    The class checks each key by itself; ``load_recipe`` and ``build_recipe`` also check the rules between keys.
    """

    name: Annotated[str, Affects("label")] = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$", max_length=64)
    """Name of the recipe, used in folder names. Letters, digits, `.`, `_`, `-`; at most 64. Unset: the file's name."""
    description: Annotated[str, Affects("label")] = Field("", max_length=2000)
    """One line for `gdro recipes`. At most 2000 letters."""
    seed: Annotated[int, Affects("images")] = Field(0, ge=0)
    """Seed of everything random except the evaluation (`eval.seed`), built-in prompts (their own `seed`), and a
    training with a seed of its own (`train.seed`). 0 or more."""
    model: Annotated[ModelSection, Affects("images", "training", "measurement")] = ModelSection()
    """The text-to-image model to train."""
    prompts: PromptsSection
    """The prompts."""
    sample: Annotated[SampleSection, Affects("images")] = SampleSection()
    """How groups are made."""
    reward: Annotated[RewardSection, Affects("scores", "measurement")] = RewardSection()
    """How images are scored."""
    judge: Annotated[JudgeSection, Affects("measurement")] = JudgeSection()
    """Who judges the quality of images, independently of the reward."""
    method: Annotated[Method, Affects("training")] = GdroMethod(name="gdro")
    """The training method and its numbers; its keys depend on `method.name`."""
    train: Annotated[TrainSection, Affects("training")] = TrainSection()
    """Optimisation of the adapter."""
    eval: Annotated[EvalSection, Affects("measurement")] = EvalSection()
    """How a model is measured."""
    ablation: Annotated[dict[str, AblationEntry], Affects("label")] = Field(default_factory=dict)
    """Default values for `gdro ablate`, by recipe key or short name (`tau` for `method.tau`): a list, or `values` with
    the list and `set` with keys that have another value in all cells of that sweep."""

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
        """``method`` if it makes its images while it trains, else None."""
        return self.method if isinstance(self.method, OnlineMethod) else None

    @property
    def group_method(self) -> GroupMethod:
        """``method``, which must train on stored groups. Raises TypeError."""
        if isinstance(self.method, OnlineMethod):
            raise TypeError(f"{self.method.name} does not train on stored groups")
        return self.method

    def resolved(self) -> dict[str, Any]:
        """Every key with its value, defaults included, as plain JSON; ``build_recipe`` reads it back."""
        return self.model_dump(mode="json")

    def digest(self) -> str:
        """Twelve hexadecimal digits that identify the values of all keys except name and description."""
        return digest(self.model_dump(mode="json", exclude={"name", "description"}))
