"""Settings of the environment that every request depends on, checked before the first one: proxies, certificates, Hub.

The libraries that send requests report a wrong one as an error of their own, without the variable.
"""

from __future__ import annotations

import os
import ssl
from importlib.util import find_spec
from pathlib import Path

import httpx2

from gdro_cli.errors import PrerequisiteError
from gdro_cli.files import at_home

_PROXIES = ("http_proxy", "https_proxy", "all_proxy")
_SOCKS = ("socks5", "socks5h")
_TOKENS = ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN")
_ADDRESS = "an address like https://huggingface.co"


def check_network() -> None:
    """Raise PrerequisiteError, which names the variable, if its proxy or certificates cannot be used."""
    for name in (*_PROXIES, *map(str.upper, _PROXIES)):
        if value := os.environ.get(name, "").strip():
            _check_proxy(name, value)
    file, folder = (os.environ.get(name) or None for name in ("SSL_CERT_FILE", "SSL_CERT_DIR"))
    if file is not None:
        try:
            ssl.create_default_context(cafile=file)
        except OSError as error:  # also ssl.SSLError
            reason = error.strerror if isinstance(error, FileNotFoundError | PermissionError) else "no certificates"
            raise PrerequisiteError(
                f"the environment variable SSL_CERT_FILE names {file}, which cannot be read ({reason}): set it to a"
                " file of certificates, or unset it"
            ) from error
    if folder is not None and not Path(folder).is_dir():
        raise PrerequisiteError(
            f"the environment variable SSL_CERT_DIR names {folder}, which is not a folder: set it to a folder of"
            " certificates, or unset it"
        )


def _check_proxy(name: str, value: str) -> None:
    """The message does not show the value, which may have a password."""
    scheme = value.partition("://")[0].lower() if "://" in value else "http"
    if scheme in _SOCKS and find_spec("socksio") is None:
        raise PrerequisiteError(
            f"the environment variable {name} names a SOCKS proxy, for which the package socksio is not installed: run"
            " `pip install socksio`, or set the variable to a proxy of http (docs/models.md#fetching-weights)"
        )
    try:
        if scheme not in ("http", "https", *_SOCKS) or not httpx2.URL(value if "://" in value else f"//{value}").host:
            raise ValueError(value)
    except (httpx2.InvalidURL, ValueError):
        raise PrerequisiteError(
            f"the environment variable {name} does not name a proxy: set it to an address like http://proxy:3128, or"
            " unset it"
        ) from None


def check_hub() -> None:
    """Raise PrerequisiteError, which names the variable, if the Hugging Face Hub cannot be asked with its settings."""
    from huggingface_hub import constants

    check_network()
    try:
        address = httpx2.URL(constants.ENDPOINT)
    except httpx2.InvalidURL:
        address = httpx2.URL()
    if address.scheme not in ("http", "https") or not address.host:
        raise PrerequisiteError(
            f"the environment variable HF_ENDPOINT is {constants.ENDPOINT[:80]!r}: set it to {_ADDRESS}, or unset it"
        )
    owner = next((f"the environment variable {name}" for name in _TOKENS if os.environ.get(name)), None)
    token = next((value for name in _TOKENS if (value := os.environ.get(name))), "")
    if owner is None and Path(constants.HF_TOKEN_PATH).is_file():
        owner = f"the file {constants.HF_TOKEN_PATH}"
        token = Path(constants.HF_TOKEN_PATH).read_text(encoding="utf-8", errors="replace")
    if not (token.strip().isascii() and token.strip().isprintable()):
        raise PrerequisiteError(
            f"{owner} does not contain a token of the Hugging Face Hub, which has letters and digits only: set it"
            " again, or log in with `hf auth login`"
        )


def hub_cache() -> Path:
    """Folder of the Hub's cache. Raises UserError if it is in a home folder that is not known."""
    from huggingface_hub import constants

    key = "HF_HUB_CACHE" if os.environ.get("HF_HUB_CACHE") else "HF_HOME"
    return Path(at_home(constants.HF_HUB_CACHE, key=key))
