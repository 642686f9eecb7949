"""Rewards and judges.

These names are all that an author of a reward needs, and they stay as they are: a package that adds a reward imports
them from here (docs/adding-a-reward.md). What lies deeper may change.
"""

from gdro_cli.config.base import Affects, StrictModel
from gdro_cli.core.measures import Measure
from gdro_cli.errors import PrerequisiteError, UserError
from gdro_cli.rewards.base import ImageSource, PromptLike, Reward, Score, UnreadableImageError, read_rgb

__all__ = [
    "Affects",
    "ImageSource",
    "Measure",
    "PrerequisiteError",
    "PromptLike",
    "Reward",
    "Score",
    "StrictModel",
    "UnreadableImageError",
    "UserError",
    "read_rgb",
]
