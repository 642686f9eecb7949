"""Make what a step needs while the step before it is computed."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Generic, TypeVar

_T = TypeVar("_T")


class Prefetch(Generic[_T]):
    """Makes the items of steps 0, 1, 2 ..., one step ahead of ``take``.

    Args:
        make: gives the item of a step, from the step's number alone; called in another thread.
        steps: number of steps.
    """

    def __init__(self, make: Callable[[int], _T], *, steps: int) -> None:
        self._make, self._steps = make, steps
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="prefetch")
        self._next: tuple[int, Future[_T]] | None = None

    def take(self, step: int) -> _T:
        """The item of ``step``; begins with the next one. Raises what ``make`` raised."""
        if self._next is not None and self._next[0] == step:
            future = self._next[1]
        else:
            future = self._pool.submit(self._make, step)
        self._next = (step + 1, self._pool.submit(self._make, step + 1)) if step + 1 < self._steps else None
        return future.result()

    def close(self) -> None:
        """Drop the items that were not taken."""
        self._pool.shutdown(wait=True, cancel_futures=True)
        self._next = None
