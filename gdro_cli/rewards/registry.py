"""Look up a reward by its name, open it, and say what its scores depend on."""

from __future__ import annotations

import contextlib
import json
from typing import Any

from pydantic import BaseModel

from gdro_cli.config.keys import settings_that_affect
from gdro_cli.config.rewards import MIX, REWARDS, distribution, plugin_entries, resolve_reward, reward_names
from gdro_cli.config.sections import RewardSection
from gdro_cli.errors import GdroError, PrerequisiteError, UserError
from gdro_cli.rewards.base import Reward, one_line


def reward_class(name: str) -> type[Reward]:
    """The class of a reward; importing its module loads nothing heavy.

    Raises:
        UserError: no reward has that name.
        PrerequisiteError: it is a plug-in that cannot be used.
    """
    if name not in REWARDS and name not in reward_names():
        raise UserError(
            f"there is no reward {name!r} in this installation (it has {', '.join(reward_names())}): install the"
            " package that has it (docs/adding-a-reward.md)"
        )
    cls: type[Reward] = resolve_reward(name)
    return cls


def usable_plugins() -> list[str]:
    """The installed plug-ins that can be used; they are imported."""
    names = []
    for name in plugin_entries():
        with contextlib.suppress(GdroError):
            resolve_reward(name)
            names.append(name)
    return names


def open_reward(section: RewardSection) -> Reward:
    """The reward of a recipe's section ``reward``, with its settings; its files are neither looked for nor loaded.

    Raises:
        PrerequisiteError: it is a plug-in whose constructor fails.
    """
    if section.kind != MIX:
        return open_part(section, section.kind)
    cls: Any = reward_class(MIX)
    mixture: Reward = cls(getattr(section, MIX), {name: open_part(section, name) for name in section.parts})
    return mixture


def open_part(section: RewardSection, name: str) -> Reward:
    """The reward ``name`` with its settings in a recipe's section ``reward``. Raises ``PrerequisiteError``."""
    cls, settings = reward_class(name), getattr(section, name, None)
    try:
        return cls(settings)
    except GdroError:
        raise
    except Exception as error:
        raise PrerequisiteError(f"the reward {name} cannot be made ({one_line(error)}): correct it") from error


def provenance(reward: Reward) -> dict[str, Any]:
    """What a reward's scores depend on, as JSON values: equal provenance, equal scores. It names tables and runs.

    It is the reward's ``version``; for a plug-in also the version of its package, and for a reward whose settings are
    not in ``RewardSection`` those of them that affect scores.

    Raises:
        PrerequisiteError: something that the reward needs is missing, or it cannot state its version.
    """
    try:
        content = json.loads(json.dumps(dict(reward.version), allow_nan=False))
    except GdroError:
        raise
    except Exception as error:  # a plug-in may raise anything
        raise PrerequisiteError(
            f"the reward {reward.name} cannot state its version ({one_line(error)}): correct it"
        ) from error
    if reward.name not in RewardSection.model_fields and (settings := _settings(reward.settings)):
        content["settings"] = settings
    if reward.name not in REWARDS and (entries := plugin_entries().get(reward.name)):
        content["package"] = distribution(entries[0])
    return dict(content)


def _settings(settings: BaseModel) -> dict[str, Any]:
    return settings_that_affect(settings, "scores")
