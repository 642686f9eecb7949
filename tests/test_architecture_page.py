"""docs/architecture.md: its floors are those of the import contracts, and it names every room and only what exists."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path
from pkgutil import resolve_name
from typing import Any

import pytest

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
CONTRACTS: dict[str, Any] = {
    contract["id"]: contract
    for contract in tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["importlinter"][
        "contracts"
    ]
}
FLOORS = [
    ("The floors of the package", "layers", ROOT / "gdro_cli"),
    ("The rooms of stages", "rooms", ROOT / "gdro_cli" / "stages"),
]
by_section = pytest.mark.parametrize(("title", "contract", "folder"), FLOORS, ids=["package", "stages"])


def section(title: str) -> str:
    return PAGE.split(f"## {title}\n")[1].split("\n## ")[0]


def names_of(line: str) -> list[str]:
    return [name.strip().removeprefix("gdro_cli.") for name in line.split("|")]


@by_section
def test_the_floors_are_those_of_the_contract(title: str, contract: str, folder: Path) -> None:
    drawn = [names_of(line) for line in section(title).splitlines() if line.startswith("    ")]
    assert drawn == [names_of(line) for line in CONTRACTS[contract]["layers"]]


@by_section
def test_every_room_has_its_sentence(title: str, contract: str, folder: Path) -> None:
    described = re.findall(r"^\| `(\w+)` \| \S", section(title), flags=re.MULTILINE)
    rooms = {path.stem for path in folder.iterdir() if path.suffix == ".py" or (path / "__init__.py").exists()}
    assert sorted(described) == sorted(rooms - {"__init__", "__main__"})


def test_what_the_page_names_exists() -> None:
    names = set(re.findall(r"gdro_cli(?:\.\w+)+", PAGE))
    assert len(names) > 10
    for name in names:
        resolve_name(name)
