"""Working folders, streams and signals as a shell can leave them, each in a real process."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from gdro_cli.config.load import load_recipe

GDRO = [sys.executable, "-P", "-m", "gdro_cli"]
ASCII = [{"PYTHONIOENCODING": "ascii"}, {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}]
PATIENCE = 120.0
"""Seconds until a process must have come to a moment; importing takes most of it on a busy machine."""


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


# --- a deleted working folder --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "arguments",
    ["env", "recipes", "prompts ocr-test", "train --recipe smoke --dry-run", "eval --compare a b", "sample"],
)
def test_a_deleted_working_folder_is_one_sentence(arguments: str, tmp_path: Path) -> None:
    code, errors = in_shell(f"mkdir {tmp_path}/gone; cd {tmp_path}/gone; rmdir {tmp_path}/gone; gdro {arguments}")
    assert code == 2
    assert errors == "Error: The working folder no longer exists: cd to another one and run the command again.\n"


def test_help_needs_no_working_folder(tmp_path: Path) -> None:
    code, errors = in_shell(f"mkdir {tmp_path}/gone; cd {tmp_path}/gone; rmdir {tmp_path}/gone; gdro train --help")
    assert (code, errors) == (0, "")


# --- streams -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("environment", ASCII)
def test_a_terminal_without_the_letters_of_a_text_gets_them_spelt_out(
    environment: dict[str, str], tmp_path: Path
) -> None:
    described, path = "von Müller, 你好 \N{GRINNING FACE}", tmp_path / "mine.yaml"
    path.write_text(f"extends: smoke\nname: mine\ndescription: {described}\n", encoding="utf-8")
    as_json = gdro("recipes", "show", str(path), "--json", **environment)
    assert as_json.stdout.isascii() and json.loads(as_json.stdout)["description"] == described
    shown = gdro("recipes", "show", str(path), **environment)
    (tmp_path / "again.yaml").write_text(shown.stdout, encoding="ascii")
    assert load_recipe(str(tmp_path / "again.yaml")).description == described
    for command in ("recipes", "env", "train --recipe smoke --dry-run"):
        done = gdro(*command.split(), **environment)
        assert done.returncode == 0 and done.stdout.isascii()
    (tmp_path / "runs" / "one").mkdir(parents=True)
    (tmp_path / "runs" / "one" / "recipe.json").write_text('{"name": "\\u4f60\\u597d"}')
    listed = gdro("runs", str(tmp_path), **environment)
    assert listed.returncode == 0 and "\\u4f60\\u597d" in listed.stdout


@pytest.mark.parametrize(
    "script",
    ["gdro env >&-", "gdro env >&- 2>&-", "gdro --help <&- >&- 2>&-", "gdro prompts geneval-test >&-"],
)
def test_closed_streams_end_nothing(script: str) -> None:
    assert in_shell(script)[0] == 0


@pytest.mark.parametrize("command", ["prompts geneval-coco-train", "recipes fields", "--help", "recipes show ocr"])
def test_a_reader_that_leaves_ends_the_command_quietly(command: str) -> None:
    assert in_shell(f"gdro {command} | true; exit ${{PIPESTATUS[0]}}") == (141, "")


def test_a_full_disk_behind_stdout_is_one_sentence() -> None:
    code, errors = in_shell("gdro prompts ocr-test --count 1 > /dev/full")
    assert code == 4 and errors.startswith("Error: The disk is full") and errors.count("\n") == 1


# --- signals before any work ---------------------------------------------------------------------------------


def catches(process: subprocess.Popen[str], number: signal.Signals) -> bool:
    status = Path(f"/proc/{process.pid}/status").read_text()
    (mask,) = (line.split()[1] for line in status.splitlines() if line.startswith("SigCgt"))
    return bool(int(mask, 16) >> (number - 1) & 1)


def has_loaded(process: subprocess.Popen[str], library: str) -> bool:
    return library in Path(f"/proc/{process.pid}/maps").read_text()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
@pytest.mark.parametrize("moment", ["at the start", "while torch is imported"])
def test_a_signal_before_any_work_is_one_sentence(number: signal.Signals, moment: str, tmp_path: Path) -> None:
    command = [*GDRO, "train", "--recipe", "smoke", "--out", str(tmp_path / "out")]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + PATIENCE
    while not (has_loaded(process, "libtorch") if "torch" in moment else catches(process, signal.SIGHUP)):
        assert process.poll() is None and time.monotonic() < deadline, process.communicate()
        time.sleep(0.001)
    process.send_signal(number)
    output, errors = process.communicate(timeout=PATIENCE)
    assert (process.returncode, output) == (130, "")
    assert errors == f"Stopped by {number.name} before any work began: run the same command again.\n"
    assert not (tmp_path / "out").exists()


def test_nohup_keeps_what_it_asks_for() -> None:
    process = subprocess.Popen(["nohup", *GDRO, "env"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + PATIENCE
    while not has_loaded(process, "libtorch"):
        assert process.poll() is None and time.monotonic() < deadline, process.communicate()
        time.sleep(0.001)
    process.send_signal(signal.SIGHUP)
    output, errors = process.communicate(timeout=PATIENCE)
    assert process.returncode == 0 and "torch" in output, errors


ENDING = """
import atexit, sys, time
from gdro_cli.cli.app import main
atexit.register(lambda: (print("ending", flush=True), time.sleep(600)))
sys.argv[1:] = ["recipes", "show", "nowhere"]
main()
"""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_to_a_process_that_ends_changes_nothing_that_was_said(number: signal.Signals) -> None:
    command = [sys.executable, "-c", ENDING]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout is not None and process.stdout.readline() == "ending\n"
    process.send_signal(number)
    _, errors = process.communicate(timeout=PATIENCE)
    assert process.returncode == 2 and errors.startswith("Error: there is no recipe file 'nowhere'")
    assert errors.count("\n") == 1
