"""Where the embedded weights are, and a check that they are whole. Standard library only, so any module may import it.

After making weights, ``python -m gdro_cli.embedded`` rewrites the digests.
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


def tiny_model_path() -> Path:
    """Return the folder of the embedded FluxPipeline.

    Raises:
        PrerequisiteError: a file of it is missing or damaged, in an incomplete installation.
    """
    return _whole("flux")


def tiny_detector_path() -> Path:
    """Return the folder of the embedded world's detector and palette; raises as ``tiny_model_path``."""
    return _whole("detector")


def tiny_judge_path() -> Path:
    """Return the folder of the embedded world's judge; raises as ``tiny_model_path``."""
    return _whole("judge")


def digests(folder: Path) -> dict[str, str]:
    """SHA-256 of the files below a folder, by their path in it, except reports and digests, which are not read."""
    files = sorted(f for f in folder.rglob("*") if f.is_file() and f.name not in ("report.json", DIGESTS.name))
    return {path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


@functools.cache
def _whole(part: str) -> Path:
    folder = WEIGHTS / part
    try:
        expected: dict[str, str] = json.loads(DIGESTS.read_text(encoding="utf-8"))
        actual = digests(folder)
    except (OSError, ValueError) as error:
        raise PrerequisiteError(
            f"the embedded weights in {WEIGHTS} cannot be read ({error}): reinstall gdro_cli"
        ) from None
    for name, digest in expected.items():
        section, _, file = name.partition("/")
        if section == part and actual.get(file) != digest:
            state = "missing" if file not in actual else "not the file that this version came with"
            raise PrerequisiteError(
                f"{WEIGHTS / name} is {state}: reinstall gdro_cli, or after making weights run"
                " `python -m gdro_cli.embedded`"
            )
    return folder


if __name__ == "__main__":
    DIGESTS.write_text(json.dumps(digests(WEIGHTS), indent=1) + "\n", encoding="utf-8")
