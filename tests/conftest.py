"""What holds for all tests: one thread in each process."""

from __future__ import annotations

import pytest
import torch


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> None:
    """Bits depend on the number of threads; small matrices gain little by more, and other workers have the cores."""
    torch.set_num_threads(1)
