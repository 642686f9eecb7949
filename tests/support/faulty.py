"""What every bad input must come to: one sentence with a fixed exit code, or proper handling; never a traceback.

A case is a row of a table: what is given, the exit code, and words that the sentence must hold. Exit code 0 is proper
handling.
"""

from __future__ import annotations

import contextlib
import io
import resource
import signal
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import pytest

from gdro_cli.cli.app import main
from gdro_cli.cli.failures import exit_code_of

LONGEST = 4000
"""Characters of a message that still can be read."""


@dataclass(frozen=True)
class Case:
    """One bad input."""

    name: str
    given: Any
    code: int
    """0: handled without a complaint."""
    words: str = ""


@dataclass(frozen=True)
class Outcome:
    """What the user sees."""

    code: int
    message: str


def rows(cases: Iterable[Case]) -> pytest.MarkDecorator:
    """The table as parameters of a test."""
    cases = list(cases)
    names = [case.name for case in cases]
    assert len(set(names)) == len(names), [name for name in names if names.count(name) > 1]
    return pytest.mark.parametrize("case", cases, ids=names)


def outcome(call: Callable[[], object]) -> Outcome:
    """Do it, and fail as the command line does."""
    said = io.StringIO()
    try:
        call()
    except Exception as error:  # noqa: BLE001 (as the command line does)
        with contextlib.redirect_stderr(said):
            code = exit_code_of(error, debug=False)
        return Outcome(code, said.getvalue().strip())
    return Outcome(0, "")


def command(*arguments: str) -> Outcome:
    """The same for a whole command line."""
    said, out = io.StringIO(), io.StringIO()
    with contextlib.redirect_stderr(said), contextlib.redirect_stdout(out), pytest.raises(SystemExit) as left:
        main(arguments)
    code = left.value.code
    assert isinstance(code, int)
    lines = [line for line in said.getvalue().splitlines() if line.strip()]
    start = next(
        (n for n, line in enumerate(lines) if line.startswith("Error")), 0
    )  # what was said before is not a fault
    return Outcome(code, "\n".join(lines[start:]))


@contextlib.contextmanager
def largest_file(size: int) -> Iterator[None]:
    """The operating system refuses to let any file grow beyond ``size`` bytes, as a full disk would."""
    _, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    ignored = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))
        signal.signal(signal.SIGXFSZ, ignored)


def check(found: Outcome, code: int, words: str = "") -> None:
    """Raises AssertionError unless it is a sentence for users with this exit code."""
    assert "Unexpected" not in found.message and "Traceback" not in found.message, found.message
    assert found.code == code, found
    assert words.lower() in found.message.lower(), found
    if code:
        assert found.message.startswith("Error"), found
        assert len(found.message) <= LONGEST, len(found.message)
        one_of_many = " problems:" in found.message
        assert one_of_many or "\n" not in found.message, found


def never_unexpected(call: Callable[[], object], *codes: int) -> Outcome:
    """For inputs made at random: handled, or refused with one of these exit codes."""
    found = outcome(call)
    assert found.code in (0, *codes), found
    check(found, found.code)
    return found
