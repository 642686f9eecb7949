"""The recipe's reward: the object itself, its scoring processes and its score table."""

from __future__ import annotations

from gdro_cli.config.recipe import Recipe
from gdro_cli.core.evaluation_points import MissingLimits
from gdro_cli.data.scores import ScoreTable
from gdro_cli.data.store import GroupStore
from gdro_cli.rewards.base import Reward
from gdro_cli.rewards.pool import ScoringPool, usable_cores
from gdro_cli.rewards.registry import reward_class


def open_reward(recipe: Recipe) -> Reward:
    """The recipe's reward; nothing is looked for or loaded yet."""
    kind = recipe.reward.kind
    return reward_class(kind)(getattr(recipe.reward, kind, None))


def open_pool(recipe: Recipe, *, sharing: int = 1) -> ScoringPool:
    """Processes that score; a context manager.

    ``sharing`` is how many processes of this machine have a pool each: they share the cores.
    """
    reward, workers = open_reward(recipe), recipe.reward.workers
    own_share = max(1, usable_cores() // sharing) if reward.resources == "cores" else 1
    return ScoringPool(reward, workers=own_share if workers == "auto" else workers)


def open_table(recipe: Recipe, store: GroupStore, *, command: str = "gdro score") -> ScoreTable:
    """Make or open the table of the recipe's reward beside ``store``; ``command`` makes the scores.

    Raises:
        PrerequisiteError: a package or weights that the reward needs are missing.
        StoreError: the table is damaged or cannot be written.
    """
    version = open_reward(recipe).version
    return ScoreTable.create_or_open(store, recipe.reward.kind, provenance=version, command=command)


def missing_limits(recipe: Recipe) -> MissingLimits:
    """How much may be missing of an evaluation point that is compared with others."""
    return MissingLimits(recipe.reward.max_failed_share, recipe.judge.max_failed_share)
