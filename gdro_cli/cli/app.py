"""``gdro``: from the command line to an exit code. The commands are imported when it runs."""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Sequence
from io import TextIOWrapper

from gdro_cli.runtime.interrupt import ended_by_signals, stop_with_launcher, stopped_at_once
from gdro_cli.runtime.terminal import UNREAD

_NOISY_PACKAGES = ("bitsandbytes", "diffusers.quantizers.torchao", "torch.utils._pytree", "torchao")
"""Loggers that warn at each start about kernels and classes that this tool does not use."""

_ALLOCATOR = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_HIP_ALLOC_CONF")
"""Names of the settings of torch's allocator; the first is that of torch 2.9 and later."""


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line and exit with its code: the console script ``gdro``."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    if sys.platform == "linux" and not any(name in os.environ for name in _ALLOCATOR):
        os.environ[_ALLOCATOR[0]] = "expandable_segments:True"  # against fragmentation; read when torch is imported
    os.environ["PYTHONSAFEPATH"] = "1"  # no process started here imports from the working folder
    if isinstance(sys.stdout, TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # as stderr does for letters that its encoding lacks
    with ended_by_signals():
        stop_with_launcher()
        code = _flush(_run(given))
    sys.exit(code)


def _run(given: list[str]) -> int:
    debug = "--debug" in given
    try:
        from gdro_cli.cli.commands import app

        for name in () if debug else _NOISY_PACKAGES:
            logging.getLogger(name).setLevel(logging.ERROR)
        app(args=given, prog_name="gdro")
    except SystemExit as leaving:
        if isinstance(leaving.__context__, BrokenPipeError):  # Rich exits in this way
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
    """The exit code once all output is written. Writing can fail as late as this: a full disk, a closed pipe."""
    try:
        sys.stdout.flush()
    except OSError as error:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # the interpreter flushes once more
        return code or (UNREAD if isinstance(error, BrokenPipeError) else _report(error))
    return code
