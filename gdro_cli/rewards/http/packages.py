"""Whether the packages of the server are installed."""

from __future__ import annotations

from importlib.util import find_spec

from gdro_cli.errors import PrerequisiteError


def check_packages() -> None:
    """Raise PrerequisiteError if they are not."""
    if find_spec("starlette") is None or find_spec("uvicorn") is None:
        raise PrerequisiteError(
            "gdro rewards serve needs the packages starlette and uvicorn: run `pip install 'gdro_cli[serve]'`"
            " (docs/reward-servers.md)"
        )
