"""One scoring worker: how the parent starts its process, and what it does there.

A worker answers requests from a pipe, one at a time, and ignores signals: the parent handles them.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import pickle
import signal
import sys
import threading
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from multiprocessing import resource_tracker
from multiprocessing.connection import Connection
from multiprocessing.context import SpawnProcess

from gdro_cli.errors import GdroError, PrerequisiteError
from gdro_cli.processes import only_gpu
from gdro_cli.rewards.base import ImageSource, PromptLike, Score, Scorer, one_line

_THREAD_VARIABLES = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")
_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
"""They reach every process of a group, but only the parent acts on them."""
CONNECTION_LOST = (EOFError, BrokenPipeError, ConnectionResetError)
"""What a pipe raises if the process at its other end is gone."""


@dataclass(frozen=True, slots=True)
class Ready:
    """The answer of a worker that has loaded its scorer."""


@dataclass(frozen=True, slots=True)
class Failure:
    """A worker's answer in place of scores."""

    reason: str
    error: GdroError | None = None
    """An error for the user, which ends the scoring."""


@dataclass(frozen=True, slots=True)
class Request:
    """Images to score, and their prompts."""

    images: list[ImageSource]
    prompts: list[PromptLike]


def start_worker(scorer: Scorer, threads: int) -> tuple[SpawnProcess, Connection]:
    """Start a worker. It loads the scorer, sends ``Ready``, and answers each ``Request`` with scores or a ``Failure``.

    The worker sees only the GPU that this process uses.

    Raises:
        PrerequisiteError: the operating system refuses to start it.
    """
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=_work, args=(scorer, theirs), daemon=True, name="gdro-scoring")
    try:
        with _signals_blocked(), _environment(_variables(threads)):
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


def _variables(threads: int) -> dict[str, str]:
    """A worker's environment variables: its threads, and its parent's GPU.

    Libraries read them when they are imported, which may be while the worker unpickles its scorer.
    """
    variables = dict.fromkeys(_THREAD_VARIABLES, str(threads))
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_initialized():
        variables["CUDA_VISIBLE_DEVICES"] = only_gpu(torch.cuda.current_device())
    return variables


@contextlib.contextmanager
def _environment(variables: Mapping[str, str]) -> Iterator[None]:
    """Set environment variables for a child that is started in the block."""
    before = {variable: os.environ.get(variable) for variable in variables}
    os.environ.update(variables)
    try:
        yield
    finally:
        for variable, value in before.items():
            if value is None:
                del os.environ[variable]
            else:
                os.environ[variable] = value


@contextlib.contextmanager
def _signals_blocked() -> Iterator[None]:
    """Block signals for a child that is started in the block, so that none can reach it before it ignores them.

    A signal that arrives for this process in the meantime is delivered afterwards.
    """
    resource_tracker.ensure_running()  # the first process starts it, which would unblock the signals
    before = signal.pthread_sigmask(signal.SIG_BLOCK, _SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _work(scorer: Scorer, pipe: Connection) -> None:
    """Load the scorer, then answer requests until the parent closes the pipe or is gone."""
    for number in _SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, name="parent", daemon=True).start()
    with contextlib.suppress(*CONNECTION_LOST):
        try:
            scorer.load()
        except GdroError as error:
            pipe.send(Failure(str(error), error))
            return
        pipe.send(Ready())
        while True:
            pipe.send(_answer(scorer, pipe.recv_bytes()))


def _end_with_parent() -> None:
    """End this worker at once when the parent is gone, even if its scorer hangs."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def _answer(scorer: Scorer, message: bytes) -> list[Score] | Failure:
    """The scores of one pickled ``Request``."""
    try:
        request: Request = pickle.loads(message)
        scores = list(scorer.score(request.images, request.prompts))
    except GdroError as error:
        return Failure(str(error), error)
    except Exception as error:  # noqa: BLE001 - a defect on some images must not end the scoring of the others
        return Failure(f"the reward failed on this image: {one_line(error)}")
    if len(scores) != len(request.images):
        return Failure(f"the reward gave {len(scores)} scores for {len(request.images)} images")
    if types := {type(score).__name__ for score in scores if not isinstance(score, Score)}:
        return Failure(f"the reward gave values of the type {', '.join(types)} instead of Score")
    return scores
