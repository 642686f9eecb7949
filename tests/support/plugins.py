"""Packages with a reward, installed as pip leaves them: a module, and a dist-info folder with the entry point."""

from __future__ import annotations

import importlib
from pathlib import Path

BRIGHTNESS = '''
from gdro_cli.rewards import Affects, Reward, StrictModel
from typing import Annotated

class BrightnessSettings(StrictModel):
    """What counts as bright."""

    power: float = 1.0
    """Exponent of the grey level."""
    threads: Annotated[int, Affects("speed")] = 1
    """Threads that it uses."""

class Brightness(Reward):
    name = "brightness"
    purpose = "to draw bright images"
    Settings = BrightnessSettings
    version = {"reward": "brightness", "rule": "grey-1"}

    def score_image(self, image, prompt):
        from PIL import ImageStat

        return (ImageStat.Stat(image.convert("L")).mean[0] / 255) ** self.settings.power
'''
"""A reward with settings."""


def install(folder: Path, name: str, code: str, *, target: str, package: str = "", version: str = "0.1.0") -> None:
    """Install a package in ``folder``, which must be on ``sys.path``.

    Args:
        folder: the folder.
        name: the reward's name in the entry point; its module is ``NAME_reward`` (with ``_`` for ``-``).
        code: of the module.
        target: the class.
        package: the distribution. Default: ``gdro-reward-NAME``.
        version: of the distribution.
    """
    package = package or f"gdro-reward-{name}"
    module = f"{package.removeprefix('gdro-reward-').replace('-', '_')}_reward"
    (folder / f"{module}.py").write_text(code, encoding="utf-8")
    info = folder / f"{package.replace('-', '_')}-{version}.dist-info"
    info.mkdir(parents=True, exist_ok=True)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {package}\nVersion: {version}\n")
    (info / "entry_points.txt").write_text(f"[gdro_cli.rewards]\n{name} = {module}:{target}\n")
    importlib.invalidate_caches()
