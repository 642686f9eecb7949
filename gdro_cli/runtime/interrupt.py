"""Stop at the next safe point instead of in the middle of something."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from types import FrameType, TracebackType
from typing import Any

from gdro_cli.errors import Interrupted
from gdro_cli.processes import is_running
from gdro_cli.runtime.terminal import leave_closed_terminal

STOPPING = "stopping at the next safe point; press Ctrl-C again to stop at once"
"""What a stage tells when a stop is requested."""

_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class StoppedBySignal(KeyboardInterrupt):
    """A signal that stops the work at once; as Ctrl-C's own exception it passes by whoever handles errors."""


@contextmanager
def ended_by_signals() -> Iterator[None]:
    """While a command runs, Ctrl-C, SIGTERM and a closed terminal (SIGHUP) end it with a sentence.

    Until ``work_begins`` nothing is held and nothing half written: the process says so and is gone. An exception would
    be raised somewhere inside the libraries that are being imported then, some of which tell it as a failure of theirs.
    From then on ``StoppedBySignal`` is raised, so that locks and unfinished files go; ``StopFlag`` waits for a safe
    point instead. A signal that is ignored (``nohup``) stays so. Does nothing outside the main thread.
    """
    before: dict[signal.Signals, Any] = {}
    if threading.current_thread() is threading.main_thread():
        for number in _SIGNALS:
            if signal.getsignal(number) not in (signal.SIG_IGN, None):
                before[number] = signal.signal(number, _leave)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def work_begins() -> None:
    """Call it when all that is slow to import is imported, before the first lock or file; see ``ended_by_signals``."""
    if threading.current_thread() is threading.main_thread():
        for number in _SIGNALS:
            if signal.getsignal(number) is _leave:
                signal.signal(number, _raise)


def signals_hurry(code: int) -> None:
    """Nothing is left but the interpreter's end, which may take a second: a signal cuts it short, with this code."""

    def leave(number: int, frame: FrameType | None) -> None:
        os._exit(code)

    if threading.current_thread() is threading.main_thread():
        for number in _SIGNALS:
            if signal.getsignal(number) not in (signal.SIG_IGN, None):
                signal.signal(number, leave)


def stopped_at_once(error: BaseException) -> str:
    """What to tell of a ``KeyboardInterrupt``."""
    told = str(error) if isinstance(error, StoppedBySignal) else "SIGINT"
    return f"stopped at once by {told}; what was finished is kept: run the same command again to go on"


def _leave(number: int, frame: FrameType | None) -> None:
    if number == signal.SIGHUP:
        leave_closed_terminal()
    if os.environ.get("RANK", "0") == "0":  # one of several processes speaks for all
        told = f"Stopped by {signal.Signals(number).name} before any work began: run the same command again.\n"
        with suppress(OSError):
            os.write(2, told.encode())
    os._exit(Interrupted.exit_code)


def _raise(number: int, frame: FrameType | None) -> None:
    if number == signal.SIGHUP:
        leave_closed_terminal()
    raise StoppedBySignal(signal.Signals(number).name)


class StopFlag:
    """While the block runs, the first Ctrl-C, SIGTERM or SIGHUP only raises a flag; a second Ctrl-C stops at once.

    A SIGHUP that is ignored (``nohup``) stays so. Signals reach Python's main thread only: in any other thread the flag
    works but must be set by hand.

    Args:
        on_request: called once when the flag goes up, e.g. to tell the user what happens next.
    """

    def __init__(self, on_request: Callable[[], None] | None = None) -> None:
        self.requested = False
        self._on_request = on_request
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> StopFlag:
        if threading.current_thread() is threading.main_thread():
            for number in _SIGNALS:
                if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN:
                    self._before[number] = signal.signal(number, self._on_signal)
        if any(outer.requested for outer in self._around()):
            self.requested = True
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        for outer in self._around() if self.requested else ():  # a signal may have come since: no flag is taken down
            outer.requested = True
        self._before.clear()

    def _around(self) -> list[StopFlag]:
        """The flags of the blocks around this one: a stop that was asked for in one of them is asked for in all."""
        owners = {
            id(owner): owner for handler in self._before.values() if (owner := getattr(handler, "__self__", None))
        }
        return [owner for owner in owners.values() if isinstance(owner, StopFlag)]

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGHUP:
            leave_closed_terminal()
        if self.requested and number == signal.SIGINT:
            raise StoppedBySignal(signal.SIGINT.name)
        if not self.requested:
            self.requested = True
            if self._on_request is not None:
                with suppress(OSError):  # nobody reads it any more
                    self._on_request()

    def check(self, message: str) -> None:
        """Stop here if it was asked for; call it where everything so far is on the disk.

        Args:
            message: what is kept and how to go on.

        Raises:
            Interrupted: a stop was requested.
        """
        if self.requested:
            raise Interrupted(message)


LAUNCHER = "GDRO_LAUNCHER"
"""Environment variable with the process number of the process that started a group."""
_LOOK_SECONDS = 0.5


def stop_with_launcher() -> None:
    """Ask this process to stop (SIGTERM) once the process that started its group is gone.

    A launcher that is killed cannot tell its processes; without this they would go on, unseen and holding their locks.
    Does nothing in a process that another one than the launcher has started.
    """
    launcher = os.environ.get(LAUNCHER, "")
    if launcher != str(os.getppid()):
        if launcher.isdecimal() and not is_running(int(launcher)):  # before this one could look
            os.kill(os.getpid(), signal.SIGTERM)
        return

    def look() -> None:
        while str(os.getppid()) == launcher:
            time.sleep(_LOOK_SECONDS)
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=look, name="launcher", daemon=True).start()
