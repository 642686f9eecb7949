"""Progress for people: bars with rate and time left on a terminal, plain lines elsewhere. Goes to stderr."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, ProgressColumn, Task, TaskID, TextColumn
from rich.text import Text

from gdro_cli.runtime.terminal import printable

_EVERY = 10.0
"""Seconds between plain lines."""


class Tracker:
    """One piece of work under way; ``advance`` it."""

    def __init__(
        self, *, total: int, unit: str, done: int, show: Callable[[Tracker], None], clock: Callable[[], float]
    ) -> None:
        self.total = total
        self.unit = unit
        self.done = done
        self._first = done
        self.numbers: dict[str, float] = {}
        self._show = show
        self._clock = clock
        self._began = clock()

    def advance(self, n: int = 1, **numbers: float) -> None:
        """Count ``n`` more units as done and show ``numbers`` (the latest of each name) beside them."""
        self.done += n
        self.numbers.update(numbers)
        self._show(self)

    def describe(self) -> str:
        """Rate, time left and numbers, e.g. ``3.2 steps/s, 0:26 left, loss 0.104``."""
        elapsed = self._clock() - self._began
        parts = []
        fresh = self.done - self._first
        if fresh > 0 and elapsed > 0:
            parts.append(_rate(fresh / elapsed, self.unit))
            if self.done < self.total:
                parts.append(f"{clock_time(elapsed / fresh * (self.total - self.done))} left")
            else:
                parts.append(f"{clock_time(elapsed)} in all")
        parts += [f"{name.replace('_', ' ')} {value:.4g}" for name, value in self.numbers.items()]
        return ", ".join(parts)


class Reporter:
    """Where a stage tells what it does.

    Args:
        console: default is stderr; a console that is no terminal gets plain lines.
        quiet: say nothing at all (other processes of the same job, tests).
        prefix: what each plain line and sentence begins with, e.g. which of several jobs speaks.
        clock: seconds, for tests.
    """

    def __init__(
        self,
        console: Console | None = None,
        *,
        quiet: bool = False,
        prefix: str = "",
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._console = console or Console(stderr=True, highlight=False)
        self._quiet = quiet
        self.prefix = prefix
        self._clock = clock
        self._bars: Progress | None = None

    def say(self, text: str) -> None:
        """Tell one sentence, above the bars if there are any."""
        if not self._quiet:
            console = self._bars.console if self._bars is not None else self._console
            console.print(Text(printable(self.prefix + text)), soft_wrap=True)

    @contextmanager
    def track(self, label: str, total: int, unit: str, *, done: int = 0) -> Iterator[Tracker]:
        """Show the progress of ``total`` units of work inside the block.

        Args:
            label: what is done, e.g. ``sampling``.
            total: how many units there are.
            unit: their name in the plural, e.g. ``steps``.
            done: units that an earlier sitting did; they count as done but not in the rate.
        """
        if self._quiet:
            yield Tracker(total=total, unit=unit, done=done, show=lambda _: None, clock=self._clock)
        elif self._console.is_terminal:
            with self._bar(label, total, unit, done) as tracker:
                yield tracker
        else:
            with self._lines(label, total, unit, done) as tracker:
                yield tracker

    @contextmanager
    def _bar(self, label: str, total: int, unit: str, done: int) -> Iterator[Tracker]:
        outer = self._bars
        bars = outer or Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=24),
            TextColumn("{task.completed:.0f}/{task.total:.0f} {task.fields[unit]}"),
            _Numbers(),
            console=self._console,
        )
        if outer is None:
            bars.start()
            self._bars = bars
        task: TaskID | None = None

        def show(tracker: Tracker) -> None:
            if task is not None:
                bars.update(task, completed=tracker.done, numbers=tracker.describe())

        tracker = Tracker(total=total, unit=unit, done=done, show=show, clock=self._clock)
        task = bars.add_task(escape(label), total=total, completed=done, unit=unit, numbers="")
        try:
            yield tracker
        finally:
            if outer is None:
                bars.stop()
                self._bars = None
            else:
                bars.remove_task(task)

    @contextmanager
    def _lines(self, label: str, total: int, unit: str, done: int) -> Iterator[Tracker]:
        last = self._clock()
        told = -1

        def tell(tracker: Tracker) -> None:
            nonlocal last, told
            last, told = self._clock(), tracker.done
            about = tracker.describe()
            self.say(f"{label}: {tracker.done}/{total} {unit}" + (f", {about}" if about else ""))

        def show(tracker: Tracker) -> None:
            if self._clock() - last >= _EVERY:
                tell(tracker)

        tracker = Tracker(total=total, unit=unit, done=done, show=show, clock=self._clock)
        try:
            yield tracker
        finally:
            if told != tracker.done:
                tell(tracker)


class _Numbers(ProgressColumn):
    """The tracker's own description."""

    def render(self, task: Task) -> Text:
        return Text(str(task.fields.get("numbers", "")))


def clock_time(seconds: float) -> str:
    """Write a duration as ``m:ss``, or ``h:mm:ss`` from an hour on."""
    whole = round(seconds)
    minutes, rest = divmod(whole, 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


def _rate(per_second: float, unit: str) -> str:
    """Units per second, or seconds per unit where that is the readable way round."""
    if per_second >= 1:
        return f"{per_second:.3g} {unit}/s"
    one = unit.removesuffix("s")
    return f"{1 / per_second:.3g} s/{one}"
