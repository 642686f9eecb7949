"""What a folder holds: a table, the official GenEval layout, or images with the prompt beside each."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from gdro_cli.data.imagefolder import METADATA, image_files, read_image_folder
from gdro_cli.data.own_data.groups import ImageSource, OpenGroup, OwnData, OwnGroup, OwnImage
from gdro_cli.data.own_data.jsonl import SUFFIXES
from gdro_cli.data.own_data.parquet import SUFFIX
from gdro_cli.data.own_data.paths import find_image
from gdro_cli.data.promptfile import check_prompt
from gdro_cli.data.records import PromptRecord
from gdro_cli.errors import UserError

GENEVAL, SIDECARS = "GenEval layout", "images with sidecar prompts"
_TABLES = ("data.jsonl", METADATA)


def tables_in(folder: Path) -> list[Path]:
    """The files of the folder's only table: ``data.jsonl``, ``metadata.jsonl``, or all parquet files by name.

    Raises:
        UserError: it has several tables.
    """
    named = [[folder / name] for name in _TABLES if (folder / name).is_file()]
    parquet = [path for path in visible(folder) if path.suffix.lower() == SUFFIX]
    found = [*named, *([parquet] if parquet else [])]
    if len(found) > 1:
        names = ", ".join(files[0].name for files in found)
        raise UserError(f"{folder} has several tables ({names}): name the file that you mean")
    return found[0] if found else []


def visible(folder: Path) -> list[Path]:
    """The entries of a folder by name, without hidden ones. Raises UserError."""
    try:
        return sorted(path for path in folder.iterdir() if not path.name.startswith("."))
    except OSError as error:
        reason = error.strerror or error
        raise UserError(f"the folder {folder} cannot be read ({reason}): check its name and permissions") from error


def read_images(folder: Path) -> OwnData:
    """Read a folder without a table; its images have no scores.

    Raises:
        UserError: it has neither layout, an image has no prompt, or a file leads out of the folder.
    """
    if any(path.name.isdigit() and (path / METADATA).exists() for path in visible(folder)):
        return _geneval(folder)
    images, others = image_files(folder)
    if not images:
        tables = [path.name for path in others if path.suffix.lower() in SUFFIXES]
        folders = [path.name for path in others if path.is_dir()]
        hint = f"name one of its files, {', '.join(tables[:3])}" if tables else "docs/own-data.md has the forms of data"
        if folders and not tables:
            hint = f"name one of its folders, {', '.join(folders[:3])}, or write a table"
        raise UserError(f"{folder} has no table (data.jsonl, metadata.jsonl, *.parquet) and no images: {hint}")
    return _sidecars(folder, images, others)


def _geneval(folder: Path) -> OwnData:
    groups, others = [], []
    for entry in read_image_folder(folder, reward=_AnyPrompt()):
        where = entry.images[0].relative_to(folder).parts[0]
        groups.append(_group(folder, entry.prompt, entry.images, where))
        others += [str(path.relative_to(folder)) for path in entry.left_out]
    return OwnData(folder, GENEVAL, tuple(groups), tuple(_left_out("what is not an image", others)))


class _AnyPrompt:
    """Takes every prompt as it is."""

    name = "import"
    needs: frozenset[str] = frozenset()

    def read_prompt(self, prompt: str, *, target: str | None, metadata: Mapping[str, Any]) -> str | None:
        return target


def _sidecars(folder: Path, images: Sequence[Path], others: Sequence[Path]) -> OwnData:
    bare = [image.name for image in images if not image.with_suffix(".txt").is_file()]
    if bare:
        tables = [path.name for path in others if path.suffix.lower() in SUFFIXES]
        table = f"name its table, {_some(tables)}" if tables else "write a table"
        raise UserError(
            f"{folder} has images without a prompt ({len(bare)} of {len(images)}): write the prompt of {bare[0]} into"
            f" {Path(bare[0]).with_suffix('.txt')}, or {table}"
        )
    prompts = {path: _prompt(path) for path in dict.fromkeys(image.with_suffix(".txt") for image in images)}
    groups: dict[str, list[Path]] = {}
    for image in images:
        groups.setdefault(prompts[image.with_suffix(".txt")], []).append(image)
    listed = [_group(folder, PromptRecord.of(prompt), files, files[0].name) for prompt, files in groups.items()]
    folders = [path.name for path in others if path.is_dir()]
    files = [path.name for path in others if not path.is_dir() and path not in prompts]
    several = [path.name for path, prompt in prompts.items() if len(prompt.splitlines()) > 1]
    notes = [
        *_left_out("what is neither an image nor its prompt", files),
        *_left_out("folders, which are imported one by one", folders),
        *([f"prompts of several lines, each taken as one: {len(several)} ({_some(several)})"] if several else []),
    ]
    return OwnData(folder, SIDECARS, tuple(listed), tuple(notes))


def _left_out(what: str, names: Sequence[str]) -> list[str]:
    """A note about what lies in a folder and is not imported; none if there is nothing."""
    return [f"left out, {what}: {len(names)} ({_some(names)})"] if names else []


def _some(names: Sequence[str]) -> str:
    return ", ".join([*names[:3], *(["..."] if len(names) > 3 else [])])


def _prompt(path: Path) -> str:
    try:
        prompt = path.read_text(encoding="utf-8-sig").strip()
        check_prompt(prompt, None)
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror or error}): check its permissions") from error
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8 (byte {error.start + 1}): save the file as UTF-8") from error
    except ValueError as error:
        raise UserError(f"{path}: {error}") from error
    return prompt


def _group(folder: Path, record: PromptRecord, images: Sequence[Path], where: str) -> OwnGroup:
    edited = None if record.image is None else ImageSource(record.image.path, f"{where}/{record.image.path.name}")
    group = OpenGroup(record, 1.0, where, edited)
    try:
        for image in images:
            group.add(OwnImage(find_image(str(image.relative_to(folder)), folder), {}))
    except ValueError as error:
        raise UserError(f"{folder}: {error}") from error
    return group.close()
