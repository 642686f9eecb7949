"""Scoring processes that wait, loaded, for the next job: starting them is most of what a small job costs."""

from __future__ import annotations

import pickle
from collections.abc import Iterator
from contextlib import contextmanager
from types import TracebackType
from typing import Self

import pytest

from gdro_cli.rewards.base import Scorer
from gdro_cli.rewards.pool import LARGEST_CHUNK, ScoringPool
from gdro_cli.stages.setup import scorers

MOST = 3
"""Pools that wait at the same time; each of their processes holds some 300 MB."""


class WarmPool(ScoringPool):
    """A pool that is not closed on exit, except after an error: its workers may be in the middle of something then."""

    def __enter__(self) -> Self:
        return self if self._workers else super().__enter__()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is not None:
            self.close()


@contextmanager
def warm_pools() -> Iterator[None]:
    """Jobs of this process get the workers of the last one whose scorer and settings were the same."""
    pools: dict[tuple[object, ...], WarmPool] = {}

    def warm_pool(
        scorer: Scorer,
        *,
        workers: int | None = None,
        largest_chunk: int | None = LARGEST_CHUNK,
        timeout: float | None = None,
    ) -> ScoringPool:
        if not type(scorer).__module__.startswith(("gdro_cli.", "tests.")):  # a plug-in, whose code tests change
            return ScoringPool(scorer, workers=workers, largest_chunk=largest_chunk, timeout=timeout)
        key = (pickle.dumps(scorer), workers, largest_chunk, timeout)
        pool = pools.pop(key, None) or WarmPool(scorer, workers=workers, largest_chunk=largest_chunk, timeout=timeout)
        pools[key] = pool  # the latest is the last
        for old in list(pools)[:-MOST]:
            pools.pop(old).close()
        return pool

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(scorers, "ScoringPool", warm_pool)
        yield
    for pool in pools.values():
        pool.close()
