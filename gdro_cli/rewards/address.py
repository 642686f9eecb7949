"""Addresses and keys of servers that judge or score: what a recipe may say about them, and the key's value."""

from __future__ import annotations

import os

import httpx2

from gdro_cli.errors import PrerequisiteError, UserError

QUOTED = 200
"""Characters of a server's own message that an error shows."""
_SHORTEST_SECRET = 8
"""Characters. An answer can contain a shorter key by chance, such as the ``EMPTY`` of a server without keys."""


def check_url(url: str, *, what: str, example: str, variable: str) -> str:
    """The address without a trailing slash.

    Args:
        url: the address.
        what: its key, for messages.
        example: a correct address.
        variable: the key that names the environment variable with the API key.

    Raises:
        UserError: it is not an address of http or https, or it has a user name, a query or a fragment.
    """
    if any(mark in url for mark in "@?#;"):
        # the address may contain a secret, so the message does not show it
        raise UserError(
            f"{what} contains a user name, a password, a query or a fragment: it must be an address like {example}, and"
            f" {variable} the name of the environment variable with the API key"
        )
    try:
        parts = httpx2.URL(url)
    except httpx2.InvalidURL:
        parts = httpx2.URL()
    if parts.scheme not in ("http", "https") or not parts.host:
        raise UserError(f"{what} is {url[:QUOTED]!r}: it must be an address like {example}")
    return url.rstrip("/")


def read_key(variable: str | None, *, owner: str) -> str | None:
    """The API key in an environment variable; ``None`` if no variable is named.

    Raises:
        PrerequisiteError: the variable is empty, or its value cannot be a key. The message does not show it.
    """
    if variable is None:
        return None
    key = os.environ.get(variable, "").strip()
    if not key:
        raise PrerequisiteError(f"the environment variable {variable} is empty: put {owner} API key into it")
    if not (key.isascii() and key.isprintable()) or " " in key:
        raise PrerequisiteError(
            f"the environment variable {variable} does not contain an API key: it must be one printable word"
        )
    return key


def without_key(text: str, key: str | None) -> str:
    """A text from a server without the key, which it may repeat. Call this before shortening the text."""
    return text if key is None or len(key) < _SHORTEST_SECRET else text.replace(key, "***")
