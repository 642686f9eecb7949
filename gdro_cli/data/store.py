"""The group store: groups of images on disk, in shards that are whole or missing.

    store/manifest.json    identity, prompts, images of each prompt, the prompts of each shard
          shards/00000/    one shard (see ``shards.py``)
          scores/<digest>/ score tables (see ``scores.py``)

Opening a store for another identity is an error that lists the differences. A shard without a manifest is missing and
is made again. A shard whose files do not match its manifest is an error that names the file and the remedy.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Self, get_args

from gdro_cli.data.records import PromptRecord, PromptSet
from gdro_cli.data.shards import Group, ImageFormat, Shard, StoredGroup, StoredImage
from gdro_cli.errors import StoreError
from gdro_cli.files import read_object, sha256, storage_errors, write_json
from gdro_cli.identity import canonical_json, differences, digest

__all__ = ["Group", "GroupStore", "ImageFormat", "StoredGroup", "StoredImage"]

STORE_SCHEMA = 1
_KIND = "gdro group store"
_MANIFEST = "manifest.json"
_MOST_DIFFERENCES = 8
"""How many differences between two identities one message lists."""
_MOST_CHARACTERS = 160
"""Characters of a difference shown in a message."""


@dataclass(frozen=True, slots=True)
class GroupStore:
    """A group store. Use ``create_or_open`` or ``open``."""

    path: Path
    identity: Mapping[str, Any]
    """Everything that the images depend on, as JSON: recipe section, model, prompts, seed."""
    prompts: tuple[PromptRecord, ...]
    sizes: Mapping[str, int]
    """Prompt id -> images in its group."""
    weights: Mapping[str, float]
    """Prompt id -> weight of its group in training; a group that is not named has weight 1."""
    image_format: ImageFormat
    shards: tuple[tuple[PromptRecord, ...], ...]
    """The prompts of each shard, in order."""
    digest: str
    """Short digest of everything above except the path."""
    command: str = "gdro sample"
    """The command that makes the shards, for messages."""

    @classmethod
    def create_or_open(
        cls,
        path: Path,
        *,
        identity: Mapping[str, Any],
        prompts: PromptSet,
        images_per_prompt: int | Sequence[int],
        prompts_per_shard: int,
        image_format: ImageFormat = "png",
        weights: Mapping[str, float] | None = None,
        command: str = "gdro sample",
    ) -> Self:
        """Make an empty store at ``path``, or open the store at ``path`` if it has the same identity.

        An existing store keeps its shards, its file format and its weights: ``prompts_per_shard`` and ``image_format``
        change no pixel and are not compared, and ``identity`` has a digest of the data that the weights came with.

        Args:
            path: folder of the store.
            identity: everything that the images depend on, as JSON.
            prompts: one group each. The manifest has no paths, so these records are the ones that know the files of
                their source images; the store has them as its own.
            images_per_prompt: the size of all groups, or of each.
            prompts_per_shard: groups in a shard.
            image_format: how images are kept, if they are.
            weights: prompt id -> weight of its group, where it is not 1.
            command: makes the shards, for messages.

        Raises StoreError if the store has another identity (with the differences) or is damaged, or if the folder
        cannot be written.
        """
        if not cls.exists(path):
            ids = [record.id for record in prompts.records]
            content: dict[str, Any] = {
                "kind": _KIND,
                "schema": STORE_SCHEMA,
                "identity": identity,
                "images_per_prompt": _plain_sizes(images_per_prompt),
                "image_format": image_format,
                **({"weights": weights} if weights else {}),
                "prompts": [record.to_json() for record in prompts.records],
                "shards": [ids[i : i + prompts_per_shard] for i in range(0, len(ids), prompts_per_shard)],
            }
            write_json(path / _MANIFEST, content | {"digest": digest(content)})
        store = cls.open(path, command=command)
        store._refuse_other(_described(identity, prompts.records, _plain_sizes(images_per_prompt)))
        given = {record.id: record for record in prompts.records}
        shards = tuple(tuple(given[record.id] for record in shard) for shard in store.shards)
        return replace(store, prompts=prompts.records, shards=shards)

    @staticmethod
    def exists(path: Path) -> bool:
        """Whether there is a store, whole or not; a folder without a manifest is none."""
        return os.path.exists(path / _MANIFEST)  # False, not an error, if the folder cannot be entered

    @classmethod
    def open(cls, path: Path, *, command: str = "gdro sample") -> Self:
        """Open the store at ``path``. Raises StoreError if its manifest is missing, damaged or of another version."""
        content = _read_manifest(path, command)
        try:
            records = {value["id"]: PromptRecord.from_json(value) for value in content["prompts"]}
            shards = tuple(tuple(records[name] for name in names) for names in content["shards"])
            counts, image_format = content["images_per_prompt"], content["image_format"]
            each = counts if isinstance(counts, list) else [counts] * len(records)
            sizes = dict(zip(records, each, strict=True))
            weights, identity = dict(content.get("weights", {})), dict(content["identity"])
        except (KeyError, TypeError, ValueError) as error:
            raise _damaged(path, f"an entry cannot be used: {error}", command) from error
        if image_format not in get_args(ImageFormat):  # it becomes part of file names
            raise _damaged(path, "it has an unknown image format", command)
        prompts = tuple(records.values())
        return cls(path, identity, prompts, sizes, weights, image_format, shards, content["digest"], command)

    @property
    def images_in_all(self) -> int:
        """Images of all groups together."""
        return sum(self.sizes.values())

    def images_in(self, number: int) -> int:
        """Images of shard ``number``."""
        return sum(self.sizes[prompt.id] for prompt in self.shards[number])

    def discard(self) -> None:
        """Remove the manifest of a store without shards, as if it had never been made. Raises StoreError."""
        with storage_errors(self.path):
            (self.path / _MANIFEST).unlink()

    def missing_shards(self) -> list[int]:
        """Numbers of the shards that are missing. Raises StoreError for a damaged shard."""
        return [number for number in range(len(self.shards)) if not self._shard(number).is_complete()]

    def write_shard(self, number: int, groups: Sequence[Group]) -> None:
        """Write shard ``number``: one group per prompt of ``shards[number]``, in that order, all or nothing.

        Raises ValueError for other groups, and StoreError if the disk refuses or a latent is not finite.
        """
        for group in groups:
            if not bool(group.latents.isfinite().all()):
                raise StoreError(
                    f"the latents of prompt {group.prompt.id} ({group.prompt.prompt[:80]!r}) are not finite, "
                    f"so shard {number:05d} was not written: sample with another dtype (float32 or bfloat16) "
                    "or with less guidance"
                )
        self._shard(number).write(groups)

    def read_shard(self, number: int) -> list[StoredGroup]:
        """Latents, conditioning and origins of a shard, digests checked; no image is opened. Raises StoreError."""
        return self._shard(number).groups(self._manifest(number))

    def origins(self, number: int) -> list[dict[str, Any]]:
        """Where each image of a shard comes from, in order; no tensor is read. Raises StoreError."""
        return self._shard(number).origins(self._manifest(number))

    def images(self, number: int) -> list[StoredImage]:
        """The images of a shard in order, digests checked. Raises StoreError, also if the store keeps no images."""
        if self.image_format == "none":
            raise StoreError(f"the store {self.path} keeps no images: delete it and run `{self.command} --keep-images`")
        return self._shard(number).images(self._manifest(number))

    def tensors_digest(self, number: int) -> str:
        """SHA-256 of the shard's latents and conditioning. Raises StoreError if the shard is missing."""
        return self._shard(number).tensors_digest(self._manifest(number))

    def shard_digest(self, number: int) -> str:
        """SHA-256 of the shard's manifest, and so of all its content. Raises StoreError if the shard is missing."""
        return sha256(canonical_json(self._manifest(number)).encode("ascii"))

    def _manifest(self, number: int) -> Mapping[str, Any]:
        manifest = self._shard(number).manifest()
        if manifest is None:
            raise StoreError(f"shard {number:05d} of the store {self.path} is missing: run `{self.command}`")
        return manifest

    def _shard(self, number: int) -> Shard:
        return Shard(
            folder=self.path / "shards" / f"{number:05d}",
            number=number,
            store_digest=self.digest,
            prompts=self.shards[number],
            sizes=tuple(self.sizes[prompt.id] for prompt in self.shards[number]),
            image_format=self.image_format,
            command=self.command,
        )

    def _refuse_other(self, requested: Mapping[str, Any]) -> None:
        own = _described(self.identity, self.prompts, _plain_sizes(list(self.sizes.values())))
        changes = [str(difference)[:_MOST_CHARACTERS] for difference in differences(own, requested)]
        if changes:
            more = [f"and {len(changes) - _MOST_DIFFERENCES} more"] if len(changes) > _MOST_DIFFERENCES else []
            listed = "; ".join(changes[:_MOST_DIFFERENCES] + more)
            raise StoreError(
                f"the store {self.path} was made with other settings ({listed}): "
                f"choose another folder, or delete this one and run `{self.command}`"
            )


