"""The package that ``gdro rewards new`` writes: a reward that works, its test, and its entry point."""

from __future__ import annotations

import keyword
from pathlib import Path

from gdro_cli.config.rewards import reward_names
from gdro_cli.errors import UserError
from gdro_cli.files import new_folder
from gdro_cli.rewards.plugins import name_problem

_PYPROJECT = """\
[build-system]
requires = ["hatchling"]
build-backend = "hatchling.build"

[project]
name = "gdro-reward-{name}"
version = "0.1.0"
dependencies = ["gdro_cli", "Pillow"]

[project.entry-points."gdro_cli.rewards"]
{name} = "{module}:{cls}"

[tool.hatch.build]
dev-mode-dirs = ["."]

[tool.hatch.build.targets.wheel]
only-include = ["{module}.py"]
"""
_MODULE = '''\
"""The reward `{name}`: how bright an image is. Change it into yours."""

from gdro_cli.rewards import Reward, StrictModel


class {cls}Settings(StrictModel):
    """Settings of the reward {name}, in a recipe at `reward.{name}`."""

    power: float = 1.0
    """Exponent of the brightness. 1 is linear."""


class {cls}(Reward):
    """The mean grey level of an image, 0 (black) to 1 (white)."""

    name = "{name}"
    purpose = "to draw bright images"  # completes "a model that was trained ..."
    Settings = {cls}Settings
    version = {{"reward": name, "rule": "mean-grey-1"}}  # change it whenever the same image would score differently

    def score_image(self, image, prompt):
        from PIL import ImageStat

        return (ImageStat.Stat(image.convert("L")).mean[0] / 255) ** self.settings.power
'''
_TEST = """\
from PIL import Image
from {module} import {cls}


def test_black_grey_and_white():
    images = [Image.new("RGB", (8, 8), (grey, grey, grey)) for grey in (0, 51, 255)]
    assert [{cls}().score_image(image, None) for image in images] == [0, 0.2, 1]
"""


def write_package(name: str, folder: Path) -> list[Path]:
    """Write the package of a reward into a new folder and return its files.

    Args:
        name: the reward's name.
        folder: the package's folder, which must not exist.

    Raises:
        UserError: the name cannot be used, or the folder exists.
        StoreError: the disk refuses.
    """
    cls = "".join(part[:1].upper() + part[1:] for part in name.replace("_", "-").split("-"))
    if problem := name_problem(name):
        raise UserError(f"{name!r}: {problem}")
    if not name[-1].isalnum():
        raise UserError(f"{name!r}: pip accepts no package of that name: choose one that ends in a letter or a digit")
    if name in reward_names():
        raise UserError(f"there is already a reward {name!r} (gdro rewards lists them): choose another name")
    if keyword.iskeyword(cls):
        raise UserError(f"{name!r} is a word of Python: choose another name")
    if folder.exists() or folder.is_symlink():
        raise UserError(f"{folder} exists, and nothing is overwritten: choose another name or --folder")
    words = {"name": name, "module": f"{name.replace('-', '_')}_reward", "cls": cls}
    files = {
        "pyproject.toml": _PYPROJECT,
        f"{words['module']}.py": _MODULE,
        f"test_{words['module']}.py": _TEST,
    }
    with new_folder(folder) as partial:
        for file, text in files.items():
            (partial / file).write_text(text.format(**words), encoding="utf-8")
    return [folder / file for file in files]
