"""What `make lowest` installs: the lower bounds of pyproject.toml, of the package and of extras that tests use."""

from __future__ import annotations

import tomllib
from pathlib import Path

from packaging.requirements import Requirement

ROOT = Path(__file__).resolve().parents[2]


def test_each_lower_bound_is_what_make_lowest_installs() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    extras = project["optional-dependencies"]
    tested = {line for name, lines in extras.items() if name != "dev" for line in lines} & set(extras["dev"])
    bounds = {}
    for requirement in map(Requirement, [*project["dependencies"], *tested]):
        (bounds[requirement.name],) = (
            bound.version.replace("*", "0") for bound in requirement.specifier if bound.operator in (">=", "==")
        )
    lines = (ROOT / ".ci" / "lowest.txt").read_text(encoding="utf-8").splitlines()
    assert dict(line.split("==") for line in lines if not line.startswith("#")) == bounds
