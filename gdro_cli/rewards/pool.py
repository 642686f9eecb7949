"""Scoring on several processes.

Each worker process loads its own scorer (a reward or a judge). The parent sends it small chunks of images, one at a
time, through a pipe of its own, and so always knows which images a worker was scoring when it died.

The workers are processes, not threads, because recognition libraries hold Python's global lock for part of the work,
change logging and other global state when they are imported, and can crash. None of that affects the parent.
"""

from __future__ import annotations

import atexit
import contextlib
import math
import os
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from multiprocessing import connection
from multiprocessing.connection import Connection
from multiprocessing.context import SpawnProcess
from pathlib import Path
from types import TracebackType
from typing import Protocol, Self

from gdro_cli.errors import Interrupted, PrerequisiteError
from gdro_cli.rewards.base import ImageSource, PromptLike, Score, Scorer, UnreadableImageError, read_rgb
from gdro_cli.rewards.worker import CONNECTION_LOST, Failure, Ready, Request, kill_group, start_worker

LARGEST_CHUNK = 8
"""Images per message: enough to hide the transfer time, few enough that a crash loses little."""
ATTEMPTS = 2
"""How often an image is tried before its score is missing."""
DEATHS_IN_A_ROW = 6
"""Workers that may die with no image scored in between. More have another cause than the images."""
STOP_GRACE = 5.0
"""Seconds that scoring may continue after a request to stop. Work that is nearly done is kept, and work that hangs (an
endpoint without an answer, a large model that loads) does not delay the stop for long."""
_POLL_SECONDS = 0.2
_EXIT_SECONDS = 5.0


class ScoringStopped(Interrupted):
    """A stop was requested, and the images were not finished in time. The caller reports what is kept."""


@dataclass(frozen=True, slots=True)
class _Chunk:
    """Indices of images that are sent together, and how often they have been tried before."""

    indices: tuple[int, ...]
    attempt: int = 0


@dataclass(slots=True)
class _Worker:
    process: SpawnProcess
    pipe: Connection
    ready: bool = False
    chunk: _Chunk | None = None
    deadline: float = math.inf
    """Monotonic time at which it must have scored its chunk."""

    @property
    def hangs(self) -> bool:
        return time.monotonic() >= self.deadline


