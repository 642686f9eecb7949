"""One scoring worker: how the parent starts its process, and what it does there.

A worker answers requests from a pipe, one at a time, and ignores signals: the parent handles them.
"""

from __future__ import annotations

import contextlib
import json
import multiprocessing
import os
import pickle
import signal
import sys
import threading
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from multiprocessing import resource_tracker
from multiprocessing.connection import Connection
from multiprocessing.context import SpawnProcess
from typing import Any

from gdro_cli.errors import GdroError, PrerequisiteError, StoreError, UserError
from gdro_cli.processes import only_gpu
from gdro_cli.rewards.base import ImageSource, PromptLike, Reward, Score, Scorer, in_scale, one_line

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
    while_loading: bool = False


@dataclass(frozen=True, slots=True)
class Request:
    """Images to score, and their prompts."""

    images: list[ImageSource]
    prompts: list[PromptLike]


def start_worker(scorer: Scorer, threads: int) -> tuple[SpawnProcess, Connection]:
    """Start a worker. It loads the scorer, sends ``Ready``, and answers each ``Request`` with scores or a ``Failure``.

    The worker sees only the GPU that this process uses.

    Raises:
        PrerequisiteError: the operating system refuses to start it, or the scorer cannot be pickled.
    """
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process: SpawnProcess | None = None
    try:
        content = pickle.dumps(scorer)  # the worker unpickles it once it can answer for what that raises
        process = context.Process(target=_work, args=(content, theirs), daemon=True, name="gdro-scoring")
        with _signals_blocked(), _environment(_variables(threads)):
            process.start()
    except BaseException as error:
        ours.close()
        if process is not None and process.pid is not None:
            process.kill()
        if isinstance(error, OSError):
            raise PrerequisiteError(
                f"a scoring worker cannot be started ({error.strerror or error}): try fewer workers (reward.workers)"
            ) from error
        if isinstance(error, pickle.PicklingError | AttributeError | TypeError):
            raise PrerequisiteError(
                f"{_called(scorer)} cannot be sent to its scoring processes ({one_line(error)}): it must be possible to"
                " pickle it before it is loaded"
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


def _work(content: bytes, pipe: Connection) -> None:
    """Unpickle and load the scorer, then answer requests until the parent closes the pipe or is gone.

    The worker leads a process group of its own, so that what its scorer starts ends with it. What the scorer prints
    goes to the error stream: standard output is for results.
    """
    for number in _SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    os.setpgid(0, 0)
    os.dup2(2, 1)
    own = os.getpid()
    threading.Thread(target=_end_with_parent, name="parent", daemon=True).start()
    with contextlib.suppress(*CONNECTION_LOST):
        scorer, answer = _load(content)
        while os.getpid() == own:  # a copy that the scorer has forked must not answer
            pipe.send(answer)
            if isinstance(answer, Failure) and answer.while_loading:
                return
            answer = _answer(scorer, pipe.recv_bytes())
        os._exit(0)


def _end_with_parent() -> None:
    """End this worker at once when the parent is gone, even if its scorer hangs."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        kill_group(os.getpid())
        os._exit(1)


def kill_group(leader: int) -> None:
    """Kill a worker and all processes that it has started."""
    with contextlib.suppress(ProcessLookupError, PermissionError):  # it has not become a leader yet, or all are gone
        os.killpg(leader, signal.SIGKILL)


def _load(content: bytes) -> tuple[Any, Any]:
    """The loaded scorer, and ``Ready`` or a ``Failure``."""
    scorer = None
    try:
        scorer = pickle.loads(content)
        scorer.load()
    except GdroError as error:
        return scorer, Failure(str(error), _plain_error(error), while_loading=True)
    except Exception as error:  # noqa: BLE001 - code of others may raise anything
        reason = f"{_called(scorer)} cannot be loaded ({one_line(error)}): correct it, or what it needs"
        return scorer, Failure(reason, PrerequisiteError(reason), while_loading=True)
    return scorer, Ready()


def _called(scorer: Any) -> str:
    name = getattr(scorer, "name", None)
    return f"the reward {name}" if isinstance(name, str) else "what scores"


def _plain_error(error: GdroError) -> GdroError:
    """The error as one of ours, since the parent may not be able to unpickle a class of a plug-in."""
    kinds = (UserError, PrerequisiteError, StoreError)
    return next((kind(str(error)) for kind in kinds if isinstance(error, kind)), PrerequisiteError(str(error)))


def _answer(scorer: Scorer, message: bytes) -> list[Score] | Failure:
    """The scores of one pickled ``Request``."""
    try:
        request: Request = pickle.loads(message)
        scores = list(scorer.score(request.images, request.prompts))
        if isinstance(scorer, Reward):
            scores = [in_scale(score, scorer) if type(score) is Score else score for score in scores]
    except GdroError as error:
        return Failure(str(error), _plain_error(error))
    except Exception as error:  # noqa: BLE001 - a defect on some images must not end the scoring of the others
        return Failure(f"the reward failed on this image: {one_line(error)}")
    if len(scores) != len(request.images):
        return Failure(f"the reward gave {len(scores)} scores for {len(request.images)} images")
    if types := {type(score).__name__ for score in scores if type(score) is not Score}:
        return Failure(f"the reward gave values of the type {', '.join(types)} instead of Score")
    # as JSON, since the parent may not be able to unpickle what a plug-in has put into the details
    return [replace(score, details=json.loads(json.dumps(dict(score.details)))) for score in scores]
