"""A cache of the session's own and a small store; nothing here needs the network."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest


@pytest.fixture(scope="session", autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The session's cache folder."""
    folder = tmp_path_factory.mktemp("cache")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("GDRO_CACHE", str(folder))
        yield folder


@pytest.fixture(scope="session")
def finished_store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A complete store, which tests must not change."""
    from tests.support import small_store

    return small_store.make(tmp_path_factory.mktemp("stores") / "store")


@pytest.fixture
def store(finished_store: Path, tmp_path: Path) -> Path:
    """A copy of it, which a test may damage."""
    return shutil.copytree(finished_store, tmp_path / "store")
