"""A cache folder of its own and one loaded OCR reward for all tests of this folder.

The folder is put on the path because worker processes import ``breaking_rewards`` by its name.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from gdro_cli.rewards.ocr.reward import OcrReward


@pytest.fixture(scope="session", autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The cache folder of the session, so that the tests neither read nor write the user's."""
    folder = tmp_path_factory.mktemp("cache")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("GDRO_CACHE", str(folder))
        yield folder


@pytest.fixture(scope="session")
def reward(cache: Path) -> OcrReward:
    """The real thing, loaded once."""
    made = OcrReward()
    made.load()
    return made
