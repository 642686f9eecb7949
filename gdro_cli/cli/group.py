"""How ``gdro`` reads a command line and carries its command out."""

from __future__ import annotations

import errno
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import typer
from typer.core import TyperGroup

from gdro_cli.errors import Interrupted
from gdro_cli.runtime.interrupt import stopped_at_once
from gdro_cli.runtime.terminal import UNREAD


class Commands(TyperGroup):
    """All commands. Typer would end silently at Ctrl-C and at a closed pipe: ``main`` reports the first instead, and
    the second has its own exit code."""

    def make_context(self, *arguments: Any, **options: Any) -> Any:
        """Read the command line; ``--help`` is carried out here."""
        with _in_our_words():
            return super().make_context(*arguments, **options)

    def invoke(self, ctx: Any) -> Any:
        """Carry out the command."""
        with _in_our_words():
            return super().invoke(ctx)


@contextmanager
def _in_our_words() -> Iterator[None]:
    """Ctrl-C, a closed pipe and a bad value of an option, as ``main`` reports them."""
    try:
        yield
    except KeyboardInterrupt as error:
        raise Interrupted(stopped_at_once(error)) from error
    except typer.BadParameter as error:
        error.message = error.message.removeprefix("Value error, ")  # words of pydantic, with which typer reads values
        raise
    except OSError as error:
        if error.errno != errno.EPIPE:
            raise
        raise typer.Exit(UNREAD) from error
