"""The rewards that a recipe can name, and the module and class of each.

The reward classes depend on recipes, so this module only names them and imports a class when a recipe needs it.
``gdro_cli.rewards.registry`` has the classes.
"""

from __future__ import annotations

from pkgutil import resolve_name
from typing import Annotated, Any

from pydantic import BeforeValidator
from pydantic_core import PydanticKnownError

REWARDS: dict[str, str] = {
    "ocr": "gdro_cli.rewards.ocr.reward:OcrReward",
    "geneval": "gdro_cli.rewards.geneval.reward:GenEvalReward",
}
"""``module:class`` of each reward by its name. A new reward is one more line."""


def reward_needs(name: str) -> frozenset[str]:
    """What a prompt must carry for the reward ``name``: ``target``, keys of its metadata, or nothing."""
    needs: frozenset[str] = resolve_name(REWARDS[name]).needs
    return needs


def _in_registry(value: Any) -> Any:
    if not isinstance(value, str) or value not in REWARDS:
        *others, last = (f"'{name}'" for name in REWARDS)
        raise PydanticKnownError("literal_error", {"expected": f"{', '.join(others)} or {last}"})
    return value


IN_REGISTRY = BeforeValidator(_in_registry)
RewardName = Annotated[str, IN_REGISTRY]
"""A key whose value names a reward."""
