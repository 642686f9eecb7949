"""The folder layout of the official GenEval, for exchange with other tools.

<NNNNN>/metadata.jsonl        one line: the prompt with its metadata
<NNNNN>/samples/0000.png ...  its pictures
"""

from __future__ import annotations

import json
import os
import shutil
import stat
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from gdro_cli.data.promptfile import read_prompt_file
from gdro_cli.data.records import PromptReader, PromptRecord
from gdro_cli.errors import UserError
from gdro_cli.files import partial_name, remove_abandoned, storage_errors, working_folder

METADATA = "metadata.jsonl"
SAMPLES = "samples"
_PICTURES = {".png", ".webp", ".jpg", ".jpeg"}


@dataclass(frozen=True, slots=True)
class PromptPictures:
    """A prompt and the files of its pictures, in order."""

    prompt: PromptRecord
    pictures: tuple[Path, ...]


def read_image_folder(folder: Path, *, reward: PromptReader) -> tuple[PromptPictures, ...]:
    """Read what any tool has written in the official layout; folders with one prompt count as one.

    Args:
        folder: holds one numbered folder per prompt.
        reward: says what a prompt must carry.

    Raises:
        UserError: there is nothing of that layout, a link leads nowhere, or a prompt has no pictures or bad metadata.
    """
    try:
        numbered = sorted(path for path in folder.iterdir() if path.name.isdigit() and _is_folder(path))
    except (OSError, ValueError) as error:
        reason = (error.strerror if isinstance(error, OSError) else None) or str(error)
        raise UserError(f"the picture folder {folder} cannot be read: {reason}") from error
    if not numbered:
        raise UserError(f"{folder} holds no pictures: it needs folders 00000, 00001 ... with {METADATA} and {SAMPLES}/")
    found: dict[str, PromptPictures] = {}
    for path in numbered:
        if not (path / METADATA).exists():
            raise UserError(
                f"{path} has no {METADATA}: it needs one line, the prompt of its pictures with its metadata"
            )
        prompts = read_prompt_file(path / METADATA, reward=reward)
        if len(prompts) != 1:
            raise UserError(f"{path / METADATA} holds {len(prompts)} prompts: it needs one line, that of its pictures")
        pictures = _pictures(path / SAMPLES)
        if not pictures:
            raise UserError(f"{path / SAMPLES} holds no pictures: it needs 0000.png, 0001.png ...")
        (prompt,) = prompts
        earlier = found[prompt.id].pictures if prompt.id in found else ()
        found[prompt.id] = PromptPictures(prompt, earlier + pictures)
    return tuple(found.values())


def _pictures(folder: Path) -> tuple[Path, ...]:
    """The pictures in a folder; one that cannot be read is never left out, which would change what is measured."""
    if not folder.is_dir():
        return ()
    shown = sorted(path for path in folder.iterdir() if not path.name.startswith("."))
    pictures = tuple(path for path in shown if path.suffix.lower() in _PICTURES and not _is_folder(path))
    for path in pictures:
        if not path.is_file():
            raise UserError(f"{path} is no regular file: put the picture itself there, or delete it")
    return pictures


def _is_folder(path: Path) -> bool:
    """Whether it is one. Raises UserError for a link that leads nowhere: nobody knows what is missing there."""
    if path.is_symlink() and not path.exists():
        raise UserError(f"{path} is a link that leads nowhere: put there what it should lead to, or delete it")
    return path.is_dir()


def write_image_folder(folder: Path, entries: Iterable[PromptPictures]) -> int:
    """Write prompts and copies of their pictures in the official layout, all or nothing; returns their number.

    Raises:
        UserError: the folder is there already and not empty.
        StoreError: the disk refuses.
    """
    refuse_used(folder)
    partial = partial_name(folder)
    with storage_errors(folder):
        try:
            remove_abandoned(folder)
            partial.mkdir(parents=True)
            count = 0
            for count, entry in enumerate(entries, start=1):
                samples = partial / f"{count - 1:05d}" / SAMPLES
                samples.mkdir(parents=True)
                for number, picture in enumerate(entry.pictures):
                    shutil.copyfile(picture, samples / f"{number:04d}{picture.suffix}")
                (samples.parent / METADATA).write_text(metadata_line(entry.prompt) + "\n", encoding="utf-8")
            if folder.exists():
                folder.rmdir()
            partial.rename(folder)
        except BaseException:
            shutil.rmtree(partial, ignore_errors=True)
            raise
    return count


def refuse_used(folder: Path, *, what: str = "pictures") -> None:
    """Check, before any work, that a folder can be made or filled.

    Raises:
        UserError: what is written would be mixed with what is there, or the folder cannot be made where it should be.
    """
    refused = f"{folder} is no folder that {what} can be written to"
    try:
        used = folder.exists() and any(folder.iterdir())
        above = Path(os.path.realpath(folder)).parent
        while not os.path.lexists(above):
            above = above.parent
        if not stat.S_ISDIR(above.stat().st_mode):
            raise UserError(f"{refused}: {above} is not a folder; name another one")
    except OSError as error:
        if not folder.is_absolute():
            working_folder()
        raise UserError(f"{refused}: {error.strerror or error}; name another one") from error
    if used:
        raise UserError(f"{folder} is not empty: name a new folder for the {what}")
    if not os.access(above, os.W_OK | os.X_OK):
        raise UserError(f"{refused}: no permission to write in {above}; name another one or change its permissions")


def metadata_line(prompt: PromptRecord) -> str:
    """The prompt as the official metadata has it; prompt files with such lines load as they are."""
    target = {} if prompt.target is None else {"target": prompt.target}
    return json.dumps({**prompt.metadata, **target, "prompt": prompt.prompt}, ensure_ascii=False)
