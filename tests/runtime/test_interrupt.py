"""Stopping on real signals, in real processes."""

from __future__ import annotations

import os
import pty
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from gdro_cli.errors import Interrupted
from gdro_cli.runtime.interrupt import LAUNCHER, StopFlag, ended_by_signals, work_begins
from gdro_cli.runtime.lock import folder_lock

CODE = """
import sys, time
from gdro_cli.errors import Interrupted
from gdro_cli.runtime.interrupt import StopFlag

with StopFlag(lambda: print("requested", flush=True)) as stop:
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


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_first_signal_stops_at_the_next_safe_point(number: signal.Signals) -> None:
    child = start("checks")
    child.send_signal(number)
    out, _ = child.communicate(timeout=30)
    assert out == "requested\nstopped: kept; run the same command again\n"
    assert child.returncode == 130


@pytest.mark.slow
def test_second_ctrl_c_stops_at_once_but_a_second_sigterm_does_not() -> None:
    child = start("never checks")
    assert child.stdout is not None
    child.send_signal(signal.SIGTERM)
    assert child.stdout.readline() == "requested\n"
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
        stop.check("no stop was requested")
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop.requested
        with pytest.raises(Interrupted, match="run the same command"):
            stop.check("run the same command again")
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
    """A stop in an inner block also stops the outer work, and one in an outer block also stops later inner work."""
    with StopFlag() as outer:
        with StopFlag() as inner:
            signal.raise_signal(signal.SIGTERM)
            assert inner.requested and outer.requested
        with StopFlag() as later, StopFlag() as innermost:
            assert later.requested and innermost.requested
    with StopFlag() as outer:
        with StopFlag() as inner:
            inner.requested = True  # as for a stop of another process
        assert outer.requested
    with StopFlag() as another:
        assert not another.requested


def test_an_ignored_hangup_stays_ignored() -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with ended_by_signals(), StopFlag() as stop:
            signal.raise_signal(signal.SIGHUP)
            assert not stop.requested
        assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_at_work_a_signal_releases_what_is_held(number: signal.Signals, tmp_path: Path) -> None:
    before = signal.getsignal(number)
    with pytest.raises(KeyboardInterrupt, match=number.name), ended_by_signals():
        work_begins()
        with StopFlag():
            pass  # puts back the handlers that it met
        with folder_lock(tmp_path / "lock"):
            assert (tmp_path / "lock.owner").exists()
            signal.raise_signal(number)
    assert not (tmp_path / "lock.owner").exists()
    assert signal.getsignal(number) == before


IN_TERMINAL = """
import sys, time
from gdro_cli.errors import Interrupted
from gdro_cli.runtime.interrupt import StopFlag

with StopFlag(lambda: print("requested", flush=True)) as stop:
    print("ready", flush=True)
    deadline = time.monotonic() + 60
    while not stop.requested and time.monotonic() < deadline:
        time.sleep(0.01)
    print("a line to a terminal that is gone", flush=True)
    print("another", file=sys.stderr, flush=True)
    try:
        stop.check("kept")
    except Interrupted as error:
        open(sys.argv[1], "w").write(f"stopped: {error}")
"""


def test_a_closed_terminal_stops_at_the_next_safe_point(tmp_path: Path) -> None:
    child, terminal = pty.fork()
    if child == 0:
        os.execv(sys.executable, [sys.executable, "-c", IN_TERMINAL, str(tmp_path / "message")])
    shown = b""
    while b"ready" not in shown:
        shown += os.read(terminal, 1000)
    os.close(terminal)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert (tmp_path / "message").read_text() == "stopped: kept"


LAUNCHING = """
import os, subprocess, sys, time
os.environ[sys.argv[2]] = str(os.getpid())
subprocess.Popen([sys.executable, "-c", sys.argv[1], "checks"])
time.sleep(600)
"""


@pytest.mark.slow
def test_a_killed_launcher_stops_its_processes() -> None:
    child = CODE.replace(
        "with StopFlag(",
        "from gdro_cli.runtime.interrupt import stop_with_launcher\nstop_with_launcher()\nwith StopFlag(",
    )
    launcher = subprocess.Popen([sys.executable, "-c", LAUNCHING, child, LAUNCHER], stdout=subprocess.PIPE, text=True)
    assert launcher.stdout is not None and launcher.stdout.readline() == "ready\n"
    launcher.kill()
    assert (
        launcher.stdout.read() == "requested\nstopped: kept; run the same command again\n"
    )  # ends when the child does
    launcher.wait()


@pytest.mark.slow
def test_a_process_whose_launcher_is_already_gone_does_not_begin(tmp_path: Path) -> None:
    """Otherwise it would continue unseen and hold locks, as the child of another process."""
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    ended = subprocess.run(
        [sys.executable, "-m", "gdro_cli", "train", "--recipe", "smoke", "--out", str(tmp_path / "out")],
        env={**os.environ, LAUNCHER: str(gone.pid)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert ended.returncode == 130
    assert "Stopped by SIGTERM before any work began" in ended.stderr
    assert not (tmp_path / "out").exists()
