"""``gdro``: from the command line to an exit code, whatever happens on the way. Loads the commands when it runs."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from io import TextIOWrapper

from gdro_cli.runtime.interrupt import ended_by_signals, stop_with_launcher, stopped_at_once
from gdro_cli.runtime.terminal import UNREAD


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line and leave with its exit code: the console script ``gdro``."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    os.environ["PYTHONSAFEPATH"] = "1"  # no process started from here takes Python files from the working folder
    if isinstance(sys.stdout, TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # as stderr does what its encoding lacks
    with ended_by_signals():
        stop_with_launcher()
        code = _flush(_run(given))
    sys.exit(code)


def _run(given: list[str]) -> int:
    debug = "--debug" in given
    try:
        from gdro_cli.cli.commands import app
        from gdro_cli.cli.quiet import silence_optional_packages

        if not debug:
            silence_optional_packages()
        app(args=given, prog_name="gdro")
    except SystemExit as leaving:
        if isinstance(leaving.__context__, BrokenPipeError):  # Rich leaves so
            return UNREAD
        return leaving.code if isinstance(leaving.code, int) else int(leaving.code is not None)
    except (Exception, KeyboardInterrupt) as error:  # noqa: BLE001 (the one place where a failure becomes an exit code)
        return _report(error, debug=debug)
    return 0


def _report(error: BaseException, *, debug: bool = False) -> int:
    from gdro_cli.cli.failures import exit_code_of
    from gdro_cli.errors import Interrupted

    if not isinstance(error, Exception):
        error = Interrupted(stopped_at_once(error))
    return exit_code_of(error, debug=debug)


def _flush(code: int) -> int:
    """The exit code when all output is written, which may fail as late as this: a full disk, a reader that left."""
    try:
        sys.stdout.flush()
    except OSError as error:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # the interpreter flushes once more
        return code or (UNREAD if isinstance(error, BrokenPipeError) else _report(error))
    return code
