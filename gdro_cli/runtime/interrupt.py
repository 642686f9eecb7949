"""Stop at the next safe point instead of in the middle of something."""

from __future__ import annotations

import os
import signal
import stat
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

from gdro_cli.errors import Interrupted

STOPPING = "stopping at the next safe point; press Ctrl-C again to stop at once"
"""What a stage reports when a stop is requested."""

LAUNCHER = "GDRO_LAUNCHER"
"""Environment variable with the process number of the process that started a group."""

_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
_LOOK_SECONDS = 0.5

_Handler = Callable[[int, FrameType | None], None]


class StoppedBySignal(KeyboardInterrupt):
    """A signal that stops the work at once; like Ctrl-C's own exception it passes by whoever handles errors."""


@contextmanager
def ended_by_signals() -> Iterator[None]:
    """While a command runs, Ctrl-C, SIGTERM and a closed terminal (SIGHUP) end it with a sentence.

    Until ``work_begins`` nothing is held and nothing is half written: the process says so and exits. An exception would
    be raised inside the libraries that are being imported, some of which report it as a failure of their own. From then
    on ``StoppedBySignal`` is raised, so that locks and unfinished files go; a ``StopFlag`` waits for a safe point.
    """
    before = _handle(_exit)
    try:
        yield
    finally:
        _restore(before)


def work_begins() -> None:
    """Call it when all slow imports are done, before the first lock or file; see ``ended_by_signals``."""
    if signal.getsignal(signal.SIGTERM) is _exit:
        _handle(_raise)


def stopped_at_once(error: BaseException) -> str:
    """The message for a ``KeyboardInterrupt``."""
    name = str(error) if isinstance(error, StoppedBySignal) else "SIGINT"
    return f"stopped at once by {name}; what was finished is kept: run the same command again to continue"


class StopFlag:
    """While the block runs, the first Ctrl-C, SIGTERM or SIGHUP only raises a flag; a second Ctrl-C stops at once.

    A stop is requested of all blocks that are open, inner and outer. Outside Python's main thread, which alone receives
    signals, the flag works but must be set by hand.

    Args:
        on_request: called once when the flag of the innermost block goes up, e.g. to tell the user what happens next.
    """

    _open: list[StopFlag] = []  # noqa: RUF012 (of the process, innermost last)

    def __init__(self, on_request: Callable[[], None] | None = None) -> None:
        self.requested = False
        self._on_request = on_request
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> StopFlag:
        self._before = _handle(self._on_signal)
        if self._before:
            self.requested |= any(flag.requested for flag in self._open)
            self._open.append(self)
        return self

    def __exit__(self, *_: object) -> None:
        if self._before:
            self._open.remove(self)
            _restore(self._before)
            for outer in self._open:  # `requested` may have been set by hand
                outer.requested |= self.requested

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        _leave_closed_terminal(number)
        if self.requested and number == signal.SIGINT:
            raise StoppedBySignal(signal.SIGINT.name)
        is_first = not self.requested
        for flag in (self, *self._open):
            flag.requested = True
        if is_first and self._on_request is not None:
            self._on_request()

    def check(self, message: str) -> None:
        """Stop here if a stop was requested; call it where everything so far is on the disk.

        Args:
            message: what is kept and how to continue.

        Raises:
            Interrupted: a stop was requested.
        """
        if self.requested:
            raise Interrupted(message)


def stop_with_launcher() -> None:
    """Ask this process to stop (SIGTERM) when the launcher that started it is gone.

    A launcher that is killed cannot stop its processes; without this they would continue, unseen and holding locks.
    """
    launcher = os.environ.pop(LAUNCHER, None)

    def watch() -> None:
        while str(os.getppid()) == launcher:
            time.sleep(_LOOK_SECONDS)
        os.kill(os.getpid(), signal.SIGTERM)

    if launcher is not None:
        threading.Thread(target=watch, name="launcher", daemon=True).start()


def _exit(number: int, frame: FrameType | None) -> None:
    _leave_closed_terminal(number)
    if os.environ.get("RANK", "0") == "0":  # one of several processes speaks for all
        name = signal.Signals(number).name
        os.write(2, f"Stopped by {name} before any work began: run the same command again.\n".encode())
    os._exit(Interrupted.exit_code)


def _raise(number: int, frame: FrameType | None) -> None:
    _leave_closed_terminal(number)
    raise StoppedBySignal(signal.Signals(number).name)


def _leave_closed_terminal(number: int) -> None:
    """After SIGHUP, lead the streams of a terminal that is gone to nowhere: each word to it would be an error."""
    for stream in (1, 2) if number == signal.SIGHUP else ():
        if stat.S_ISCHR(os.fstat(stream).st_mode) and not os.isatty(stream):
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream)


def _handle(handler: _Handler) -> dict[signal.Signals, Any]:
    """Let ``handler`` receive the signals that are not ignored (``nohup``); returns what received them before."""
    if threading.current_thread() is not threading.main_thread():
        return {}
    return {number: signal.signal(number, handler) for number in _SIGNALS if signal.getsignal(number) != signal.SIG_IGN}


def _restore(before: dict[signal.Signals, Any]) -> None:
    for number, handler in before.items():
        signal.signal(number, handler)
