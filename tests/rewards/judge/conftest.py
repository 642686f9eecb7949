"""An endpoint on this machine, and quick second attempts."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from gdro_cli.rewards.judge import endpoint
from tests.support.judge_server import JudgeServer


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[JudgeServer]:
    """A running endpoint; no proxy of the environment comes between."""
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    monkeypatch.setattr(endpoint, "FIRST_PAUSE", 0.02)
    running = JudgeServer()
    yield running
    running.close()
