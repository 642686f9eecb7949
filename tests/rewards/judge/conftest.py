"""A judge's endpoint on this machine."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.support.judge_server import JudgeServer


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[JudgeServer]:
    """A running endpoint that is reached without the environment's proxy."""
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    running = JudgeServer()
    yield running
    running.close()
