"""Where the embedded model lies. Standard library only, so that every room may ask."""

from __future__ import annotations

from pathlib import Path

from gdro_cli.errors import PrerequisiteError

WEIGHTS = Path(__file__).parent / "weights"


def tiny_model_path() -> Path:
    """Return the folder of the embedded FluxPipeline.

    Raises:
        PrerequisiteError: the folder is not there (an incomplete installation).
    """
    folder = WEIGHTS / "flux"
    if not (folder / "model_index.json").is_file():
        raise PrerequisiteError(
            f"the embedded model is missing from {folder}: reinstall gdro_cli, or make it with"
            " `python -m gdro_cli.tiny.pretrain`"
        )
    return folder


def tiny_detector_path() -> Path:
    """Return the folder of the embedded world's detector and palette; its readers say what is missing of it."""
    return WEIGHTS / "detector"


def tiny_judge_path() -> Path:
    """Return the folder of the embedded world's judge; its reader says what is missing of it."""
    return WEIGHTS / "judge"
