"""`gdro --help` and the help of every command load nothing heavy and answer at once."""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

COMMANDS = (
    *("init", "completion", "sample", "score", "train", "eval", "compare", "ablate", "export"),
    *("recipes", "recipes show", "prompts", "runs", "env"),
)
#: Seconds of processor time; about 0.2 on a desktop computer. Loading torch alone takes more than this.
LIMIT = 0.8

PROBE = """
import json, sys
from gdro_cli.cli.app import main
HEAVY = ("torch", "diffusers", "transformers", "accelerate", "peft", "paddleocr", "numpy", "PIL", "pydantic", "yaml")
report = []
for arguments in json.loads(sys.argv[1]):
    try:
        main(arguments)
    except SystemExit as leaving:
        report.append([leaving.code, [name for name in HEAVY if name in sys.modules]])
print(json.dumps(report), file=sys.stderr)
"""


def loaded_by(*commands: list[str]) -> list[tuple[int, list[str]]]:
    """Exit code of each command and the heavy modules that are loaded after it, all in one fresh process."""
    probe = [sys.executable, "-c", PROBE, json.dumps(commands)]
    done = subprocess.run(probe, capture_output=True, text=True, check=True)
    return [(code, names) for code, names in json.loads(done.stderr.splitlines()[-1])]


@pytest.mark.parametrize("users", [{}, {"PYTORCH_CUDA_ALLOC_CONF": "backend:native"}])
def test_the_allocator_grows_its_segments_unless_the_user_sets_it(users: dict[str, str]) -> None:
    ours = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_HIP_ALLOC_CONF")
    probe = f"import atexit, os; atexit.register(lambda: print([os.environ.get(name) for name in {ours}]))"
    given = {name: value for name, value in os.environ.items() if name not in ours} | users
    command = [sys.executable, "-c", f"{probe}; from gdro_cli.cli.app import main; main(['--help'])"]
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=given)
    found = [None if users else "expandable_segments:True", users.get(ours[1]), None]
    assert done.stdout.splitlines()[-1] == str(found)


def test_help_loads_nothing_heavy() -> None:
    assert loaded_by(["--help"]) == [(0, [])]


def test_help_of_a_command_loads_no_more_than_typer_itself_does() -> None:
    """Typer imports pydantic for some kinds of options."""
    for code, names in loaded_by(*([*command.split(), "--help"] for command in COMMANDS)):
        assert code == 0
        assert set(names) <= {"pydantic"}


def test_help_answers_at_once() -> None:
    def used() -> float:
        usage = resource.getrusage(resource.RUSAGE_CHILDREN)
        return usage.ru_utime + usage.ru_stime

    times = []
    for _ in range(3):
        before = used()
        subprocess.run([sys.executable, "-m", "gdro_cli", "--help"], capture_output=True, check=True)
        times.append(used() - before)
    assert min(times) < LIMIT


def test_printing_prompts_loads_nothing_heavy() -> None:
    assert loaded_by(["prompts", "geneval-test"], ["prompts", "ocr-test"]) == [(0, ["pydantic"])] * 2


def test_checking_recipes_loads_no_torch() -> None:
    assert loaded_by(["recipes", "check"]) == [(0, ["pydantic", "yaml"])]


@pytest.mark.parametrize(
    ("line", "expected"),
    [("gdro tr", "train"), ("gdro recipes ", "list show check fields"), ("gdro --ver", "--version")],
)
def test_bash_completes_commands_and_options(line: str, expected: str, tmp_path: Path) -> None:
    """With the script that the command prints, whose function calls `gdro` again."""
    gdro = tmp_path / "gdro"
    gdro.write_text(f'#!/bin/sh\nexec {sys.executable} -m gdro_cli "$@"\n')
    gdro.chmod(0o755)
    script = """
    source <("$0" completion bash)
    read -ra COMP_WORDS <<<"$1"
    [[ $1 == *" " ]] && COMP_WORDS+=("")
    COMP_CWORD=$((${#COMP_WORDS[@]} - 1))
    _gdro_completion "$0"
    echo "${COMPREPLY[*]}"
    """
    done = subprocess.run(["bash", "-c", script, str(gdro), line], capture_output=True, text=True, check=True)
    assert (" ".join(done.stdout.split()), done.stderr) == (expected, "")


def test_starting_a_job_loads_no_torch(tmp_path: Path) -> None:
    ((code, names),) = loaded_by(["init", str(tmp_path / "job")])
    assert (code, set(names) & {"torch", "diffusers", "transformers", "numpy", "PIL"}) == (0, set())
