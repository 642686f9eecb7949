"""All rewards of this installation, described: what ``gdro rewards`` prints."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from gdro_cli.config.keys import FieldDoc, describe_fields
from gdro_cli.config.rewards import REWARDS, distribution, plugin_entries
from gdro_cli.config.schema import schema_with
from gdro_cli.errors import GdroError
from gdro_cli.rewards.base import Reward
from gdro_cli.rewards.registry import reward_class

BUILT_IN = "built in"


@dataclass(frozen=True, slots=True)
class ListedReward:
    """A reward, or a plug-in that cannot be used."""

    name: str
    source: str
    """``built in``, or the package with its version."""
    cls: type[Reward] | None
    settings: tuple[FieldDoc, ...]
    problem: str | None
    """Why it cannot be used, a sentence."""

    @property
    def needs(self) -> str:
        """What a prompt must carry, as text; that of a server is known when it is asked."""
        if self.cls is None or self.name == "http":
            return "what its server says" if self.cls else ""
        return ", ".join(sorted(self.cls.needs)) or "nothing"

    def to_json(self) -> dict[str, Any]:
        """The facts as a JSON object."""
        facts: dict[str, Any] = {"name": self.name, "source": self.source, "problem": self.problem}
        if self.cls is None:
            return facts
        keys = [{"key": doc.path, "type": doc.type, "default": doc.default, "text": doc.text} for doc in self.settings]
        return facts | {
            "purpose": self.cls.purpose,
            "needs": sorted(self.cls.needs),
            "measures": [measure.name for measure in self.cls.measures],
            "scale": list(self.cls.scale) if isinstance(self.cls.scale, tuple) else None,
            "settings": keys,
        }


def list_rewards() -> list[ListedReward]:
    """The built-in rewards and all installed plug-ins, which are imported."""
    listed = [_listed(name, BUILT_IN) for name in REWARDS]
    for name, entries in plugin_entries().items():
        for entry in entries:
            listed.append(_listed(name, distribution(entry)))
    return listed


def _listed(name: str, source: str) -> ListedReward:
    if source != BUILT_IN and name in REWARDS:
        return ListedReward(name, source, None, (), "it is never used, since a built-in reward has its name")
    try:
        cls = reward_class(name)
    except GdroError as error:
        return ListedReward(name, source, None, (), str(error))
    docs = tuple(doc for doc in describe_fields(schema_with([name])) if doc.reward == name and not doc.section)
    return ListedReward(name, source, cls, docs, None)
