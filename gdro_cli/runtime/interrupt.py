"""Stop at the next safe point instead of in the middle of something."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable
from types import FrameType, TracebackType
from typing import Any

from gdro_cli.errors import Interrupted

STOPPING = "stopping at the next safe point; press Ctrl-C again to stop at once"
"""What a stage tells when a stop is requested."""

_SIGNALS = (signal.SIGINT, signal.SIGTERM)


class StopFlag:
    """While the block runs, the first Ctrl-C (or SIGTERM) only raises a flag; a second Ctrl-C stops at once.

    Signals reach Python's main thread only: in any other thread the flag works but must be set by hand.

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
                self._before[number] = signal.signal(number, self._on_signal)
        self.requested = self.requested or any(outer.requested for outer in self._around())
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        for outer in self._around():
            outer.requested = outer.requested or self.requested
        self._before.clear()

    def _around(self) -> list[StopFlag]:
        """The flags of the blocks around this one: a stop that was asked for in one of them is asked for in all."""
        owners = {
            id(owner): owner for handler in self._before.values() if (owner := getattr(handler, "__self__", None))
        }
        return [owner for owner in owners.values() if isinstance(owner, StopFlag)]

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        if self.requested and number == signal.SIGINT:
            raise KeyboardInterrupt
        if not self.requested:
            self.requested = True
            if self._on_request is not None:
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
    Does nothing in a process that ``LAUNCHER`` does not name the parent of.
    """
    launcher = os.environ.get(LAUNCHER)
    if launcher is None or launcher != str(os.getppid()):
        return

    def look() -> None:
        while str(os.getppid()) == launcher:
            time.sleep(_LOOK_SECONDS)
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=look, name="launcher", daemon=True).start()
