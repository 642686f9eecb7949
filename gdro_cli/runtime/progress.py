"""Progress on stderr: bars with rate and time left on a terminal, plain lines elsewhere."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, TextColumn
from rich.text import Text

from gdro_cli.runtime.terminal import printable

_EVERY = 10.0
"""Seconds between plain lines."""


class ErrorConsole(Console):
    """A console on stderr; when its reader ends (``| tee`` after Ctrl-C), the job continues in silence."""

    def __init__(self) -> None:
        super().__init__(stderr=True, highlight=False)

    def on_broken_pipe(self) -> None:
        """Rich would end the process here."""
        self.quiet = True


@dataclass(eq=False, slots=True)
class Tracker:
    """The progress of one piece of work."""

    total: int
    unit: str
    done: int
    clock: Callable[[], float]
    show: Callable[[], None] = lambda: None
    numbers: dict[str, float] = field(default_factory=dict)
    _done_before: int = field(init=False)
    _began: float = field(init=False)

    def __post_init__(self) -> None:
        self._done_before, self._began = self.done, self.clock()

    def advance(self, n: int = 1, **numbers: float) -> None:
        """Count ``n`` more units as done and show ``numbers`` (the latest of each name) beside them."""
        self.done += n
        self.numbers.update(numbers)
        self.show()

    def describe(self) -> str:
        """Rate, time left and numbers, e.g. ``3.2 steps/s, 0:26 left, loss 0.104``."""
        elapsed, fresh = self.clock() - self._began, self.done - self._done_before
        parts = []
        if fresh > 0 and elapsed > 0:
            parts.append(_rate(fresh / elapsed, self.unit))
            if self.done < self.total:
                parts.append(f"{clock_time(elapsed / fresh * (self.total - self.done))} left")
            else:
                parts.append(f"{clock_time(elapsed)} in all")
        numbers = {name: value for name, value in self.numbers.items() if not math.isnan(value)}
        parts += [f"{name.replace('_', ' ')} {value:.4g}" for name, value in numbers.items()]
        return ", ".join(parts)


class Reporter:
    """Where a stage reports what it does.

    Args:
        console: default is stderr; a console that is not a terminal gets plain lines.
        quiet: print nothing (all processes of a job but the main one).
        clock: seconds, for tests.
    """

    def __init__(
        self, console: Console | None = None, *, quiet: bool = False, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._console, self._quiet, self._clock = console or ErrorConsole(), quiet, clock
        self._bars: Progress | None = None
        self.prefix = ""
        """What each plain line and sentence begins with, e.g. the name of one of several jobs."""

    def say(self, text: str) -> None:
        """Report one sentence, above the bars if there are any."""
        if not self._quiet:
            self._console.print(Text(printable(self.prefix + text)), soft_wrap=True)

    @contextmanager
    def track(self, label: str, total: int, unit: str, *, done: int = 0) -> Iterator[Tracker]:
        """Show the progress of ``total`` units of work inside the block.

        Args:
            label: names the work, e.g. ``sampling``.
            total: number of units.
            unit: their name in the plural, e.g. ``steps``.
            done: units that were done before; they count as done but not in the rate.
        """
        tracker = Tracker(total, unit, done, self._clock)
        if self._quiet:
            yield tracker
            return
        with self._bar(label, tracker) if self._console.is_terminal else self._lines(label, tracker):
            yield tracker

    @contextmanager
    def _bar(self, label: str, tracker: Tracker) -> Iterator[None]:
        """Show a bar, below those of the work around it."""
        is_outer = self._bars is None
        if self._bars is None:
            self._bars = Progress(
                TextColumn("{task.description}"),
                BarColumn(bar_width=24),
                TextColumn("{task.completed:.0f}/{task.total:.0f} {task.fields[unit]}"),
                TextColumn("{task.fields[numbers]}", markup=False),
                console=self._console,
            )
            self._bars.start()
        bars = self._bars
        task = bars.add_task(escape(label), total=tracker.total, completed=tracker.done, unit=tracker.unit, numbers="")
        tracker.show = lambda: bars.update(task, completed=tracker.done, numbers=tracker.describe())
        try:
            yield
        finally:
            if is_outer:
                bars.stop()
                self._bars = None
            else:
                bars.remove_task(task)

    @contextmanager
    def _lines(self, label: str, tracker: Tracker) -> Iterator[None]:
        """Print a line now and then, and one at the end."""
        last_time, last_done = self._clock(), -1

        def print_line() -> None:
            nonlocal last_time, last_done
            last_time, last_done = self._clock(), tracker.done
            numbers = tracker.describe()
            self.say(f"{label}: {tracker.done}/{tracker.total} {tracker.unit}" + (f", {numbers}" if numbers else ""))

        tracker.show = lambda: print_line() if self._clock() - last_time >= _EVERY else None
        try:
            yield
        finally:
            if last_done != tracker.done:
                print_line()


def clock_time(seconds: float) -> str:
    """Write a duration as ``m:ss``, or ``h:mm:ss`` from an hour on."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


def _rate(per_second: float, unit: str) -> str:
    """Units per second, or seconds per unit if there is less than one per second."""
    if per_second >= 1:
        return f"{per_second:.3g} {unit}/s"
    return f"{1 / per_second:.3g} s/{unit.removesuffix('s')}"
