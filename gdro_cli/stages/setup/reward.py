"""The recipe's reward."""

from __future__ import annotations

from gdro_cli.config.recipe import Recipe
from gdro_cli.core.evaluation_points import MissingLimits
from gdro_cli.rewards.base import Reward
from gdro_cli.rewards.registry import reward_class


def open_reward(recipe: Recipe) -> Reward:
    """The recipe's reward; nothing is looked for or loaded yet."""
    kind = recipe.reward.kind
    return reward_class(kind)(getattr(recipe.reward, kind, None))


def missing_limits(recipe: Recipe) -> MissingLimits:
    """How much may be missing of an evaluation point that is compared with others."""
    return MissingLimits(recipe.reward.max_failed_share, recipe.judge.max_failed_share)
