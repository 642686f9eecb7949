"""Every function and test that docs/method.md, docs/conventions.md and docs/baselines.md name exists."""

from __future__ import annotations

import importlib
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PAGES = ("docs/method.md", "docs/conventions.md", "docs/baselines.md")


def names(page: str, pattern: str) -> list[tuple[str, str]]:
    return re.findall(pattern, (ROOT / page).read_text(encoding="utf-8"))


@pytest.mark.parametrize("page", PAGES)
def test_functions_exist(page: str) -> None:
    functions = names(page, r"`(gdro_cli\.core\.\w+)\.(\w+)`")
    assert functions
    missing = [name for name in functions if not hasattr(importlib.import_module(name[0]), name[1])]
    assert missing == []


@pytest.mark.parametrize(("page", "count"), [("docs/method.md", 20), ("docs/baselines.md", 6)])
def test_tests_exist(page: str, count: int) -> None:
    tests = names(page, r"`(tests/core/\w+\.py)::(\w+)`")
    assert len(tests) > count
    missing = [name for name in tests if f"def {name[1]}(" not in (ROOT / name[0]).read_text(encoding="utf-8")]
    assert missing == []


def test_every_public_function_of_the_mathematics_is_on_the_page() -> None:
    """Each public function of flow, implicit and the losses is in the table, except the dtype helper."""
    page = (ROOT / "docs/method.md").read_text(encoding="utf-8")
    for module in ("flow", "implicit", "losses", "other_losses"):
        source = (ROOT / f"gdro_cli/core/{module}.py").read_text(encoding="utf-8")
        public = set(re.findall(r"^def ([a-z]\w*)\(", source, flags=re.MULTILINE)) - {"as_float"}
        assert [name for name in public if f"`gdro_cli.core.{module}.{name}`" not in page] == []
