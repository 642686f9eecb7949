"""The recipe's reward."""

from __future__ import annotations

from gdro_cli.config.recipe import Recipe
from gdro_cli.core.evaluation_points import MissingLimits
from gdro_cli.rewards import registry
from gdro_cli.rewards.base import Reward


def open_reward(recipe: Recipe) -> Reward:
    """The recipe's reward; its files are neither looked for nor loaded yet."""
    return registry.open_reward(recipe.reward)


def missing_limits(recipe: Recipe) -> MissingLimits:
    """Shares of missing rewards and judgements up to which an evaluation point is compared with others."""
    return MissingLimits(recipe.reward.max_failed_share, recipe.judge.max_failed_share)
