"""Where the embedded weights are, and that they are whole. Standard library only, so that every room may ask.

    python -m gdro_cli.embedded

writes the digests anew after weights have been made.
"""

from __future__ import annotations

import functools
import hashlib
import json
from pathlib import Path

from gdro_cli.errors import PrerequisiteError

WEIGHTS = Path(__file__).parent / "tiny" / "weights"
DIGESTS = WEIGHTS / "sha256.json"
"""SHA-256 of every file that is read, by its path below ``WEIGHTS``."""
_UNREAD = "report.json"


def tiny_model_path() -> Path:
    """Return the folder of the embedded FluxPipeline.

    Raises:
        PrerequisiteError: a file of it is missing or damaged (an incomplete installation).
    """
    return _whole("flux")


def tiny_detector_path() -> Path:
    """Return the folder of the embedded world's detector and palette; raises as ``tiny_model_path``."""
    return _whole("detector")


def tiny_judge_path() -> Path:
    """Return the folder of the embedded world's judge; raises as ``tiny_model_path``."""
    return _whole("judge")


def digests(folder: Path) -> dict[str, str]:
    """SHA-256 of the files below a folder that are read, by their path in it."""
    files = sorted(path for path in folder.rglob("*") if path.is_file() and path.name not in (_UNREAD, DIGESTS.name))
    return {path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


@functools.cache
def _whole(part: str) -> Path:
    folder = WEIGHTS / part
    try:
        told: dict[str, str] = json.loads(DIGESTS.read_text(encoding="utf-8"))
        found = digests(folder)
    except (OSError, ValueError) as error:
        raise PrerequisiteError(
            f"the embedded weights in {WEIGHTS} cannot be read ({error}): reinstall gdro_cli"
        ) from None
    for name, digest in told.items():
        section, _, file = name.partition("/")
        if section == part and found.get(file) != digest:
            state = "missing" if file not in found else "not the file that this version came with"
            raise PrerequisiteError(
                f"{WEIGHTS / name} is {state}: reinstall gdro_cli, or after making weights run"
                " `python -m gdro_cli.embedded`"
            )
    return folder


if __name__ == "__main__":
    DIGESTS.write_text(json.dumps(digests(WEIGHTS), indent=1) + "\n", encoding="utf-8")
