"""``gdro``: from the command line to an exit code, whatever happens on the way. Loads the commands when it runs."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from gdro_cli.files import working_folder
from gdro_cli.runtime.interrupt import ended_by_signals, signals_hurry, stop_with_launcher, stopped_at_once
from gdro_cli.runtime.terminal import UNREAD, prepare_streams, write_out

_HELP = {"-h", "--help"}


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line and leave with its exit code: the console script ``gdro``."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    with ended_by_signals():
        prepare_streams()
        stop_with_launcher()
        code = _written(_run(given))
    if arguments is None:  # else there is more to this process than the command
        signals_hurry(code)
    sys.exit(code)


def _run(given: list[str]) -> int:
    debug = "--debug" in given
    try:
        if given and not _HELP.intersection(given):
            working_folder()  # torch, imported in one that has been deleted, would end the process
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
        return _told(error, debug=debug)
    return 0


def _told(error: BaseException, *, debug: bool = False) -> int:
    from gdro_cli.cli.failures import exit_code_of
    from gdro_cli.errors import Interrupted

    if not isinstance(error, Exception):
        error = Interrupted(stopped_at_once(error))
    return exit_code_of(error, debug=debug)


def _written(code: int) -> int:
    """The exit code once all output is written, which may fail as late as this: a full disk, a reader that has left."""
    try:
        write_out()
    except BrokenPipeError:
        return code or UNREAD
    except OSError as error:
        return code or _told(error)
    return code
