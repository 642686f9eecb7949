"""One scoring worker: how its process is started, and what it does there.

It answers tasks that come through a pipe, one at a time, and leaves all signals to its parent.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import pickle
import signal
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from multiprocessing import resource_tracker
from multiprocessing.connection import Connection
from multiprocessing.context import SpawnProcess

from gdro_cli.errors import GdroError, PrerequisiteError
from gdro_cli.rewards.base import ImageSource, PromptLike, Reward, Score, describe

_THREAD_VARIABLES = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")
_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
"""They reach every process of a group, where the parent alone decides what they mean."""
CONNECTION_LOST = (EOFError, BrokenPipeError, ConnectionResetError)
"""How a pipe says that the process at its other end is gone."""


@dataclass(frozen=True, slots=True)
class Ready:
    """A worker has loaded its reward."""


@dataclass(frozen=True, slots=True)
class Failure:
    """What a worker answers instead of scores."""

    reason: str
    error: GdroError | None = None
    """An error for the user, which ends the scoring."""


@dataclass(frozen=True, slots=True)
class Task:
    """Images to score, and their prompts."""

    images: list[ImageSource]
    prompts: list[PromptLike]


def start_worker(reward: Reward, threads: int) -> tuple[SpawnProcess, Connection]:
    """Start a process that loads the reward and answers every ``Task`` with scores or a ``Failure``; first ``Ready``.

    Raises:
        PrerequisiteError: the operating system refuses.
    """
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=_work, args=(reward, theirs), daemon=True, name="gdro-scoring")
    try:
        with _signals_held_back(), _threads_of_a_child(threads):
            process.start()
    except BaseException as error:
        ours.close()
        if process.pid is not None:
            process.kill()
        if isinstance(error, OSError):
            raise PrerequisiteError(
                f"a scoring worker cannot be started ({error.strerror or error}): try fewer workers (reward.workers)"
            ) from error
        raise
    finally:
        theirs.close()
    return process, ours


@contextlib.contextmanager
def _threads_of_a_child(threads: int) -> Iterator[None]:
    """Start a child with these threads: numerical libraries read the variables once, when they are imported, and that
    may be while the child unpickles its reward.
    """
    before = {variable: os.environ.get(variable) for variable in _THREAD_VARIABLES}
    os.environ.update(dict.fromkeys(_THREAD_VARIABLES, str(threads)))
    try:
        yield
    finally:
        for variable, value in before.items():
            if value is None:
                del os.environ[variable]
            else:
                os.environ[variable] = value


@contextlib.contextmanager
def _signals_held_back() -> Iterator[None]:
    """Start a child with its signals blocked, so that none can hit it before it ignores them.

    One that comes for this process in the meantime is delivered afterwards.
    """
    if not hasattr(signal, "pthread_sigmask"):
        yield
        return
    resource_tracker.ensure_running()  # starting it, as the first process does, would unblock the signals
    before = signal.pthread_sigmask(signal.SIG_BLOCK, _SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _work(reward: Reward, pipe: Connection) -> None:
    """A worker's life: load, then answer chunks until the parent closes the pipe or is gone."""
    for number in _SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, name="parent", daemon=True).start()
    with contextlib.suppress(*CONNECTION_LOST):
        try:
            reward.load()
        except GdroError as error:
            pipe.send(Failure(str(error), error))
            return
        pipe.send(Ready())
        while True:
            pipe.send(_answer(reward, pipe.recv_bytes()))


def _end_with_parent() -> None:
    """End at once when the parent is gone: a reward that hangs would not notice, and SIGTERM is ignored here."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def _answer(reward: Reward, message: bytes) -> list[Score] | Failure:
    """The scores of one pickled ``Task``."""
    try:
        task: Task = pickle.loads(message)
        scores = reward.score(task.images, task.prompts)
    except GdroError as error:
        return Failure(str(error), error)
    except Exception as error:  # noqa: BLE001 - a defect on some images must not end the others' scoring
        return Failure(f"the reward failed on this image: {describe(error)}")
    if len(scores) != len(task.images):
        return Failure(f"the reward gave {len(scores)} scores for {len(task.images)} images")
    return scores
