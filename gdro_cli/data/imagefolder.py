"""The folder layout of the official GenEval, for the exchange of images with other tools.

<NNNNN>/metadata.jsonl        one line: the prompt with its metadata
<NNNNN>/samples/0000.png ...  its images
<NNNNN>/source.png            the image that the prompt edits, if it edits one
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from gdro_cli.data.promptfile import read_prompt_file
from gdro_cli.data.records import IMAGE, PromptReader, PromptRecord
from gdro_cli.errors import StoreError, UserError
from gdro_cli.images import UnusableImageError, open_image, suffixes

METADATA = "metadata.jsonl"
SAMPLES = "samples"
SOURCE = "source.png"


@dataclass(frozen=True, slots=True)
class PromptImages:
    """A prompt, and the files of its images in order."""

    prompt: PromptRecord
    images: tuple[Path, ...]
    left_out: tuple[Path, ...] = ()
    """What else is visible beside the images."""


def read_image_folder(folder: Path, *, reward: PromptReader) -> tuple[PromptImages, ...]:
    """Read images in the official layout, from any tool. Folders with the same prompt are combined.

    A file is an image if its name ends as that of a format in ``gdro_cli.images``.

    Args:
        folder: has one numbered folder per prompt.
        reward: checks what a prompt carries.

    Raises:
        UserError: the folder has another layout, a link is broken, or a prompt has no images or bad metadata.
    """
    try:
        numbered = sorted(path for path in folder.iterdir() if path.name.isdigit() and not path.is_file())
    except OSError as error:
        reason = error.strerror or error
        raise UserError(f"the folder {folder} cannot be read ({reason}): check its name and permissions") from error
    if not numbered:
        raise UserError(f"{folder} has no folders 00000, 00001 ..., each with {METADATA} and {SAMPLES}/: name another")
    entries: dict[str, PromptImages] = {}
    for path in numbered:
        if not (path / METADATA).exists():
            raise UserError(f"{path} has no {METADATA}: it needs one line, the prompt of its images with its metadata")
        prompts = read_prompt_file(path / METADATA, reward=reward)
        if len(prompts) != 1:
            raise UserError(f"{path / METADATA} has {len(prompts)} prompts: it needs one line, that of its images")
        images, left_out = image_files(path / SAMPLES)
        if not images:
            raise UserError(f"{path / SAMPLES} has no images: it needs 0000.png, 0001.png ...")
        (prompt,) = prompts
        earlier = entries.get(prompt.id, PromptImages(prompt, ()))
        entries[prompt.id] = PromptImages(prompt, earlier.images + images, earlier.left_out + left_out)
    return tuple(entries.values())


def image_files(folder: Path) -> tuple[tuple[Path, ...], tuple[Path, ...]]:
    """The images in a folder, and what else is visible in it.

    A broken link is an error: leaving out an image would change the result.
    """
    if not folder.is_dir():
        return (), ()
    visible = sorted(path for path in folder.iterdir() if not path.name.startswith("."))
    images = tuple(path for path in visible if path.suffix.lower() in suffixes() and not path.is_dir())
    for path in images:
        if not path.is_file():
            raise UserError(f"{path} is a broken link: put the image itself there, or delete the link")
    known = set(images)
    return images, tuple(path for path in visible if path not in known)


def write_image_folder(folder: Path, entries: Iterable[PromptImages]) -> None:
    """Write prompts and their images in the official layout, whose evaluator counts PNG files alone.

    PNG files are copied, others become PNG with the same pixels.

    Raises:
        OSError: the disk refuses.
        StoreError: an image is damaged.
    """
    for number, entry in enumerate(entries):
        samples = folder / f"{number:05d}" / SAMPLES
        samples.mkdir(parents=True)
        for index, image in enumerate(entry.images):
            target = samples / f"{index:04d}.png"
            if image.suffix == ".png":
                shutil.copyfile(image, target)
                continue
            try:
                open_image(image).save(target)
            except UnusableImageError as error:
                raise StoreError(f"the image {image} cannot be exported ({error}): delete its shard") from error
        if (source := entry.prompt.source) is not None:
            source.save(samples.parent / SOURCE)
        (samples.parent / METADATA).write_text(metadata_line(entry.prompt) + "\n", encoding="utf-8")


def refuse_used(folder: Path, *, what: str = "images") -> None:
    """Check, before any work, that a folder is empty or missing, and that it can be written.

    Raises:
        UserError: the folder is not empty, or it cannot be written.
    """
    refused = f"the {what} cannot be written to {folder}"
    try:
        is_used = folder.exists() and any(folder.iterdir())
        above = Path(os.path.realpath(folder)).parent
        while not os.path.lexists(above):
            above = above.parent
    except OSError as error:
        raise UserError(f"{refused} ({error.strerror or error}): name another folder") from error
    if is_used:
        raise UserError(f"{folder} is not empty: name a new folder for the {what}")
    if not above.is_dir():
        raise UserError(f"{refused} ({above} is not a folder): name another one")
    if not os.access(above, os.W_OK | os.X_OK):
        raise UserError(f"{refused} (no permission to write in {above}): name another folder or change its permissions")


def metadata_line(prompt: PromptRecord) -> str:
    """The prompt in the form of the official metadata; a file of such lines is a prompt file."""
    target = {} if prompt.target is None else {"target": prompt.target}
    image = {} if prompt.image is None else {IMAGE: SOURCE}
    return json.dumps({**prompt.metadata, **target, **image, "prompt": prompt.prompt}, ensure_ascii=False)
