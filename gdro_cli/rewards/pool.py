"""Scoring on several processes.

Each worker process holds its own loaded scorer (a reward or a judge) and scores small chunks of images, one chunk at a
time, sent through a pipe of its own; so the parent always knows which images a worker that dies was scoring. Processes
and not threads: recognition libraries hold Python's lock for a part of the work, set up logging and other global state
when they are imported, and can crash; none of that touches the parent.
"""

from __future__ import annotations

import atexit
import contextlib
import math
import os
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from multiprocessing import connection
from multiprocessing.connection import Connection
from multiprocessing.context import SpawnProcess
from pathlib import Path
from types import TracebackType
from typing import Self

from gdro_cli.errors import Interrupted, PrerequisiteError
from gdro_cli.rewards.base import (
    ImageSource,
    PromptLike,
    Score,
    Scorer,
    UnreadableImageError,
    read_rgb,
)
from gdro_cli.rewards.worker import CONNECTION_LOST, Failure, Ready, Request, start_worker

LARGEST_CHUNK = 8
"""Images per message: enough to hide the transfer, few enough to lose little and to end together."""
ATTEMPTS = 2
"""How often an image is tried before it is missing."""
DEATHS_IN_A_ROW = 6
"""Workers that die with no image scored in between, after which scoring ends: it is not the images then."""
STOP_GRACE = 5.0
"""Seconds that scoring may still take after a request to stop: what is nearly done is not thrown away, and what hangs
(an endpoint without an answer, a large model that loads) holds nothing up."""
_LOOK_SECONDS = 0.2
_STOP_SECONDS = 5.0


class ScoringStopped(Interrupted):
    """A stop was requested, and the images were not finished in time; callers say what is kept."""


@dataclass(frozen=True, slots=True)
class _Chunk:
    """Images that are sent together, by their index, and how often they have been tried before."""

    indices: tuple[int, ...]
    attempt: int = 0


@dataclass(slots=True)
class _Worker:
    process: SpawnProcess
    pipe: Connection
    ready: bool = False
    chunk: _Chunk | None = None


