"""Processes that fail, stop and wait as one; here threads that meet at a barrier, so that a test detects a hang."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import pytest

from gdro_cli.errors import EndedElsewhere, GdroError, StoreError, UserError
from gdro_cli.runtime.process_group import ProcessGroup

PATIENCE = 10.0
"""Seconds until a process that waits for another counts as hanging."""


class Post:
    """The lists that the threads send each other."""

    def __init__(self, world: int) -> None:
        self.world = world
        self.barrier = threading.Barrier(world, timeout=PATIENCE)
        self.lists: dict[int, list[Any]] = {}


class Member(ProcessGroup):
    """One thread's view of the group."""

    def __init__(self, post: Post, rank: int) -> None:
        self._post, self._rank = post, rank
        self.messages = 0

    @property
    def rank(self) -> int:
        return self._rank

    @property
    def world(self) -> int:
        return self._post.world

    def gather_objects(self, items: list[Any]) -> list[Any]:
        self.messages += 1
        self._post.lists[self.rank] = items
        self._post.barrier.wait()
        joined = [item for rank in range(self.world) for item in self._post.lists[rank]]
        self._post.barrier.wait()
        return joined


def carry_out(work: Callable[[Member], object], world: int = 2) -> list[Exception | None]:
    """Do ``work`` in every member; returns how each ended."""
    post = Post(world)
    members = [Member(post, rank) for rank in range(world)]
    ends: list[Exception | None] = [None] * world

    def run(member: Member) -> None:
        try:
            work(member)
        except Exception as error:  # noqa: BLE001 (the test checks how a member ends)
            ends[member.rank] = error

    threads = [threading.Thread(target=run, args=[member]) for member in members]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not post.barrier.broken, "a process waited in vain"
    assert len({member.messages for member in members}) == 1
    return ends


def messages(ends: Sequence[Exception | None]) -> list[tuple[str, int]]:
    """The message and exit code of each process."""
    assert all(isinstance(end, GdroError) for end in ends)
    return [(str(end), end.exit_code) for end in ends if isinstance(end, GdroError)]


@pytest.mark.parametrize("failing", [0, 1])
def test_a_failure_in_one_process_ends_all(failing: int) -> None:
    def work(group: Member) -> None:
        with group.together():
            if group.rank == failing:
                raise StoreError("the disk is full")

    words = messages(carry_out(work))
    assert words[failing] == ("the disk is full", 4)
    assert words[1 - failing] == ("", 4)  # the failing process gives the reason


def test_one_process_reports_what_fails_in_all() -> None:
    def work(group: Member) -> None:
        with group.together():
            raise UserError("no such model")

    assert messages(carry_out(work, world=3)) == [("no such model", 2), ("", 2), ("", 2)]


@pytest.mark.parametrize("failing", [0, 1])
@pytest.mark.parametrize("moment", ["before", "inside", "after", "none"])
def test_blocks_inside_blocks(moment: str, failing: int) -> None:
    """Wherever one process fails, all leave both blocks after the same number of messages."""

    def work(group: Member) -> None:
        def fail(now: str) -> None:
            if moment == now and group.rank == failing:
                raise StoreError(now)

        with group.together():
            fail("before")
            with group.together():
                fail("inside")
            assert group.from_main(lambda: 7) == 7
            fail("after")

    ends = carry_out(work)
    if moment == "none":
        assert ends == [None, None]
        return
    words = messages(ends)
    assert words[failing] == (moment, 4) and words[1 - failing] == ("", 4)


def test_turns_end_after_a_failure() -> None:
    done: list[tuple[int, int]] = []

    def work(group: Member) -> None:
        def do(item: int) -> None:
            if item == 3:
                raise StoreError("item 3")
            done.append((group.rank, item))

        group.take_turns(range(5), do)

    assert messages(carry_out(work)) == [("", 4), ("item 3", 4)]
    assert sorted(done) == [(0, 0), (0, 2), (1, 1)]  # the last turn, of one item alone, was not begun


def test_uneven_turns_wait_for_each_other() -> None:
    done: list[int] = []
    assert carry_out(lambda group: group.take_turns(range(5), done.append), world=3) == [None] * 3
    assert sorted(done) == [0, 1, 2, 3, 4]


def test_a_lock_is_held_by_the_main_process_for_all() -> None:
    held: list[str] = []

    @contextmanager
    def lock() -> Iterator[None]:
        held.append("taken")
        try:
            yield
        finally:
            held.append("left")

    def work(group: Member) -> None:
        with group.held_by_main(lock()), group.together():
            assert held == ["taken"]
            if group.rank == 1:
                raise StoreError("damaged")

    assert messages(carry_out(work)) == [("", 4), ("damaged", 4)]
    assert held == ["taken", "left"]

    @contextmanager
    def busy() -> Iterator[None]:
        raise StoreError("in use")
        yield

    def never(group: Member) -> None:
        with group.held_by_main(busy()):
            raise AssertionError("not reached")

    assert messages(carry_out(never)) == [("in use", 4), ("", 4)]


def test_lost_processes_do_not_hide_the_error() -> None:
    class Alone(Member):
        def gather_objects(self, items: list[Any]) -> list[Any]:
            raise EndedElsewhere("lost the others")

    with pytest.raises(StoreError, match="the disk is full"), Alone(Post(2), 0).together():
        raise StoreError("the disk is full")
