"""Upload a folder to the Hugging Face Hub with the user's own token."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import httpx2
from huggingface_hub import HfApi, get_token
from huggingface_hub.errors import RepositoryNotFoundError

from gdro_cli.errors import PrerequisiteError, UserError
from gdro_cli.network import check_hub

_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]{0,95}", re.ASCII)


def check_name(repo: str) -> None:
    """Raise UserError if a repository cannot have that name."""
    if not _NAME.fullmatch(repo) or "--" in repo or ".." in repo:
        raise UserError(
            f"--push {repo} cannot be the name of a repository: write OWNER/NAME, in letters, digits, `-`, `_`, `.`"
        )


def has_token() -> bool:
    """Whether the user has logged in or set HF_TOKEN."""
    return get_token() is not None


def check_login() -> None:
    """Raise PrerequisiteError unless the user has a token, and the environment lets it reach the Hub."""
    check_hub()
    if not has_token():
        raise PrerequisiteError(
            "no Hugging Face token was found: log in with `hf auth login` or set HF_TOKEN, with a token that may write,"
            " and run the command again (docs/export.md#the-hub)"
        )


def make_repository(repo: str, *, public: bool) -> bool:
    """Make the repository unless it exists; returns whether it is public.

    Raises:
        UserError: it is already public, and the user has not said ``public``.
        PrerequisiteError: the Hub refuses or cannot be reached.
    """
    api = HfApi()
    try:
        try:
            is_public = not api.repo_info(repo, repo_type="model").private
        except RepositoryNotFoundError:
            api.create_repo(repo, private=not public, repo_type="model")
            is_public = public
    except (httpx2.HTTPError, OSError, ValueError) as error:
        raise _refused(repo, error) from error
    if is_public and not public:
        raise UserError(f"the repository {repo} is public: push to another repository, or add --public")
    return is_public


def upload(folder: Path, repo: str, *, message: str, again: str) -> str:
    """Upload all files of a folder in one commit; returns the repository's address.

    ``again`` says how to continue after a failure.

    Raises:
        PrerequisiteError: the Hub refuses or cannot be reached.
    """
    try:
        done: Any = HfApi().upload_folder(folder_path=folder, repo_id=repo, repo_type="model", commit_message=message)
    except (httpx2.HTTPError, OSError, ValueError) as error:
        raise _refused(repo, error, again=again) from error
    return str(done.commit_url).partition("/commit/")[0]


def _refused(repo: str, error: Exception, *, again: str = "run the command again") -> PrerequisiteError:
    """The Hub's answer in one sentence. The client's messages never have the token."""
    status = getattr(getattr(error, "response", None), "status_code", None)
    reason = type(error).__name__ if status is None else f"{type(error).__name__}, status {status}"
    return PrerequisiteError(
        f"the push to {repo} failed ({reason}): check the connection and that the token may write there"
        f" (`hf auth whoami`), and {again}"
    )