def usable_cores() -> int:
    """How many CPU cores this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


class Pool(Protocol):
    """Scoring processes, which live inside a ``with`` statement; see ``ScoringPool``."""

    def __enter__(self) -> Self:
        """Start the workers. Raises ``PrerequisiteError``."""
        ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """End the workers."""
        ...

    def reopen(self) -> None:
        """Start the workers again that an error has ended. Raises ``PrerequisiteError``."""
        ...

    @property
    def pids(self) -> tuple[int, ...]:
        """The process numbers of the workers."""
        ...

    def score(
        self,
        images: Sequence[ImageSource],
        prompts: Sequence[PromptLike],
        *,
        on_scored: Callable[[int], None] | None = None,
        stop: Callable[[], bool] | None = None,
    ) -> list[Score]:
        """Score ``images[i]`` for ``prompts[i]``, in order."""
        ...


class ScoringPool(Pool):
    """A scorer on several worker processes.

    Use it as a context manager: the workers start on entry, load in the background, and are gone on exit, also after an
    error. A worker that dies is replaced, and its images are tried once more, one by one; an image that fails again is
    missing with a reason. Workers ignore Ctrl-C, SIGTERM and SIGHUP, which the parent handles, and end by themselves
    when the parent is gone.

    Args:
        scorer: not loaded; it is pickled and sent to the workers.
        workers: number of processes; ``None`` for one per usable core. The cores are divided among them as threads.
        largest_chunk: the most images that a worker gets at a time; ``None`` for all at once, divided equally.
        timeout: seconds that a worker may take for each image of a chunk; one that takes longer is replaced as if it
            had died. ``None`` for no limit.
    """

    def __init__(
        self,
        scorer: Scorer,
        *,
        workers: int | None = None,
        largest_chunk: int | None = LARGEST_CHUNK,
        timeout: float | None = None,
    ) -> None:
        if workers is not None and workers < 1:
            raise ValueError(f"a pool needs at least one worker, got {workers}")
        self._scorer = scorer
        self._largest_chunk = largest_chunk
        self._timeout = timeout
        self._count = usable_cores() if workers is None else workers
        self._threads = max(1, usable_cores() // self._count)
        self._workers: list[_Worker] = []

    def __enter__(self) -> Self:
        """Start the workers; they load while the caller continues.

        Raises:
            PrerequisiteError: the operating system refuses to start a worker; those already started are ended.
        """
        atexit.register(self.close)  # runs before multiprocessing's own, which waits for daemons that ignore SIGTERM
        try:
            for _ in range(self._count):
                self._workers.append(_Worker(*start_worker(self._scorer, self._threads)))
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """End the workers."""
        self.close()

    def reopen(self) -> None:
        """Start the workers again if an error has closed the pool. Raises as entering it does."""
        if not self._workers:
            self.__enter__()

    @property
    def pids(self) -> tuple[int, ...]:
        """The process numbers of the workers."""
        return tuple(worker.process.pid for worker in self._workers if worker.process.pid is not None)

    def score(
        self,
        images: Sequence[ImageSource],
        prompts: Sequence[PromptLike],
        *,
        on_scored: Callable[[int], None] | None = None,
        stop: Callable[[], bool] | None = None,
    ) -> list[Score]:
        """Score ``images[i]`` (an image, or the path of one) for ``prompts[i]``, in order.

        An error or an interruption closes the pool.

        Args:
            images: the images.
            prompts: as many prompts.
            on_scored: called with the number of images that have just been finished.
            stop: says whether a stop was requested; the pool gives up ``STOP_GRACE`` seconds later.

        Raises:
            ScoringStopped: after a request to stop.
            UserError: no image can be scored for one of the prompts.
            PrerequisiteError: the workers cannot load the scorer, or keep dying.
            ValueError: the numbers of images and prompts differ, or the pool is not open.
        """
        if len(images) != len(prompts):
            raise ValueError(f"{len(images)} images but {len(prompts)} prompts")
        if not self._workers:
            raise ValueError("the pool is not open: use it in a `with` statement")
        try:
            batch = _Batch(images, prompts, self._largest_chunk, self._timeout, self._replace, on_scored, stop)
            return batch.run(self._workers)
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """End the workers at once; they hold nothing that could be lost."""
        for worker in self._workers:
            worker.pipe.close()
            _kill(worker)  # they ignore SIGTERM
        for worker in self._workers:
            worker.process.join()
        self._workers = []
        atexit.unregister(self.close)

    def _replace(self, worker: _Worker) -> int | None:
        """Start a worker in place of one that died or hangs; return the exit code of the old one."""
        worker.pipe.close()
        worker.process.join(0 if worker.hangs else _EXIT_SECONDS)
        _kill(worker)  # does nothing if it has ended, except to the processes that it has started
        worker.process.join()
        code = worker.process.exitcode
        worker.process, worker.pipe = start_worker(self._scorer, self._threads)
        worker.ready, worker.chunk, worker.deadline = False, None, math.inf
        return code


@dataclass(slots=True)
class _Batch:
    """One call of ``ScoringPool.score``: the images that wait, and the scores so far."""

    images: Sequence[ImageSource]
    prompts: Sequence[PromptLike]
    largest_chunk: int | None
    timeout: float | None
    replace: Callable[[_Worker], int | None]
    """Replaces a dead worker, and returns its exit code."""
    on_scored: Callable[[int], None] | None
    stop: Callable[[], bool] | None
    give_up_at: float = math.inf
    """Monotonic time at which a requested stop ends the scoring."""
    deaths_in_a_row: int = 0
    waiting: deque[_Chunk] = field(default_factory=deque)
    scores: dict[int, Score] = field(default_factory=dict)

    def run(self, workers: Sequence[_Worker]) -> list[Score]:
        """Send chunks to the workers and collect the scores until no image is left."""
        if self.largest_chunk is None:
            size = max(1, math.ceil(len(self.images) / len(workers)))
        else:  # At least four chunks per worker, so that all workers finish at about the same time.
            size = max(1, min(self.largest_chunk, len(self.images) // (4 * len(workers))))
        indices = range(len(self.images))
        self.waiting.extend(_Chunk(tuple(indices[i : i + size])) for i in indices[::size])
        while True:
            for worker in workers:
                self._send(worker)
            if not self.waiting and not any(worker.chunk for worker in workers):
                return [self.scores[index] for index in indices]
            self._give_up_in_time()
            busy = [worker for worker in workers if worker.chunk is not None or not worker.ready]
            answering = connection.wait([worker.pipe for worker in busy], timeout=_POLL_SECONDS)
            for worker in busy:
                if worker.pipe in answering:
                    self._receive(worker)
                elif not worker.process.is_alive() and not worker.pipe.poll():
                    # its pipe is still open in a process that it has forked
                    self._died(started=worker.ready, chunk=worker.chunk, code=self.replace(worker))
                elif worker.hangs:
                    self._took_too_long(worker)

    def _give_up_in_time(self) -> None:
        """Raise ``ScoringStopped`` if a stop was requested ``STOP_GRACE`` seconds ago."""
        now = time.monotonic()
        if self.stop is not None and self.give_up_at == math.inf and self.stop():
            self.give_up_at = now + STOP_GRACE
        if now >= self.give_up_at:
            raise ScoringStopped("stopped while images were scored: run the command again to continue")

    def _send(self, worker: _Worker) -> None:
        """Send an idle worker its next chunk, without the images that cannot be decoded here."""
        while worker.ready and worker.chunk is None and self.waiting:
            chunk = self.waiting.popleft()
            images: dict[int, ImageSource] = {}
            for index in chunk.indices:
                try:
                    images[index] = _picklable(self.images[index])
                except UnreadableImageError as error:
                    self._finish({index: Score(None, str(error))})
            if not images:
                continue
            worker.chunk = _Chunk(tuple(images), chunk.attempt)
            if self.timeout is not None:
                worker.deadline = time.monotonic() + self.timeout * len(images)
            # _receive notices a worker that has died.
            with contextlib.suppress(*CONNECTION_LOST):
                worker.pipe.send(Request(list(images.values()), [self.prompts[index] for index in images]))

    def _receive(self, worker: _Worker) -> None:
        chunk = worker.chunk
        try:
            answer = worker.pipe.recv()
        except CONNECTION_LOST:
            self._died(started=worker.ready, chunk=chunk, code=self.replace(worker))
            return
        if isinstance(answer, Ready):
            worker.ready = True
            return
        worker.chunk, worker.deadline = None, math.inf
        self.deaths_in_a_row = 0
        if isinstance(answer, Failure):
            if answer.error is not None:
                raise answer.error
            self._retry(chunk, answer.reason)
        elif chunk is not None:
            self._finish(dict(zip(chunk.indices, answer, strict=True)))

    def _died(self, *, started: bool, chunk: _Chunk | None, code: int | None) -> None:
        """Retry a dead worker's images. Raises ``PrerequisiteError`` if the images are not the cause of its death."""
        if not started:
            raise PrerequisiteError(
                f"a scoring worker ended while it started (exit code {code}): look at the messages "
                f"above, and try fewer workers if memory is short"
            )
        self.deaths_in_a_row += 1
        if self.deaths_in_a_row >= DEATHS_IN_A_ROW:
            raise PrerequisiteError(
                f"{DEATHS_IN_A_ROW} scoring workers in a row died at work (exit code {code}): try fewer "
                f"workers if memory is short, and check that the versions of the reward's packages fit together"
            )
        self._retry(chunk, f"the scoring worker died on this image (exit code {code})")

    def _took_too_long(self, worker: _Worker) -> None:
        """Replace a worker that hangs, and retry its images. Raises ``PrerequisiteError`` if all of them hang."""
        chunk = worker.chunk
        self.replace(worker)
        self.deaths_in_a_row += 1
        if self.deaths_in_a_row >= DEATHS_IN_A_ROW:
            raise PrerequisiteError(
                f"the reward took longer than {self.timeout:g} s for each of {DEATHS_IN_A_ROW} images in a row: raise"
                " reward.timeout, or correct the reward"
            )
        self._retry(chunk, f"the reward took longer than {self.timeout:g} s on this image (reward.timeout)")

    def _retry(self, chunk: _Chunk | None, reason: str) -> None:
        """Queue the images of a failed chunk one by one, or give them up after the last attempt."""
        if chunk is None:
            return
        if chunk.attempt + 1 >= ATTEMPTS:
            self._finish({index: Score(None, reason) for index in chunk.indices})
        else:
            self.waiting.extend(_Chunk((index,), chunk.attempt + 1) for index in chunk.indices)

    def _finish(self, scores: dict[int, Score]) -> None:
        self.scores |= scores
        if self.on_scored is not None:
            self.on_scored(len(scores))


def _kill(worker: _Worker) -> None:
    if worker.process.pid is not None:
        kill_group(worker.process.pid)
    worker.process.kill()


def _picklable(source: ImageSource) -> ImageSource:
    """A path unchanged; an image decoded, so that a corrupt one fails here and not while it is pickled."""
    return source if isinstance(source, Path) else read_rgb(source)
