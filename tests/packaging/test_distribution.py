"""What is shipped: the wheel runs outside the checkout and misses no data file; the sdist can build and test it."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest
from hatchling.builders.sdist import SdistBuilder
from hatchling.builders.wheel import WheelBuilder

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    (path,) = WheelBuilder(str(ROOT)).build(directory=str(folder), versions=["standard"])
    return Path(path)


def test_the_wheel_holds_every_file_of_the_package_and_the_recipes(wheel: Path) -> None:
    names = set(zipfile.ZipFile(wheel).namelist())
    package = {
        path.relative_to(ROOT).as_posix()
        for path in (ROOT / "gdro_cli").rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    assert package <= names
    assert {f"gdro_cli/recipes/{path.name}" for path in (ROOT / "recipes").glob("*.yaml")} <= names
    assert not [name for name in names if name.startswith(("tests/", "docs/"))]
    assert [name for name in names if name.endswith("licenses/LICENSE")]


def test_the_wheel_finds_its_recipes_outside_the_checkout(wheel: Path, tmp_path: Path) -> None:
    site = tmp_path / "site"
    zipfile.ZipFile(wheel).extractall(site)
    done = subprocess.run(
        [sys.executable, "-m", "gdro_cli", "recipes", "check"],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(site)},
        capture_output=True,
        text=True,
        check=True,
    )
    assert f"{site}/gdro_cli/recipes/ocr.yaml: correct" in done.stdout


def test_the_files_that_docker_is_given_build_the_same_wheel(wheel: Path, tmp_path: Path) -> None:
    """.dockerignore leaves out everything, then takes back names."""
    first, *names = (ROOT / ".dockerignore").read_text(encoding="utf-8").splitlines()[1:]
    assert first == "*"
    for name in (name.removeprefix("!") for name in names if name.startswith("!")):
        copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copy
        copy(ROOT / name, tmp_path / name)
    (path,) = WheelBuilder(str(tmp_path)).build(directory=str(tmp_path / "dist"), versions=["standard"])
    assert set(zipfile.ZipFile(path).namelist()) == set(zipfile.ZipFile(wheel).namelist())


def test_the_sdist_holds_what_building_and_testing_need(tmp_path: Path) -> None:
    (path,) = SdistBuilder(str(ROOT)).build(directory=str(tmp_path), versions=["standard"])
    with tarfile.open(path) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    files = [".dockerignore", "CHANGELOG.md", "Dockerfile", "LICENSE", "Makefile", "README.md", "compose.yaml"]
    files += ["constraints.txt", "mkdocs.yml", "pyproject.toml", ".ci/lowest.txt", ".ci/run"]
    files += [".github/workflows/ci.yml", "docs/demo.ipynb", "recipes/ocr.yaml", "gdro_cli/cli/app.py"]
    files += ["tests/packaging/test_distribution.py"]
    wanted = set(files)
    assert wanted <= names
