"""Progress: plain lines without a terminal, bars on one; rates and times left calculated by hand."""

from __future__ import annotations

import io
import subprocess
import sys

import pytest
from rich.console import Console

from gdro_cli.runtime.progress import Reporter, clock_time


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def plain() -> tuple[Reporter, io.StringIO, Clock]:
    out, clock = io.StringIO(), Clock()
    return Reporter(Console(file=out, width=40), clock=clock), out, clock


def test_plain_lines_every_ten_seconds_and_at_the_end() -> None:
    """Four units in 16 s: at 12 s three are done, 0.25/s = 4 s each, so 4 s are left; at 16 s it ends."""
    reporter, out, clock = plain()
    with reporter.track("sampling", 4, "groups") as work:
        for loss in (0.5, 0.25, 0.125, 0.0625):
            clock.now += 4.0
            work.advance(1, loss=loss, top1_gap=-0.01)
    assert out.getvalue().splitlines() == [
        "sampling: 3/4 groups, 4 s/group, 0:04 left, loss 0.125, top1 gap -0.01",
        "sampling: 4/4 groups, 4 s/group, 0:16 in all, loss 0.0625, top1 gap -0.01",
    ]


def test_earlier_units_count_as_done_but_not_in_the_rate() -> None:
    """10 of 30 done before; 10 more in 5 s = 2/s; 10 left at 2/s = 5 s."""
    reporter, out, clock = plain()
    with reporter.track("training", 30, "steps", done=10) as work:
        clock.now += 5.0
        work.advance(10, accuracy=float("nan"))  # nothing to show: single images have no order
        assert work.describe() == "2 steps/s, 0:05 left"
    assert out.getvalue() == "training: 20/30 steps, 2 steps/s, 0:05 left\n"


def test_the_end_is_also_reported_after_an_error() -> None:
    reporter, out, _ = plain()
    with pytest.raises(KeyError), reporter.track("scoring", 5, "images") as work:
        work.advance(2)
        raise KeyError
    assert out.getvalue() == "scoring: 2/5 images\n"


def test_said_text_is_neither_wrapped_nor_read_as_markup() -> None:
    reporter, out, _ = plain()
    reporter.say("the [red] folder " + "x" * 60)
    assert out.getvalue() == "the [red] folder " + "x" * 60 + "\n"


def test_a_quiet_reporter_prints_nothing() -> None:
    out = io.StringIO()
    reporter = Reporter(Console(file=out), quiet=True)
    reporter.say("hello")
    with reporter.track("a", 1, "steps") as work:
        work.advance()
    assert work.done == 1 and out.getvalue() == ""


def test_bars_on_a_terminal() -> None:
    out = io.StringIO()
    reporter = Reporter(Console(file=out, force_terminal=True, width=120))
    with reporter.track("training", 2, "steps") as work:
        work.advance(1, loss=0.5)
        reporter.say("checkpoint kept")
        with reporter.track("validating [x]", 1, "images") as inner:
            inner.advance()
        work.advance(1, loss=0.25)
    text = out.getvalue()
    assert "checkpoint kept" in text and "validating [x]" in text
    assert "2/2 steps" in text and "loss 0.25" in text


BROKEN_PIPE = """
import sys
from gdro_cli.runtime.progress import Reporter
sys.stdin.readline()
Reporter().say("to a reader that has left")
sys.exit(7)
"""


@pytest.mark.slow
def test_a_job_continues_when_its_messages_are_no_longer_read() -> None:
    """As after Ctrl-C in ``gdro train 2>&1 | tee log``, which ends ``tee`` first."""
    job = subprocess.Popen([sys.executable, "-c", BROKEN_PIPE], stdin=subprocess.PIPE, stderr=subprocess.PIPE)
    assert job.stdin is not None and job.stderr is not None
    job.stderr.close()
    job.stdin.close()
    assert job.wait(60) == 7


@pytest.mark.parametrize(("seconds", "text"), [(0.2, "0:00"), (59.6, "1:00"), (754, "12:34"), (3723, "1:02:03")])
def test_durations(seconds: float, text: str) -> None:
    assert clock_time(seconds) == text
