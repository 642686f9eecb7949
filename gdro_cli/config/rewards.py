"""The rewards that a recipe can name: those of this package, and installed plug-ins.

The reward classes depend on recipes, so this module only names them and imports a class when a recipe needs it.
``gdro_cli.rewards.registry`` has the classes.
"""

from __future__ import annotations

from collections.abc import Mapping
from importlib.metadata import EntryPoint, entry_points
from pkgutil import resolve_name
from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator
from pydantic_core import PydanticKnownError

REWARDS: dict[str, str] = {
    "ocr": "gdro_cli.rewards.ocr.reward:OcrReward",
    "geneval": "gdro_cli.rewards.geneval.reward:GenEvalReward",
    "clip": "gdro_cli.rewards.clip.rewards:ClipReward",
    "pickscore": "gdro_cli.rewards.clip.rewards:PickScoreReward",
    "hpsv2": "gdro_cli.rewards.clip.rewards:HpsReward",
    "aesthetic": "gdro_cli.rewards.clip.rewards:AestheticReward",
    "http": "gdro_cli.rewards.http.reward:HttpReward",
    "vlm": "gdro_cli.rewards.vlm.reward:VlmReward",
    "mix": "gdro_cli.rewards.mix:MixReward",
}
"""``module:class`` of each built-in reward by its name. A new one is one more line."""

MIX = "mix"
"""The reward that mixes others."""

GROUP = "gdro_cli.rewards"
"""The entry points of installed packages that add rewards: name -> ``module:class``."""


def plugin_entries() -> dict[str, list[EntryPoint]]:
    """The entry points of plug-ins by name, sorted; a name with several belongs to several packages.

    Nothing is imported. A plug-in with the name of a built-in reward is listed, and never used.
    """
    entries: dict[str, list[EntryPoint]] = {}
    for entry in sorted(entry_points(group=GROUP), key=lambda entry: (entry.name, distribution(entry))):
        entries.setdefault(entry.name, []).append(entry)
    return entries


def distribution(entry: EntryPoint) -> str:
    """The package that an entry point belongs to, with its version: ``gdro-reward-brightness 0.1.0``."""
    return entry.value if entry.dist is None else f"{entry.dist.name} {entry.dist.version}"


def reward_names() -> tuple[str, ...]:
    """The names that ``reward.kind`` takes, the built-in ones first."""
    return tuple(dict.fromkeys((*REWARDS, *plugin_entries())))


def resolve_reward(name: str) -> Any:
    """The class of a reward that ``reward_names`` lists.

    Raises:
        PrerequisiteError: it is a plug-in that cannot be used.
    """
    if name in REWARDS:
        return resolve_name(REWARDS[name])
    return resolve_name("gdro_cli.rewards.plugins:load_plugin")(name)


def part_of(term: str) -> str:
    """The reward that a term of a mixture belongs to: ``ocr`` of ``ocr`` and ``ocr.exact``."""
    return term.partition(".")[0]


def named_rewards(section: Mapping[str, Any]) -> set[str]:
    """The rewards that a recipe's section ``reward`` names, as a mapping that nobody has checked: the kind, sections,
    and parts of a mixture."""
    mix = section.get(MIX)
    weights = mix.get("weights") if isinstance(mix, Mapping) else None
    terms = weights if isinstance(weights, Mapping) else ()
    return {part_of(name) for name in (section.get("kind"), *section, *terms) if isinstance(name, str)}


def reward_needs(name: str) -> frozenset[str]:
    """What a prompt must carry for the reward ``name``: ``target``, keys of its metadata, or nothing."""
    needs: frozenset[str] = resolve_reward(name).needs
    return needs


def reward_settings(name: str) -> type[BaseModel]:
    """The model of a reward's keys in a recipe."""
    settings: type[BaseModel] = resolve_reward(name).Settings
    return settings


def _in_registry(value: Any) -> Any:
    if isinstance(value, str) and (value in REWARDS or value in reward_names()):
        return value
    *others, last = (f"'{name}'" for name in reward_names())
    raise PydanticKnownError("literal_error", {"expected": f"{', '.join(others)} or {last}"})


IN_REGISTRY = BeforeValidator(_in_registry)
RewardName = Annotated[str, IN_REGISTRY]
"""A key whose value names a reward."""
