"""Rewards and judges. These names are all that an author of a reward needs; docs/adding-a-reward.md shows how."""

from gdro_cli.config.base import StrictModel
from gdro_cli.core.measures import Measure
from gdro_cli.rewards.base import ImageSource, PromptLike, Reward, Score, UnreadableImageError, read_rgb

__all__ = ["ImageSource", "Measure", "PromptLike", "Reward", "Score", "StrictModel", "UnreadableImageError", "read_rgb"]