def usable_cores() -> int:
    """How many CPU cores this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


class ScoringPool:
    """A scorer on several worker processes.

    Use it as a context manager: the workers start (and load, in the background) on entry and are gone on
    exit, also after an error. A worker that dies is replaced, and its images are tried once more, one by one;
    an image that fails again is missing with a reason. Workers ignore Ctrl-C, SIGTERM and SIGHUP, which are the
    parent's to handle, and end by themselves when the parent is gone.

    Args:
        scorer: not loaded yet; it is pickled and sent to the workers.
        workers: how many processes; ``None`` for one per usable core. They share the cores as threads.
        largest_chunk: images that a worker gets at a time at most.
    """

    def __init__(self, scorer: Scorer, *, workers: int | None = None, largest_chunk: int = LARGEST_CHUNK) -> None:
        if workers is not None and workers < 1:
            raise ValueError(f"a pool needs at least one worker, got {workers}")
        self._scorer = scorer
        self._largest_chunk = largest_chunk
        self._count = usable_cores() if workers is None else workers
        self._threads = max(1, usable_cores() // self._count)
        self._workers: list[_Worker] = []

    def __enter__(self) -> Self:
        """Start the workers; they load while the caller goes on.

        Raises:
            PrerequisiteError: the operating system refuses one; the others are gone then.
        """
        atexit.register(self.close)  # before multiprocessing's own end, which waits for daemons that ignore its SIGTERM
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

    def score(
        self,
        images: Sequence[ImageSource],
        prompts: Sequence[PromptLike],
        *,
        on_scored: Callable[[int], None] | None = None,
        stop: Callable[[], bool] | None = None,
    ) -> list[Score]:
        """Score ``images[i]`` (an image, or the path of one) for ``prompts[i]``; the order is kept.

        ``on_scored`` is called with the number of images that have just been finished. ``stop`` says whether a
        stop was requested; ``STOP_GRACE`` seconds later the pool gives up. An error or an interruption closes it.

        Raises:
            ScoringStopped: after a request to stop.
            UserError: a prompt cannot be scored with any image.
            PrerequisiteError: the workers cannot load the scorer.
            ValueError: not as many prompts as images, or the pool is not open.
        """
        if len(images) != len(prompts):
            raise ValueError(f"{len(images)} images but {len(prompts)} prompts")
        if not self._workers:
            raise ValueError("the pool is not open: use it in a `with` statement")
        try:
            batch = _Batch(images, prompts, largest_chunk=self._largest_chunk, on_scored=on_scored, stop=stop)
            return batch.run(self._workers, self._replace)
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """End the workers at once; they hold nothing that could be lost."""
        for worker in self._workers:
            worker.pipe.close()
            worker.process.kill()  # they ignore what is gentler
        for worker in self._workers:
            worker.process.join()
        self._workers = []
        atexit.unregister(self.close)

    def _replace(self, worker: _Worker) -> int | None:
        """Start another worker in place of one that died; returns the exit code of the dead one."""
        worker.pipe.close()
        worker.process.join(_STOP_SECONDS)
        if worker.process.is_alive():
            worker.process.kill()
            worker.process.join()
        process, pipe = start_worker(self._scorer, self._threads)
        code = worker.process.exitcode
        worker.process, worker.pipe, worker.ready, worker.chunk = process, pipe, False, None
        return code


class _Batch:
    """One call of ``ScoringPool.score``: what is still to do and what is done."""

    def __init__(
        self,
        images: Sequence[ImageSource],
        prompts: Sequence[PromptLike],
        *,
        largest_chunk: int,
        on_scored: Callable[[int], None] | None,
        stop: Callable[[], bool] | None,
    ) -> None:
        self._largest_chunk = largest_chunk
        self._images = images
        self._prompts = prompts
        self._on_scored = on_scored
        self._stop = stop
        self._give_up_at = math.inf
        self._scores: list[Score | None] = [None] * len(images)
        self._waiting: deque[_Chunk] = deque()
        self._deaths_in_a_row = 0

    def run(self, workers: Sequence[_Worker], replace: Callable[[_Worker], int | None]) -> list[Score]:
        """Hand chunks to workers and collect the scores until none is left."""
        # Four chunks for each worker at least, so that the workers finish at about the same time.
        size = max(1, min(self._largest_chunk, len(self._images) // (4 * len(workers))))
        everything = range(len(self._images))
        self._waiting.extend(_Chunk(tuple(everything[i : i + size])) for i in everything[::size])
        while True:
            for worker in workers:
                self._send(worker)
            busy = [worker for worker in workers if worker.chunk is not None or not worker.ready]
            if not self._waiting and not any(worker.chunk for worker in workers):
                return [score for score in self._scores if score is not None]
            self._give_up_in_time()
            answering = connection.wait(
                [worker.pipe for worker in busy], timeout=None if self._stop is None else _LOOK_SECONDS
            )
            for worker in busy:
                if worker.pipe in answering:
                    self._receive(worker, replace)

    def _give_up_in_time(self) -> None:
        """Raise ``ScoringStopped`` when a stop was requested ``STOP_GRACE`` seconds ago."""
        now = time.monotonic()
        if self._stop is not None and self._give_up_at == math.inf and self._stop():
            self._give_up_at = now + STOP_GRACE
        if now >= self._give_up_at:
            raise ScoringStopped("stopped while images were scored: run the command again to continue")

    def _send(self, worker: _Worker) -> None:
        """Give an idle worker its next chunk; images that cannot be decoded here are not sent."""
        while worker.ready and worker.chunk is None and self._waiting:
            chunk = self._waiting.popleft()
            images: dict[int, ImageSource] = {}
            for index in chunk.indices:
                try:
                    images[index] = _portable(self._images[index])
                except UnreadableImageError as error:
                    self._finish({index: Score(None, str(error))})
            if not images:
                continue
            worker.chunk = _Chunk(tuple(images), chunk.attempt)
            # A worker that is gone is noticed when its answer is awaited.
            with contextlib.suppress(*CONNECTION_LOST):
                worker.pipe.send(Request(list(images.values()), [self._prompts[index] for index in images]))

    def _receive(self, worker: _Worker, replace: Callable[[_Worker], int | None]) -> None:
        chunk = worker.chunk
        try:
            answer = worker.pipe.recv()
        except CONNECTION_LOST:
            self._died(started=worker.ready, chunk=chunk, code=replace(worker))
            return
        if isinstance(answer, Ready):
            worker.ready = True
            return
        worker.chunk = None
        self._deaths_in_a_row = 0
        if isinstance(answer, Failure):
            if answer.error is not None:
                raise answer.error
            self._try_again(chunk, answer.reason)
        elif chunk is not None:
            self._finish(dict(zip(chunk.indices, answer, strict=True)))

    def _died(self, *, started: bool, chunk: _Chunk | None, code: int | None) -> None:
        """Try a dead worker's images again. Raises ``PrerequisiteError`` where its death is not an image's fault."""
        if not started:
            raise PrerequisiteError(
                f"a scoring worker ended while it started (exit code {code}): look at the messages "
                f"above, and try fewer workers if memory is short"
            )
        self._deaths_in_a_row += 1
        if self._deaths_in_a_row >= DEATHS_IN_A_ROW:
            raise PrerequisiteError(
                f"{DEATHS_IN_A_ROW} scoring workers in a row have died at work (exit code {code}): try fewer "
                f"workers if memory is short, and check that the reward's packages belong together"
            )
        self._try_again(chunk, f"the scoring worker died on this image (exit code {code})")

    def _try_again(self, chunk: _Chunk | None, reason: str) -> None:
        """Queue the images of a failed chunk one by one, or give them up."""
        if chunk is None:
            return
        if chunk.attempt + 1 >= ATTEMPTS:
            self._finish({index: Score(None, reason) for index in chunk.indices})
        else:
            self._waiting.extend(_Chunk((index,), chunk.attempt + 1) for index in chunk.indices)

    def _finish(self, scores: dict[int, Score]) -> None:
        for index, score in scores.items():
            self._scores[index] = score
        if self._on_scored is not None:
            self._on_scored(len(scores))


def _portable(source: ImageSource) -> ImageSource:
    """A path as it is; an image decoded, so that a broken one fails here and not while it is pickled."""
    return source if isinstance(source, Path) else read_rgb(source)
