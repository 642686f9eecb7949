"""The scoring processes of a mixture: each part has its own."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from types import TracebackType
from typing import Self

from gdro_cli.rewards.base import ImageSource, PromptLike, Score
from gdro_cli.rewards.mix import MixReward
from gdro_cli.rewards.pool import Pool


class MixedPool(Pool):
    """A pool for a mixture; the parts score one after the other.

    Args:
        reward: the mixture.
        pools: the processes of each of its parts by name.
    """

    def __init__(self, reward: MixReward, pools: Mapping[str, Pool]) -> None:
        self._reward, self._pools = reward, pools
        self._stack = ExitStack()

    def __enter__(self) -> Self:
        """Start the workers. Raises ``PrerequisiteError``."""
        with ExitStack() as stack:
            for pool in self._pools.values():
                stack.enter_context(pool)
            self._stack = stack.pop_all()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """End the workers."""
        self._stack.close()

    def reopen(self) -> None:
        """Start the workers again that an error has ended. Raises ``PrerequisiteError``."""
        for pool in self._pools.values():
            pool.reopen()

    @property
    def pids(self) -> tuple[int, ...]:
        """The process numbers of the workers."""
        return tuple(pid for pool in self._pools.values() for pid in pool.pids)

    def score(
        self,
        images: Sequence[ImageSource],
        prompts: Sequence[PromptLike],
        *,
        on_scored: Callable[[int], None] | None = None,
        stop: Callable[[], bool] | None = None,
    ) -> list[Score]:
        """As ``ScoringPool.score``; ``on_scored`` is called for the last part."""
        last = list(self._pools)[-1]
        scores = {
            name: pool.score(images, prompts, on_scored=on_scored if name == last else None, stop=stop)
            for name, pool in self._pools.items()
        }
        return self._reward.combined(scores)
