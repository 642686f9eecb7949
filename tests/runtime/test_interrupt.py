"""Stopping on real signals, in real processes."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time

import pytest

from gdro_cli.errors import Interrupted
from gdro_cli.runtime.interrupt import LAUNCHER, StopFlag, stop_with_launcher

CODE = """
import sys, time
from gdro_cli.errors import Interrupted
from gdro_cli.runtime.interrupt import StopFlag

with StopFlag(lambda: print("asked", flush=True)) as stop:
    print("ready", flush=True)
    try:
        for _ in range(600):
            time.sleep(0.1)
            if sys.argv[1] == "checks":
                stop.check("kept; run the same command again")
    except Interrupted as error:
        print("stopped:", error, flush=True)
        sys.exit(error.exit_code)
    except KeyboardInterrupt:
        print("at once", flush=True)
        sys.exit(7)
"""


def start(kind: str) -> subprocess.Popen[str]:
    child = subprocess.Popen([sys.executable, "-c", CODE, kind], stdout=subprocess.PIPE, text=True)
    assert child.stdout is not None and child.stdout.readline() == "ready\n"
    return child


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_first_signal_stops_at_the_next_safe_point(number: signal.Signals) -> None:
    child = start("checks")
    child.send_signal(number)
    out, _ = child.communicate(timeout=30)
    assert out == "asked\nstopped: kept; run the same command again\n"
    assert child.returncode == 130


def test_second_ctrl_c_stops_at_once_but_a_second_sigterm_does_not() -> None:
    child = start("never checks")
    assert child.stdout is not None
    child.send_signal(signal.SIGTERM)
    assert child.stdout.readline() == "asked\n"
    child.send_signal(signal.SIGTERM)
    time.sleep(0.3)
    assert child.poll() is None
    child.send_signal(signal.SIGINT)
    out, _ = child.communicate(timeout=30)
    assert out == "at once\n" and child.returncode == 7


def test_handlers_come_back() -> None:
    before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    with StopFlag() as stop:
        assert signal.getsignal(signal.SIGINT) != before[0]
        stop.check("nothing was asked")
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop.requested
        with pytest.raises(Interrupted, match="go on with"):
            stop.check("go on with --resume")
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == before


def test_outside_the_main_thread_it_is_a_plain_flag() -> None:
    caught: list[str] = []

    def work() -> None:
        with StopFlag() as stop:
            stop.requested = True
            try:
                stop.check("stopped")
            except Interrupted as error:
                caught.append(str(error))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert caught == ["stopped"]


def test_a_stop_reaches_the_blocks_around_and_inside() -> None:
    """Asked for inside, it stops the work around; asked for outside, it stops what begins inside; and so on."""
    with StopFlag() as outer:
        with StopFlag() as inner:
            signal.raise_signal(signal.SIGTERM)
            assert inner.requested and not outer.requested
        assert outer.requested
        with StopFlag() as later, StopFlag() as innermost:
            assert later.requested and innermost.requested
    with StopFlag() as another:
        assert not another.requested


LAUNCHING = """
import os, subprocess, sys, time
os.environ[sys.argv[2]] = str(os.getpid())
subprocess.Popen([sys.executable, "-c", sys.argv[1], "checks"])
time.sleep(600)
"""


def test_a_killed_launcher_stops_its_processes() -> None:
    child = CODE.replace(
        "with StopFlag(",
        "from gdro_cli.runtime.interrupt import stop_with_launcher\nstop_with_launcher()\nwith StopFlag(",
    )
    launcher = subprocess.Popen([sys.executable, "-c", LAUNCHING, child, LAUNCHER], stdout=subprocess.PIPE, text=True)
    assert launcher.stdout is not None and launcher.stdout.readline() == "ready\n"
    launcher.kill()
    assert launcher.stdout.read() == "asked\nstopped: kept; run the same command again\n"  # ends when the child does
    launcher.wait()


def test_a_process_of_another_launcher_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(LAUNCHER, str(os.getppid() + 1))
    before = threading.active_count()
    stop_with_launcher()
    assert threading.active_count() == before
