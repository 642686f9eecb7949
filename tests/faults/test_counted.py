"""The campaign keeps its size: cases are added, not lost."""

from __future__ import annotations

import importlib

LEAST = 300
MODULES = ("answers", "pictures", "prompts", "recipes", "results", "runs", "stores")


def test_there_are_at_least_300_cases() -> None:
    counts = {name: len(importlib.import_module(f"test_bad_{name}").CASES) for name in MODULES}
    assert all(counts.values())
    assert sum(counts.values()) >= LEAST, counts
