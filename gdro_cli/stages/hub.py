"""Uploading a folder to the Hugging Face Hub with the user's own token, where that was asked for."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import httpx2
from huggingface_hub import HfApi, get_token
from huggingface_hub.errors import HFValidationError, RepositoryNotFoundError
from huggingface_hub.utils import validate_repo_id

from gdro_cli.errors import PrerequisiteError, UserError


def check_name(repo: str) -> None:
    """Raise UserError if no repository can be called that."""
    try:
        validate_repo_id(repo)
    except HFValidationError as error:
        raise UserError(f"--push {repo}: {error}") from error
    if "/" not in repo:
        raise UserError(f"--push {repo}: name the owner, too, as in OWNER/{repo}")


def check_login() -> None:
    """Raise PrerequisiteError where there is no token."""
    if get_token() is None:
        raise PrerequisiteError(
            "there is no Hugging Face token: log in with `hf auth login` or set HF_TOKEN, with a token that may write,"
            " and run the command again"
        )


def make_repository(repo: str, *, public: bool) -> bool:
    """Make the repository if it is not there; returns whether it is public.

    Raises:
        UserError: it is public already, and that was not asked for.
        PrerequisiteError: the Hub refuses or cannot be reached.
    """
    api = HfApi()
    try:
        try:
            is_public = not api.repo_info(repo, repo_type="model").private
        except RepositoryNotFoundError:
            api.create_repo(repo, private=not public, repo_type="model")
            is_public = public
    except (httpx2.HTTPError, OSError) as error:
        raise _refused(repo, error) from error
    if is_public and not public:
        raise UserError(f"the repository {repo} is public: push to another, or add --public if all may see the model")
    return is_public


def upload(folder: Path, repo: str, *, message: str) -> str:
    """Upload all files of a folder in one commit; returns the repository's address.

    Raises:
        PrerequisiteError: the Hub refuses or cannot be reached.
    """
    try:
        done: Any = HfApi().upload_folder(folder_path=folder, repo_id=repo, repo_type="model", commit_message=message)
    except (httpx2.HTTPError, OSError, ValueError) as error:
        raise _refused(repo, error) from error
    return str(done.commit_url).partition("/commit/")[0]


def _refused(repo: str, error: Exception) -> PrerequisiteError:
    """What the Hub said, in one sentence; the token is in no message of the client's."""
    status = getattr(getattr(error, "response", None), "status_code", None)
    reason = type(error).__name__ if status is None else f"{type(error).__name__}, status {status}"
    return PrerequisiteError(
        f"nothing could be pushed to {repo} ({reason}): check the connection and that the token may write there"
        " (`hf auth whoami`), and run the command again"
    )
