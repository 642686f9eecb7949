"""Jobs as a user starts them: processes of their own, on a very small recipe of the embedded model."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import IO, Any

import yaml

PATIENCE = 240.0
"""Seconds until a moment must have come; starting a process takes most of it on a busy machine."""

RECIPE: dict[str, Any] = {
    "name": "small",
    "prompts": {
        "train": {"builtin": "ocr-train", "count": 6},
        "validation": {"builtin": "ocr-validation", "count": 2},
        "eval": {"builtin": "ocr-test", "count": 4},
    },
    "sample": {"images_per_prompt": 4, "steps": 4, "height": 64, "width": 64, "prompts_per_shard": 1},
    "reward": {"workers": 1},
    "method": {"name": "gdro", "k": 3},
    "train": {
        "steps": 12,
        "groups_per_step": 2,
        "checkpoint_every": 2,
        "keep_checkpoints": 3,
        "eval_every": 6,
        "lora": {"rank": 4, "alpha": 8, "targets": "all-linear"},
    },
    "eval": {"bootstrap": 100, "grid_prompts": 2},
}


def write_recipe(path: Path, **changes: dict[str, Any]) -> Path:
    """The small recipe as a file, with changes of its sections: ``write_recipe(path, train={"steps": 24})``."""
    path.write_text(yaml.safe_dump({**RECIPE, **{name: RECIPE[name] | change for name, change in changes.items()}}))
    return path


def start(
    arguments: Sequence[str], *, recipe: Path, workspace: Path, output: IO[str] | None = None, own_group: bool = False
) -> subprocess.Popen[str]:
    """``gdro`` with these arguments; bits depend on the number of threads, so it has one.

    What it prints goes into ``output``, if that is given. ``own_group`` makes it the first of a group of processes.
    """
    command = [sys.executable, "-m", "gdro_cli", *arguments, "--recipe", str(recipe), "--out", str(workspace)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    streams = {"stdout": output or subprocess.PIPE, "stderr": output or subprocess.PIPE}
    return subprocess.Popen(command, env=environment, text=True, process_group=0 if own_group else None, **streams)


def finish(process: subprocess.Popen[str]) -> tuple[int, str, str]:
    """Exit code, output and errors; a process that hangs is a failure."""
    try:
        output, errors = process.communicate(timeout=PATIENCE)
    except subprocess.TimeoutExpired as error:
        process.kill()
        raise AssertionError(f"{process.args} did not end within {PATIENCE:g} s") from error
    return process.returncode, output, errors


def wait_for(process: subprocess.Popen[str], workspace: Path, pattern: str) -> None:
    """Return when a path of that pattern is there; the process must be running then."""
    deadline = time.monotonic() + PATIENCE
    while not list(workspace.glob(pattern)):
        if process.poll() is not None or time.monotonic() > deadline:
            process.kill()
            raise AssertionError(f"{pattern} did not appear before the end: {process.communicate()}")
        time.sleep(0.01)


def stop(process: subprocess.Popen[str], number: signal.Signals) -> str:
    """Ask it to stop; it must end cleanly and say how to continue. Returns what it said."""
    process.send_signal(number)
    code, _, errors = finish(process)
    assert code == 130, errors
    assert "command again" in errors and "Traceback" not in errors, errors
    return errors
