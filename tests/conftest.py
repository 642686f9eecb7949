"""What holds for all tests: one thread in each process, and signals as a shell gives them to a command."""

from __future__ import annotations

import signal
from collections.abc import Iterator

import pytest
import torch

from tests.support import shared

SLOW_FIXTURES = {"finished", "server"}
"""Fixtures that train or start a server: each test that uses one is slow."""


@pytest.hookimpl(tryfirst=True)  # before pytest leaves out what `-m` does not name
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark the tests that are slow by what they use."""
    for item in items:
        if not SLOW_FIXTURES.isdisjoint(getattr(item, "fixturenames", ())):
            item.add_marker(pytest.mark.slow)


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> None:
    """Bits depend on the number of threads; small matrices gain little by more, and other workers have the cores."""
    torch.set_num_threads(1)


@pytest.fixture(scope="session", autouse=True)
def no_signal_is_ignored() -> None:
    """Those that tests run under (``nohup``, a job in the background of a script) may be, and children inherit it."""
    for number, usual in ((signal.SIGINT, signal.default_int_handler), (signal.SIGHUP, signal.SIG_DFL)):
        if signal.getsignal(number) == signal.SIG_IGN:
            signal.signal(number, usual)


@pytest.fixture(scope="module", autouse=True)
def shared_folders_stay_as_they_are() -> Iterator[None]:
    """Other tests, also of other processes, read them: a test that changes a file copies the folder first."""
    yield
    if changed := shared.changes():
        pytest.fail(f"a test changed what others share, it needs a copy: {', '.join(changed)}")
