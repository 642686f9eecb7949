"""Look up a reward by its name."""

from __future__ import annotations

from pkgutil import resolve_name

from gdro_cli.config.rewards import REWARDS
from gdro_cli.errors import UserError
from gdro_cli.rewards.base import Reward


def reward_class(name: str) -> type[Reward]:
    """The class of a reward; importing its module loads nothing heavy.

    Raises:
        UserError: no reward has that name.
    """
    if name not in REWARDS:
        raise UserError(f"there is no reward {name!r} in this installation: it has {', '.join(REWARDS)}")
    cls: type[Reward] = resolve_name(REWARDS[name])
    return cls
