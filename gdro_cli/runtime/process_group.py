"""How processes share work that differs between them, and stop or fail as one."""

from __future__ import annotations

import abc
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, suppress
from typing import Any, NamedTuple, TypeVar

from gdro_cli.errors import EndedElsewhere, GdroError

_T = TypeVar("_T")


class _Failure(NamedTuple):
    """What a process sends to the others about its failure."""

    rank: int
    exit_code: int
    message: str


class ProcessGroup(abc.ABC):
    """The processes of one job, seen by one of them."""

    _shared: Exception | None = None
    """The failure that an inner ``together`` block has already sent, on its way up through the blocks around it."""

    @property
    @abc.abstractmethod
    def rank(self) -> int:
        """This process's number, 0 .. world - 1."""

    @property
    @abc.abstractmethod
    def world(self) -> int:
        """The number of processes."""

    @abc.abstractmethod
    def gather_objects(self, items: list[Any]) -> list[Any]:
        """Join the lists of all processes in order of rank; every process gets the result."""

    @property
    def is_main(self) -> bool:
        """Whether this is the one process that writes files and reports."""
        return self.rank == 0

    def share(self, items: Sequence[_T]) -> list[_T]:
        """This process's share of a list: every world-th item, starting at its rank."""
        return list(items[self.rank :: self.world])

    @contextmanager
    def together(self) -> Iterator[None]:
        """After the block, wait for all processes; if the block fails in one of them, it fails in all.

        All processes must run the block, and inside it they may only send to each other in an inner ``together``. If a
        process fails before an inner block, those that wait at the end of that block receive its failure.

        Raises:
            EndedElsewhere: the block failed in another process (or here, with a message that another one reports).
        """
        if self.world == 1:
            yield
            return
        try:
            yield
        except Exception as error:
            if error is self._shared:
                raise  # an inner block has sent it, and the others have also left that block
            failures: list[_Failure] = []
            with suppress(EndedElsewhere):  # the others are gone, so this process reports the error
                failures = self.gather_objects([_failure(error, self.rank)])
            self._shared = error
            if any(other.rank < self.rank and other.message == str(error) for other in failures):
                self._shared = EndedElsewhere(exit_code=failures[0].exit_code)
                raise self._shared from error
            raise
        failures = self.gather_objects([])
        if failures:
            self._shared = EndedElsewhere(exit_code=failures[0].exit_code)
            raise self._shared

    def take_turns(self, items: Sequence[_T], work: Callable[[_T], None]) -> None:
        """Do every item, each in one process; after each turn the processes wait for each other.

        ``items`` must be equal in all processes (see ``from_main``). Raises what ``together`` raises.
        """
        own = self.share(items)
        for turn in range(-(-len(items) // self.world)):
            with self.together():
                if turn < len(own):
                    work(own[turn])

    def from_main(self, make: Callable[[], _T]) -> _T:
        """A value that the main process makes and sends to all. Raises what ``together`` raises."""
        made: list[_T] = []
        with self.together():
            if self.is_main:
                made.append(make())
        value: _T = self.gather_objects(made)[0]
        return value

    @contextmanager
    def held_by_main(self, lock: AbstractContextManager[object]) -> Iterator[None]:
        """Inside the block the main process holds a lock for all of them. Raises what ``together`` raises."""
        with ExitStack() as stack:
            with self.together():
                if self.is_main:
                    stack.enter_context(lock)
            yield


def _failure(error: Exception, rank: int) -> _Failure:
    return _Failure(rank, error.exit_code if isinstance(error, GdroError) else 1, str(error))
