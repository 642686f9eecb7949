"""Streams and signals as a shell can set them up, each in a real process."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

GDRO = [sys.executable, "-P", "-m", "gdro_cli"]
PATIENCE = 120.0
"""Seconds that a process may take; on a busy machine imports take most of it."""


def gdro(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    done = subprocess.run(
        [*GDRO, *arguments], env={**os.environ, **environment}, capture_output=True, text=True, timeout=PATIENCE
    )
    assert "Traceback" not in done.stderr and "Unexpected" not in done.stderr, done.stderr
    return done


def in_shell(script: str) -> tuple[int, str]:
    """Exit code and errors of a script for bash in which ``gdro`` is the command."""
    command = f'gdro() {{ {" ".join(GDRO)} "$@"; }}; {script}'
    done = subprocess.run(["bash", "-c", command], stdin=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    assert "Traceback" not in done.stderr and "Exception ignored" not in done.stderr, done.stderr
    return done.returncode, done.stderr


# --- streams -------------------------------------------------------------------------------------------------


def test_letters_that_the_terminal_lacks_are_escaped(tmp_path: Path) -> None:
    (tmp_path / "runs" / "one").mkdir(parents=True)
    recipe = '{"name": "\\u4f60\\u597d", "method": {"name": "gdro"}, "train": {"steps": 3}}'
    (tmp_path / "runs" / "one" / "recipe.json").write_text(recipe)
    done = gdro("runs", str(tmp_path), PYTHONIOENCODING="ascii")
    assert done.returncode == 0 and "\\u4f60\\u597d" in done.stdout


@pytest.mark.parametrize("command", ["prompts geneval-coco-train", "recipes show ocr"])
def test_a_closed_pipe_ends_the_command_quietly(command: str) -> None:
    assert in_shell(f"gdro {command} | true; exit ${{PIPESTATUS[0]}}") == (141, "")


def test_a_full_disk_behind_stdout_is_one_sentence() -> None:
    code, errors = in_shell("gdro prompts ocr-test --count 1 > /dev/full")
    assert code == 4 and errors.startswith("Error: the disk is full") and errors.count("\n") == 1


# --- signals before any work ---------------------------------------------------------------------------------


def wait_for_library(process: subprocess.Popen[str], library: str) -> None:
    deadline = time.monotonic() + PATIENCE
    while library not in Path(f"/proc/{process.pid}/maps").read_text():
        assert process.poll() is None and time.monotonic() < deadline, process.communicate()
        time.sleep(0.001)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_before_any_work_is_one_sentence(number: signal.Signals, tmp_path: Path) -> None:
    """It comes while torch is imported, which takes seconds."""
    command = [*GDRO, "train", "--recipe", "smoke", "--out", str(tmp_path / "out")]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    wait_for_library(process, "libtorch")
    process.send_signal(number)
    output, errors = process.communicate(timeout=PATIENCE)
    assert (process.returncode, output) == (130, "")
    assert errors == f"Stopped by {number.name} before any work began: run the same command again.\n"
    assert not (tmp_path / "out").exists()


def test_a_command_under_nohup_ignores_sighup() -> None:
    process = subprocess.Popen(["nohup", *GDRO, "env"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    wait_for_library(process, "libtorch")
    process.send_signal(signal.SIGHUP)
    output, errors = process.communicate(timeout=PATIENCE)
    assert process.returncode == 0 and "torch" in output, errors
