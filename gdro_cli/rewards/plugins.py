"""Rewards of other installed packages, found by their entry points in the group ``gdro_cli.rewards``.

A plug-in is code that the user has installed. A recipe can name it; it can never bring code of its own.
"""

from __future__ import annotations

import contextlib
import inspect
import re
import sys
from dataclasses import fields
from importlib.metadata import EntryPoint
from typing import Any

from gdro_cli.config.base import StrictModel
from gdro_cli.config.rewards import distribution, plugin_entries
from gdro_cli.config.schema import OWN_KEYS
from gdro_cli.core.measures import Measure
from gdro_cli.core.signals import ImageSignals
from gdro_cli.errors import PrerequisiteError
from gdro_cli.rewards.base import Reward, one_line
from gdro_cli.rewards.judge.base import AXES

_QUOTED = 200
"""Characters of another library's message that an error shows."""
NAME = re.compile(r"[A-Za-z][A-Za-z0-9_-]{0,63}")
"""Names that a reward can have."""
_RESERVED = OWN_KEYS | {"mix", "settings"}
"""Keys that the section ``reward`` has or may get."""
_MEASURED = {"reward", "u", "corrected", "unjudged", *AXES, *(signal.name for signal in fields(ImageSignals))}
"""Details that images have besides those of their reward."""


def load_plugin(name: str) -> type[Reward]:
    """The class of an installed plug-in.

    Raises:
        PrerequisiteError: two packages have a reward of this name, or the package cannot be imported, or what it names
            is not a complete reward. The message names the package.
    """
    entry, *others = plugin_entries()[name]
    who = f"the reward {name} of the package {distribution(entry)}"
    if others:
        packages = " and ".join(distribution(entry) for entry in (entry, *others))
        raise PrerequisiteError(f"the packages {packages} both have a reward {name}: uninstall all but one")
    cls = _imported(entry, who)
    if problem := _problem(cls, name):
        raise PrerequisiteError(f"{who} cannot be used: {problem}")
    return cls  # type: ignore[no-any-return]


def _imported(entry: EntryPoint, who: str) -> Any:
    try:
        with contextlib.redirect_stdout(sys.stderr):  # standard output is for results
            return entry.load()
    except (Exception, SystemExit) as error:  # code of others may raise anything
        raise PrerequisiteError(f"{who} cannot be imported ({one_line(error)}): correct or uninstall it") from error


def name_problem(name: str) -> str | None:
    """What keeps a reward from having a name."""
    if NAME.fullmatch(name) and name not in _RESERVED | _MEASURED and not hasattr(StrictModel, name):
        return None
    return "a reward cannot have this name: take another one of letters, digits, '_' and '-'"


def _problem(cls: Any, name: str) -> str | None:
    """What keeps a plug-in from being used."""
    if problem := name_problem(name):
        return problem
    if not (isinstance(cls, type) and issubclass(cls, Reward)):
        return "its entry point names no subclass of gdro_cli.rewards.Reward"
    if inspect.isabstract(cls):
        return f"it does not implement {', '.join(sorted(cls.__abstractmethods__))}"
    for attribute in ("name", "purpose"):
        if not isinstance(getattr(cls, attribute, None), str):
            return f"its class has no text `{attribute}`"
    if cls.name != name:
        return f"its class has the name {cls.name!r}, and its entry point another one: make them equal"
    if cls.score is Reward.score and cls.score_image is Reward.score_image:
        return "it has neither score_image nor score"
    if not (isinstance(cls.Settings, type) and issubclass(cls.Settings, StrictModel)):
        return "its Settings is not a subclass of gdro_cli.rewards.StrictModel"
    if missing := [key for key, field in cls.Settings.model_fields.items() if not field.description]:
        return f"the key {missing[0]} of its Settings has no docstring"
    return _unwritable(cls.Settings) or _wrong_fact(cls)


def _unwritable(settings: type[StrictModel]) -> str | None:
    """Why the defaults cannot be written into a resolved recipe and read back, if they cannot."""
    if any(field.is_required() for field in settings.model_fields.values()):
        return None
    try:
        settings.model_validate(settings().model_dump(mode="json"))
    except Exception as error:  # noqa: BLE001 - pydantic has several, and a validator of the plug-in may raise any
        words = " ".join(str(error).split())[:_QUOTED]
        return f"the defaults of its Settings cannot be written into a recipe and read back ({words})"
    return None


def _wrong_fact(cls: Any) -> str | None:
    if not (isinstance(cls.needs, frozenset) and all(isinstance(key, str) for key in cls.needs)):
        return "`needs` is not a frozenset of texts"
    if not (isinstance(cls.measures, tuple) and cls.measures and all(isinstance(m, Measure) for m in cls.measures)):
        return "`measures` is not a tuple of at least one Measure"
    axes = Reward.judge_axes
    if not (isinstance(cls.judge_axes, tuple) and cls.judge_axes and set(cls.judge_axes) <= set(axes)):
        return f"`judge_axes` is not a tuple of at least one of {', '.join(axes)}"
    scale = cls.scale
    if not (isinstance(scale, tuple) and len(scale) == 2 and all(isinstance(end, int | float) for end in scale)):
        return "`scale` is not a pair of numbers"
    if not scale[0] < scale[1]:
        return "the first number of `scale` is not below the second"
    return None