def _plain_sizes(sizes: int | Sequence[int]) -> int | list[int]:
    """One number if all groups have the same size."""
    if isinstance(sizes, int):
        return sizes
    return sizes[0] if len(set(sizes)) == 1 else list(sizes)


def _described(
    identity: Mapping[str, Any], prompts: Sequence[PromptRecord], images_per_prompt: int | list[int]
) -> dict[str, Any]:
    """The identity with the groups' sizes and prompts, as JSON values; equal stores have equal descriptions."""
    plain: dict[str, Any] = json.loads(canonical_json(identity))
    return plain | {
        "images_per_prompt": images_per_prompt,
        "prompt_set": {"count": len(prompts), "digest": digest([record.id for record in prompts])},
    }


def _remedy(command: str) -> str:
    return f"restore it, or delete the folder and run `{command}`"


def _damaged(path: Path, what: str, command: str) -> StoreError:
    return StoreError(f"{path / _MANIFEST} is damaged ({what}): {_remedy(command)}")


def _read_manifest(path: Path, command: str) -> dict[str, Any]:
    manifest = path / _MANIFEST
    value = read_object(manifest, remedy=_remedy(command))
    if value.get("kind") != _KIND:
        raise StoreError(f"{manifest} is not the manifest of a group store: choose another folder")
    if value.get("schema") != STORE_SCHEMA:
        raise StoreError(
            f"the store {path} has schema {value.get('schema')!r}, but this version reads {STORE_SCHEMA}: "
            f"use the version that made it, or delete the folder and run `{command}`"
        )
    if value.get("digest") != digest({key: entry for key, entry in value.items() if key != "digest"}):
        raise _damaged(path, "its content does not match its digest", command)
    return value
