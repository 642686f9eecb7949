"""The keys of a given recipe: those of ``Recipe``, and a section for each other reward that the recipe names.

The settings of a reward are the section ``reward.NAME``, whose keys are the reward's ``Settings``. The sections of
``RewardSection`` are always there; those of other rewards only where the recipe names the reward, in ``reward.kind``,
in a mixture, in ``eval.rewards`` or by the section itself. So a plug-in that nobody asks for is never imported.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from functools import cache
from typing import Annotated, Any

from pydantic import BaseModel, Field, create_model

from gdro_cli.config.recipe import Recipe
from gdro_cli.config.rewards import REWARDS, named_rewards, reward_names, reward_settings
from gdro_cli.config.sections import RewardSection

OWN_KEYS = frozenset(RewardSection.model_fields) - set(REWARDS)
"""Keys of the section ``reward`` that are about every reward."""


def schema_of(data: Mapping[str, Any]) -> type[Recipe]:
    """The recipe class with the sections of the rewards that ``data``, a recipe as a mapping, names.

    Raises:
        PrerequisiteError: it names a plug-in that cannot be used.
    """
    named = _named(data) - set(RewardSection.model_fields)
    return schema_with([name for name in reward_names() if name in named]) if named else Recipe


def _named(data: Mapping[str, Any]) -> set[str]:
    """The rewards that ``data`` names, and other keys of its section ``reward``."""
    section, evaluation = data.get("reward"), data.get("eval")
    named = named_rewards(section) if isinstance(section, Mapping) else set()
    others = evaluation.get("rewards") if isinstance(evaluation, Mapping) else None
    return named | ({name for name in others if isinstance(name, str)} if isinstance(others, list | tuple) else set())


def schema_with(names: Collection[str]) -> type[Recipe]:
    """The recipe class with the sections of these rewards. Raises ``PrerequisiteError``."""
    settings = ((name, reward_settings(name)) for name in names if name not in RewardSection.model_fields)
    return _schema(tuple((name, model) for name, model in settings if model.model_fields))


def full_schema() -> type[Recipe]:
    """The recipe class with the sections of all built-in rewards."""
    return schema_with(REWARDS)


@cache
def _schema(sections: tuple[tuple[str, type[BaseModel]], ...]) -> type[Recipe]:
    if not sections:
        return Recipe
    fields: dict[str, Any] = {}
    for name, model in sections:
        text = " ".join((model.__doc__ or f"Settings of the reward {name}.").split())
        required = any(field.is_required() for field in model.model_fields.values())
        fields[name] = (model, Field(description=text) if required else Field(default_factory=model, description=text))
    reward = create_model("RewardSection", __base__=RewardSection, __module__=__name__, **fields)
    own = Recipe.model_fields["reward"]
    field: Any = (Annotated[(reward, *own.metadata)], Field(description=own.description))
    return create_model("Recipe", __base__=Recipe, __module__=__name__, reward=field)


def with_own_section(data: Mapping[str, Any], schema: type[Recipe]) -> Mapping[str, Any]:
    """``data`` with empty sections for the settings of the rewards that it names, so that a missing key is named in
    full."""
    section = data.get("reward", {})
    if not isinstance(section, Mapping):
        return data
    lacking = (_named(data) & sections_of(schema)) - section.keys()
    return {**data, "reward": {**{name: {} for name in lacking}, **section}} if lacking else data


def sections_of(schema: type[Recipe]) -> frozenset[str]:
    """The rewards that have a section in ``schema``."""
    section: Any = schema.model_fields["reward"].annotation
    return frozenset(section.model_fields) - OWN_KEYS
