"""The group store: groups of images on disk, in shards that are whole or missing.

    store/manifest.json    what the store is: identity, prompts, images per prompt, the prompts of each shard
          shards/00000/    one shard (see ``shards.py``)
          scores/<digest>/ score tables (see ``scores.py``)

Opening a store with another identity than its own is refused with the differences. A shard without a manifest
is missing and made again; one whose files do not match its manifest is an error that names it and the remedy.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self, TypeVar, get_args

from gdro_cli.data.records import PromptRecord, PromptSet
from gdro_cli.data.shards import Group, ImageFormat, Shard, ShardDamageError, StoredGroup, StoredImage
from gdro_cli.errors import StoreError
from gdro_cli.files import json_bytes, parse_json, read_bytes, refuse_links, sha256, write_new_bytes
from gdro_cli.identity import canonical_json, differences, digest

__all__ = ["Group", "GroupStore", "ImageFormat", "StoredGroup", "StoredImage"]

STORE_SCHEMA = 1
_KIND = "gdro group store"
_MANIFEST = "manifest.json"
_MAX_DIFFERENCES = 8
"""How many differences between two identities one message lists."""
_MAX_SHOWN = 60
"""Characters of a value shown in a message."""

_T = TypeVar("_T")


@dataclass(frozen=True, slots=True)
class GroupStore:
    """A group store; make or open it with ``create_or_open`` or ``open``."""

    path: Path
    identity: Mapping[str, Any]
    """What the images depend on, as JSON: recipe section, model, prompts, seed."""
    prompts: tuple[PromptRecord, ...]
    images_per_prompt: int
    image_format: ImageFormat
    shards: tuple[tuple[PromptRecord, ...], ...]
    """The prompts of each shard, in order."""
    digest: str
    """Short digest of everything above but the path."""
    command: str = "gdro sample"
    """The command that makes the shards, for messages."""

    @classmethod
    def create_or_open(
        cls,
        path: Path,
        *,
        identity: Mapping[str, Any],
        prompts: PromptSet,
        images_per_prompt: int,
        prompts_per_shard: int,
        image_format: ImageFormat = "png",
        command: str = "gdro sample",
    ) -> Self:
        """Make an empty store at ``path``, or open the one that is there if it is the same.

        An existing store keeps its division into shards and its file format: ``prompts_per_shard`` and
        ``image_format`` change no pixel and are not compared.

        Raises StoreError for a store of something else (listing what differs), a damaged one, or a
        folder that cannot be written; ValueError for impossible numbers.
        """
        if not prompts.records or images_per_prompt < 1 or prompts_per_shard < 1:
            raise ValueError("a store needs prompts, images per prompt and prompts per shard")
        manifest = path / _MANIFEST
        if not os.path.exists(manifest):  # False, not an error, where the folder cannot be entered
            names = [record.id for record in prompts.records]
            content: dict[str, Any] = {
                "kind": _KIND,
                "schema": STORE_SCHEMA,
                "identity": _as_json(identity),
                "images_per_prompt": images_per_prompt,
                "image_format": image_format,
                "prompts": [record.to_json() for record in prompts.records],
                "shards": [names[i : i + prompts_per_shard] for i in range(0, len(names), prompts_per_shard)],
            }
            if not write_new_bytes(manifest, json_bytes(content | {"digest": digest(content)})):
                refuse_links([manifest])  # else another process has made the store just now
        store = cls.open(path, command=command)
        store._refuse_other(_described(identity, prompts.records, images_per_prompt))
        return store

    @classmethod
    def open(cls, path: Path, *, command: str = "gdro sample") -> Self:
        """Open the store at ``path``.

        Raises StoreError when there is none, or its manifest is damaged or too new.
        """
        content = _read_manifest(path, command)
        try:
            records = {value["id"]: PromptRecord.from_json(value) for value in content["prompts"]}
            shards = tuple(tuple(records[name] for name in names) for names in content["shards"])
            count, image_format = content["images_per_prompt"], content["image_format"]
            identity = content["identity"]
        except (KeyError, TypeError, ValueError) as error:
            raise StoreError(_damaged(path, f"an entry cannot be used ({error})", command)) from error
        if [record for shard in shards for record in shard] != list(records.values()):
            raise StoreError(_damaged(path, "the shards do not hold each prompt once", command))
        known_format = isinstance(image_format, str) and image_format in get_args(ImageFormat)
        if not isinstance(count, int) or count < 1 or not known_format or not isinstance(identity, dict):
            raise StoreError(_damaged(path, "an entry has an impossible value", command))
        prompts = tuple(records.values())
        return cls(path, identity, prompts, count, image_format, shards, content["digest"], command)

    def missing_shards(self) -> list[int]:
        """Numbers of the shards that still have to be made. Raises StoreError for a damaged shard."""
        return [number for number in range(len(self.shards)) if not self._guarded(number, Shard.check_sizes)]

    def write_shard(self, number: int, groups: Sequence[Group]) -> None:
        """Write shard ``number``: one group per prompt of ``shards[number]``, in that order, all or nothing.

        Raises ValueError when the groups are not those, StoreError when the disk refuses or a latent is not
        finite.
        """
        shard = self._shard(number)
        for group in groups:
            if not bool(group.latents.isfinite().all()):
                raise StoreError(
                    f"the latents of prompt {group.prompt.id} ({group.prompt.prompt[:80]!r}) are not finite, "
                    f"so shard {number:05d} was not written: sample with another dtype (float32 or bfloat16) "
                    "or with less guidance"
                )
        shard.write(groups)

    def read_shard(self, number: int) -> list[StoredGroup]:
        """Latents, conditioning and seeds of a shard, digests checked; no picture is opened.

        Raises StoreError.
        """
        manifest = self._manifest(number)
        return self._guarded(number, lambda shard: shard.groups(manifest))

    def images(self, number: int) -> list[StoredImage]:
        """The pictures of a shard in order, digests checked. Raises StoreError."""
        manifest = self._manifest(number)
        return self._guarded(number, lambda shard: shard.images(manifest))

    def shard_digest(self, number: int) -> str:
        """SHA-256 of the shard's manifest, and so of all its contents.

        Raises StoreError when it is missing.
        """
        return sha256(canonical_json(self._manifest(number)).encode("ascii"))

    def _manifest(self, number: int) -> Mapping[str, Any]:
        manifest = self._guarded(number, Shard.manifest)
        if manifest is None:
            raise StoreError(f"shard {number:05d} of the store {self.path} is missing: run `{self.command}`")
        return manifest

    def _shard(self, number: int) -> Shard:
        folder = self.path / "shards" / f"{number:05d}"
        return Shard(folder, number, self.digest, self.shards[number], self.images_per_prompt, self.image_format)

    def _guarded(self, number: int, read: Callable[[Shard], _T]) -> _T:
        shard = self._shard(number)
        try:
            self._refuse_links(shard)
            return read(shard)
        except ShardDamageError as damage:
            raise StoreError(
                f"shard {number:05d} of the store {self.path} is damaged ({damage}): "
                f"delete the folder {shard.folder} and run `{self.command}`, which makes it again"
            ) from damage

    def _refuse_links(self, shard: Shard) -> None:
        for folder in (self.path / "shards", shard.folder, shard.folder / "images"):
            if folder.is_symlink():
                raise ShardDamageError(f"{folder.name} is a link that leaves the store")

    def _refuse_other(self, asked: Mapping[str, Any]) -> None:
        held = _described(self.identity, self.prompts, self.images_per_prompt)
        found = [
            f"{item.path}: {_shown(item.before, item.before_present)} there, "
            f"{_shown(item.after, item.after_present)} asked"
            for item in differences(held, asked)
        ]
        if not found:
            return
        more = [f"and {len(found) - _MAX_DIFFERENCES} more"] if len(found) > _MAX_DIFFERENCES else []
        shown = "; ".join(found[:_MAX_DIFFERENCES] + more)
        raise StoreError(
            f"the store {self.path} was made from something else; {shown}: "
            f"choose another folder, or delete this one and run `{self.command}`"
        )


def _shown(value: Any, present: bool) -> str:
    text = json.dumps(value, ensure_ascii=False) if present else "nothing"
    return text if len(text) <= _MAX_SHOWN else text[: _MAX_SHOWN - 3] + "..."


def _described(identity: Mapping[str, Any], prompts: Sequence[PromptRecord], images_per_prompt: int) -> dict[str, Any]:
    return _as_json(identity) | {
        "images_per_prompt": images_per_prompt,
        "prompt_set": {"count": len(prompts), "digest": digest([record.id for record in prompts])},
    }


def _as_json(value: Mapping[str, Any]) -> dict[str, Any]:
    """``value`` as it comes back from a JSON file: tuples are lists, keys are texts."""
    plain: dict[str, Any] = json.loads(canonical_json(value))
    return plain


def _damaged(path: Path, what: str, command: str) -> str:
    return f"the manifest of the store {path} is damaged ({what}): restore it, or delete the folder and run `{command}`"


def _read_manifest(path: Path, command: str) -> dict[str, Any]:
    try:
        value = parse_json(read_bytes(path / _MANIFEST))
    except (FileNotFoundError, NotADirectoryError) as error:
        raise StoreError(f"there is no group store at {path}: run `{command}`") from error
    except OSError as error:
        raise StoreError(
            f"the store {path} cannot be read: {error.strerror or error}; check its permissions"
        ) from error
    except (ValueError, RecursionError) as error:
        raise StoreError(_damaged(path, "it is not JSON", command)) from error
    if not isinstance(value, dict) or value.get("kind") != _KIND:
        raise StoreError(f"{path / _MANIFEST} belongs to something that is not a group store: choose another folder")
    if value.get("schema") != STORE_SCHEMA:
        raise StoreError(
            f"the store {path} has schema {value.get('schema')!r}, this version reads {STORE_SCHEMA}: "
            f"use the version that made it, or delete the folder and run `{command}`"
        )
    content = {key: entry for key, entry in value.items() if key != "digest"}
    if value.get("digest") != _digest_or_none(content):
        raise StoreError(_damaged(path, "its content does not match its digest", command))
    return value


def _digest_or_none(value: Any) -> str | None:
    try:
        return digest(value)
    except ValueError:
        return None
