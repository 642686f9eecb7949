"""Stop at the next safe point instead of in the middle of the work."""

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
from gdro_cli.runtime.terminal import is_main_process

STOPPING = "stopping at the next safe point; press Ctrl-C again to stop at once"
"""What a stage reports when a stop is requested."""

LAUNCHER = "GDRO_LAUNCHER"
"""Environment variable: the process number of the launcher that started a group of processes."""

_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
_POLL_SECONDS = 0.5

_Handler = Callable[[int, FrameType | None], None]


class StoppedBySignal(KeyboardInterrupt):
    """A signal that stops the work at once. Like Ctrl-C's own exception, ``except Exception`` does not catch it."""


@contextmanager
def ended_by_signals() -> Iterator[None]:
    """While a command runs, Ctrl-C, SIGTERM and a closed terminal (SIGHUP) end it with a sentence.

    Until ``work_begins`` no lock is taken and no file is half written, so the process reports the signal and exits. An
    exception would come up inside the libraries that are being imported, some of which report it as a failure of their
    own. After ``work_begins`` the signal raises ``StoppedBySignal``, which releases locks and removes unfinished files;
    a ``StopFlag`` waits for a safe point.
    """
    before = _handle(_exit)
    try:
        yield
    finally:
        _restore(before)


def work_begins() -> None:
    """Call this after all slow imports, before the first lock or file; see ``ended_by_signals``."""
    if signal.getsignal(signal.SIGTERM) is _exit:
        _handle(_raise)


def stopped_at_once(error: BaseException) -> str:
    """The message for a ``KeyboardInterrupt``."""
    name = str(error) if isinstance(error, StoppedBySignal) else "SIGINT"
    return f"stopped at once by {name}; what was finished is kept: run the same command again to continue"


class StopFlag:
    """While the block runs, the first Ctrl-C, SIGTERM or SIGHUP only sets a flag; a second Ctrl-C stops at once.

    A signal sets the flags of all open blocks, inner and outer. Only Python's main thread receives signals; in another
    thread the flag works but must be set by hand.

    Args:
        on_request: called once, when a signal sets the flag of the innermost block; for example to tell the user what
            happens next.
    """

    _open: list[StopFlag] = []  # noqa: RUF012 (shared by the process, innermost last)

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

        Raises:
            Interrupted: a stop was requested. ``message`` says what is kept and how to continue.
        """
        if self.requested:
            raise Interrupted(message)


def stop_with_launcher() -> None:
    """Send this process SIGTERM when the launcher that started it is gone.

    A launcher that is killed cannot stop its processes. Without this they would continue unseen and hold locks.
    """
    launcher = os.environ.pop(LAUNCHER, None)

    def watch() -> None:
        while str(os.getppid()) == launcher:
            time.sleep(_POLL_SECONDS)
        os.kill(os.getpid(), signal.SIGTERM)

    if launcher is not None:
        threading.Thread(target=watch, name="launcher", daemon=True).start()


def _exit(number: int, frame: FrameType | None) -> None:
    _leave_closed_terminal(number)
    if is_main_process():
        name = signal.Signals(number).name
        os.write(2, f"Stopped by {name} before any work began: run the same command again.\n".encode())
    os._exit(Interrupted.exit_code)


def _raise(number: int, frame: FrameType | None) -> None:
    _leave_closed_terminal(number)
    raise StoppedBySignal(signal.Signals(number).name)


def _leave_closed_terminal(number: int) -> None:
    """After SIGHUP, redirect the streams of a closed terminal to /dev/null: writing to it would be an error."""
    for stream in (1, 2) if number == signal.SIGHUP else ():
        if stat.S_ISCHR(os.fstat(stream).st_mode) and not os.isatty(stream):
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream)


def _handle(handler: _Handler) -> dict[signal.Signals, Any]:
    """Let ``handler`` receive the signals, except ignored ones (``nohup``); returns the handlers before."""
    if threading.current_thread() is not threading.main_thread():
        return {}
    return {number: signal.signal(number, handler) for number in _SIGNALS if signal.getsignal(number) != signal.SIG_IGN}


def _restore(before: dict[signal.Signals, Any]) -> None:
    for number, handler in before.items():
        signal.signal(number, handler)
