"""A cache folder and one loaded OCR reward, shared by all tests of this folder."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from gdro_cli.rewards.ocr.reward import OcrReward


@pytest.fixture(scope="session", autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The session's own cache folder: the tests neither read nor write the user's."""
    folder = tmp_path_factory.mktemp("cache")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("GDRO_CACHE", str(folder))
        yield folder


@pytest.fixture(scope="session")
def reward(cache: Path) -> OcrReward:
    """The real OCR reward, loaded once."""
    loaded = OcrReward()
    loaded.load()
    return loaded
