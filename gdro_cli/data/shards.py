"""One shard of a group store: the files of a few prompts, written together and checked when read.

    shards/00003/manifest.json         which prompts, and size and SHA-256 of every other file; written last
                 index.jsonl           one row per image: prompt id, index, seed, file
                 tensors.safetensors   <prompt id>/latents [K, ...] and <prompt id>/conditioning/<name>
                 images/<prompt id>-<index, three digits>.png

File names follow from the prompt ids; none is taken from a file, so nothing outside the shard is ever
touched.
"""

from __future__ import annotations

import io
import os
import re
import stat
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import safetensors.torch
import torch
from PIL import Image
from safetensors import SafetensorError

from gdro_cli.data.records import PromptRecord
from gdro_cli.files import json_bytes, json_lines, parse_json, read_bytes, sha256, write_folder

SHARD_SCHEMA = 1
ImageFormat = Literal["png", "webp"]

MANIFEST, INDEX, TENSORS = "manifest.json", "index.jsonl", "tensors.safetensors"
PNG_LEVEL = 4
"""Compression of PNG files (0..9): nearly the size of the default 6 in half the time."""

_NAME = re.compile(r"[A-Za-z0-9_.-]+")


@dataclass(frozen=True, slots=True)
class Group:
    """The K images of one prompt, as sampling makes them."""

    prompt: PromptRecord
    latents: torch.Tensor
    """[K, ...] clean latents x0 in the dtype that training shall read."""
    conditioning: Mapping[str, torch.Tensor]
    """Outputs of the text encoders for this prompt, without a batch dimension."""
    images: Sequence[Image.Image]
    """K decoded pictures."""
    seeds: Sequence[int]
    """Seed of each image's noise, K integers."""


@dataclass(frozen=True, slots=True)
class StoredImage:
    """One picture of the store."""

    prompt: PromptRecord
    index: int
    """Place in its group, 0..K-1."""
    seed: int
    path: Path


@dataclass(frozen=True, slots=True)
class StoredGroup:
    """What training needs of one group; the pictures stay on the disk."""

    prompt: PromptRecord
    latents: torch.Tensor
    """[K, ...] in the stored dtype."""
    conditioning: dict[str, torch.Tensor]
    seeds: tuple[int, ...]


class ShardDamageError(Exception):
    """What is wrong with a shard that has a manifest; the store adds which shard it is and what to do."""


@dataclass(frozen=True, slots=True)
class Shard:
    """Where a shard lies and what it has to hold."""

    folder: Path
    number: int
    store_digest: str
    prompts: tuple[PromptRecord, ...]
    images_per_prompt: int
    image_format: ImageFormat

    @property
    def image_names(self) -> list[str]:
        """Relative names of the pictures, prompt by prompt."""
        return [self._image_name(prompt.id, index) for prompt, index in self.slots()]

    def slots(self) -> Iterator[tuple[PromptRecord, int]]:
        """Every (prompt, image index) in order."""
        return ((prompt, index) for prompt in self.prompts for index in range(self.images_per_prompt))

    def write(self, groups: Sequence[Group]) -> None:
        """Write the shard as a whole.

        ``groups`` are its prompts in order, else ValueError. Raises StoreError.
        """
        self._check_groups(groups)
        files = {TENSORS: _tensor_bytes(groups), INDEX: json_lines(self._index_rows(groups))}
        for group in groups:
            for index, image in enumerate(group.images):
                files[self._image_name(group.prompt.id, index)] = _image_bytes(image, self.image_format)
        content = {name: {"bytes": len(data), "sha256": sha256(data)} for name, data in files.items()}
        files[MANIFEST] = json_bytes(self._head() | {"files": content})
        write_folder(self.folder, files, last=MANIFEST)

    def manifest(self) -> dict[str, Any] | None:
        """The manifest, checked to be this shard's; ``None`` while the shard is missing.

        Raises ShardDamageError.
        """
        try:
            value = parse_json(read_bytes(self.folder / MANIFEST))
        except (FileNotFoundError, NotADirectoryError):
            return None
        except OSError as error:
            raise ShardDamageError(f"{MANIFEST} cannot be read: {error.strerror or error}") from error
        except (ValueError, RecursionError) as error:
            raise ShardDamageError(f"{MANIFEST} is not JSON") from error
        if not isinstance(value, dict):
            raise ShardDamageError(f"{MANIFEST} is not a JSON object")
        for key, expected in self._head().items():
            if value.get(key) != expected:
                raise ShardDamageError(f"{MANIFEST} has another {key} than the store")
        files = value.get("files")
        if not isinstance(files, dict) or set(files) != {TENSORS, INDEX, *self.image_names}:
            raise ShardDamageError(f"{MANIFEST} lists other files than the shard has to hold")
        for entry in files.values():
            if not isinstance(entry, dict) or set(entry) != {"bytes", "sha256"}:
                raise ShardDamageError(f"{MANIFEST} has a file entry without bytes and sha256")
        return value

    def check_sizes(self) -> bool:
        """Whether the shard is there, with every file at its full size (contents are checked when they are
        read).

        Raises ShardDamageError.
        """
        manifest = self.manifest()
        if manifest is None:
            return False
        for name, entry in manifest["files"].items():
            try:
                status = os.lstat(self.folder / name)
            except OSError as error:
                raise ShardDamageError(f"{name} is missing") from error
            if not stat.S_ISREG(status.st_mode):
                raise ShardDamageError(f"{name} is not a regular file")
            if status.st_size != entry["bytes"]:
                raise ShardDamageError(f"{name} has {status.st_size} bytes instead of {entry['bytes']}")
        return True

    def groups(self, manifest: Mapping[str, Any]) -> list[StoredGroup]:
        """Read latents, conditioning and seeds, digests checked. Raises ShardDamageError."""
        seeds = self.seeds(manifest)
        try:
            tensors = safetensors.torch.load(self._read(TENSORS, manifest))
        except SafetensorError as error:
            raise ShardDamageError(f"{TENSORS} cannot be read: {error}") from error
        found: list[StoredGroup] = []
        for place, prompt in enumerate(self.prompts):
            prefix = f"{prompt.id}/conditioning/"
            latents = tensors.get(f"{prompt.id}/latents")
            if latents is None or latents.ndim < 2 or latents.shape[0] != self.images_per_prompt:
                raise ShardDamageError(
                    f"{TENSORS} has no latents of {self.images_per_prompt} images for prompt {prompt.id}"
                )
            conditioning = {key.removeprefix(prefix): value for key, value in tensors.items() if key.startswith(prefix)}
            first = place * self.images_per_prompt
            found.append(
                StoredGroup(prompt, latents, conditioning, tuple(seeds[first : first + self.images_per_prompt]))
            )
        return found

    def seeds(self, manifest: Mapping[str, Any]) -> list[int]:
        """The seed of every image, in the order of ``slots``. Raises ShardDamageError."""
        try:
            rows = [parse_json(line) for line in self._read(INDEX, manifest).splitlines()]
            found = [(row["prompt_id"], row["index"], int(row["seed"])) for row in rows]
        except (ValueError, KeyError, TypeError) as error:
            raise ShardDamageError(f"{INDEX} has a row that cannot be read") from error
        if [(name, index) for name, index, _ in found] != [(prompt.id, index) for prompt, index in self.slots()]:
            raise ShardDamageError(f"{INDEX} lists other images than the shard has to hold")
        return [seed for _, _, seed in found]

    def images(self, manifest: Mapping[str, Any]) -> list[StoredImage]:
        """Every picture of the shard, digests checked. Raises ShardDamageError."""
        seeds = self.seeds(manifest)
        for name in self.image_names:
            self._read(name, manifest)
        return [
            StoredImage(prompt, index, seed, self.folder / self._image_name(prompt.id, index))
            for (prompt, index), seed in zip(self.slots(), seeds, strict=True)
        ]

    def _read(self, name: str, manifest: Mapping[str, Any]) -> bytes:
        path = self.folder / name
        if path.is_symlink():
            raise ShardDamageError(f"{name} is not a regular file")
        try:
            data = read_bytes(path)
        except OSError as error:
            raise ShardDamageError(f"{name} cannot be read: {error.strerror or error}") from error
        entry = manifest["files"][name]
        if len(data) != entry["bytes"]:
            raise ShardDamageError(f"{name} has {len(data)} bytes instead of {entry['bytes']}")
        if sha256(data) != entry["sha256"]:
            raise ShardDamageError(f"{name} was changed: its SHA-256 is not the one in {MANIFEST}")
        return data

    def _head(self) -> dict[str, Any]:
        names = [prompt.id for prompt in self.prompts]
        return {"schema": SHARD_SCHEMA, "shard": self.number, "store": self.store_digest, "prompts": names}

    def _image_name(self, prompt_id: str, index: int) -> str:
        return f"images/{prompt_id}-{index:03d}.{self.image_format}"

    def _index_rows(self, groups: Sequence[Group]) -> Iterator[dict[str, Any]]:
        for group in groups:
            for index, seed in enumerate(group.seeds):
                name = self._image_name(group.prompt.id, index)
                yield {"prompt_id": group.prompt.id, "index": index, "seed": int(seed), "file": name}

    def _check_groups(self, groups: Sequence[Group]) -> None:
        if [group.prompt.id for group in groups] != [prompt.id for prompt in self.prompts]:
            raise ValueError(f"shard {self.number} needs the prompts {[prompt.id for prompt in self.prompts]} in order")
        count = self.images_per_prompt
        for group in groups:
            if not (group.latents.shape[:1] == (count,) and len(group.images) == len(group.seeds) == count):
                raise ValueError(f"prompt {group.prompt.id} needs {count} latents, images and seeds")
            for name in group.conditioning:
                if not _NAME.fullmatch(name):
                    raise ValueError(f"{name!r} is no name for a conditioning tensor")


def _tensor_bytes(groups: Sequence[Group]) -> bytes:
    tensors: dict[str, torch.Tensor] = {}
    for group in groups:
        tensors[f"{group.prompt.id}/latents"] = _own_copy(group.latents)
        for name, tensor in group.conditioning.items():
            tensors[f"{group.prompt.id}/conditioning/{name}"] = _own_copy(tensor)
    return safetensors.torch.save(tensors)


def _own_copy(tensor: torch.Tensor) -> torch.Tensor:
    """A contiguous CPU tensor that shares no memory (safetensors refuses shared memory)."""
    return tensor.detach().to("cpu", copy=True).contiguous()


def _image_bytes(image: Image.Image, image_format: ImageFormat) -> bytes:
    buffer = io.BytesIO()
    if image_format == "png":
        image.convert("RGB").save(buffer, "PNG", compress_level=PNG_LEVEL)
    else:
        image.convert("RGB").save(buffer, "WEBP", lossless=True)
    return buffer.getvalue()
