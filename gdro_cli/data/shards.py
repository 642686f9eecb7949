"""One shard of a group store: the files of a few prompts, written together and checked when they are read.

    shards/00003/manifest.json         the prompts, and size and SHA-256 of every other file
                 index.jsonl           one row per image: prompt id, index, seed or source, file
                 tensors.safetensors   <prompt id>/latents [K, ...] and <prompt id>/conditioning/<name>
                 images/<prompt id>-<index, three digits>.png, unless the store keeps no images
                 images/<prompt id>-source.png, the image that the prompt edits, if it edits one

File names are derived from the prompt ids and never read from a file, so nothing outside the shard is touched.
"""

from __future__ import annotations

import io
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from itertools import islice, repeat
from pathlib import Path
from typing import Any, Literal

import safetensors.torch
import torch
from PIL import Image
from safetensors import SafetensorError

from gdro_cli.data.records import PromptRecord
from gdro_cli.data.sources import SourceImage
from gdro_cli.errors import StoreError
from gdro_cli.files import json_bytes, json_lines, new_folder, parse_json, read_file, read_object, refuse_links, sha256

SHARD_SCHEMA = 1
ImageFormat = Literal["png", "webp", "none"]

MANIFEST, INDEX, TENSORS = "manifest.json", "index.jsonl", "tensors.safetensors"
PNG_LEVEL = 4
"""Compression of PNG files (0..9): nearly the size of the default 6 in half the time."""


@dataclass(frozen=True, slots=True)
class Group:
    """The K images of one prompt."""

    prompt: PromptRecord
    latents: torch.Tensor
    """[K, ...] clean latents x0 in the dtype that training reads."""
    conditioning: Mapping[str, torch.Tensor]
    """Outputs of the text encoders for this prompt, without a batch dimension."""
    images: Sequence[Image.Image]
    """K decoded images; none if the store keeps no images."""
    origins: Sequence[Mapping[str, Any]]
    """Where each of the K images comes from: ``seed`` of its noise, or ``source`` and ``sha256`` of a user's file."""
    source: Image.Image | None = None
    """The image that the prompt edits, as the model saw it."""


@dataclass(frozen=True, slots=True)
class StoredImage:
    """One image of the store."""

    prompt: PromptRecord
    """With its source image in the store, if it edits one."""
    index: int
    """Index in its group, 0..K-1."""
    path: Path


@dataclass(frozen=True, slots=True)
class StoredGroup:
    """The part of a group that training reads; the images remain on disk."""

    prompt: PromptRecord
    latents: torch.Tensor
    """[K, ...] in the stored dtype."""
    conditioning: dict[str, torch.Tensor]
    origins: tuple[Mapping[str, Any], ...]


@dataclass(frozen=True, slots=True)
class Shard:
    """The folder of a shard and its expected content."""

    folder: Path
    number: int
    store_digest: str
    prompts: tuple[PromptRecord, ...]
    sizes: tuple[int, ...]
    """Images of each prompt."""
    image_format: ImageFormat
    command: str
    """The command that makes the shard, for messages."""

    @property
    def image_names(self) -> list[str]:
        """Relative names of the images, prompt by prompt."""
        if self.image_format == "none":
            return []
        return [self._image_name(prompt.id, index) for prompt, index in self.slots()]

    @property
    def source_names(self) -> dict[str, str]:
        """Prompt id -> relative name of its source image, where it has one and the store keeps images."""
        edits = (prompt.id for prompt in self.prompts if prompt.image_sha256 and self.image_format != "none")
        return {prompt_id: f"images/{source_name(prompt_id, self.image_format)}" for prompt_id in edits}

    def slots(self) -> Iterator[tuple[PromptRecord, int]]:
        """Every (prompt, image index) in order."""
        sizes = zip(self.prompts, self.sizes, strict=True)
        return ((prompt, index) for prompt, size in sizes for index in range(size))

    def write(self, groups: Sequence[Group]) -> None:
        """Write the shard, whole or not at all.

        Raises ValueError unless ``groups`` are those of its prompts, in order. Raises StoreError.
        """
        self._check_groups(groups)
        files = {TENSORS: _tensor_bytes(groups), INDEX: json_lines(self._index_rows(groups))}
        sources = [
            group.source for group in groups if group.source is not None and group.prompt.id in self.source_names
        ]
        images = [*(image for group in groups for image in group.images), *sources]
        with ThreadPoolExecutor() as pool:  # Pillow releases the interpreter's lock while it compresses
            encoded = pool.map(_image_bytes, images, repeat(self.image_format))
            files |= zip([*self.image_names, *self.source_names.values()], encoded, strict=True)
        content = {name: {"bytes": len(data), "sha256": sha256(data)} for name, data in files.items()}
        files[MANIFEST] = json_bytes(self._head() | {"files": content})
        refuse_links([self.folder.parent])
        with new_folder(self.folder, replace=True) as unfinished:
            (unfinished / "images").mkdir()
            for name, data in files.items():
                (unfinished / name).write_bytes(data)

    def manifest(self) -> dict[str, Any] | None:
        """The manifest, checked to be this shard's; ``None`` if the shard is missing. Raises StoreError."""
        refuse_links((self.folder.parent, self.folder, self.folder / "images"))
        path = self.folder / MANIFEST
        if not path.exists():
            return None
        value = read_object(path, remedy=self._remedy)
        for key, expected in self._head().items():
            if value.get(key) != expected:
                raise self._damaged(MANIFEST, f"has another {key} than the store")
        if set(value.get("files", ())) != {TENSORS, INDEX, *self.image_names, *self.source_names.values()}:
            raise self._damaged(MANIFEST, "lists other files than those of the shard")
        return value

    def is_complete(self) -> bool:
        """Whether the shard is on disk, every file with its full size; contents are checked when they are read.

        Raises StoreError if a file is missing or has another size.
        """
        manifest = self.manifest()
        for name, entry in manifest["files"].items() if manifest else ():
            path = self.folder / name
            if not path.is_file() or path.stat().st_size != entry["bytes"]:
                raise self._damaged(name, f"is missing or does not have {entry['bytes']} bytes")
        return manifest is not None

    def groups(self, manifest: Mapping[str, Any]) -> list[StoredGroup]:
        """Read latents, conditioning and origins, digests checked. Raises StoreError."""
        origins = iter(self.origins(manifest))
        try:
            tensors = safetensors.torch.load(self._read(TENSORS, manifest))
        except SafetensorError as error:
            raise self._damaged(TENSORS, f"cannot be read ({error})") from error
        groups: list[StoredGroup] = []
        for prompt, size in zip(self.prompts, self.sizes, strict=True):
            prefix = f"{prompt.id}/conditioning/"
            conditioning = {key.removeprefix(prefix): value for key, value in tensors.items() if key.startswith(prefix)}
            own = tuple(islice(origins, size))
            groups.append(StoredGroup(prompt, tensors[f"{prompt.id}/latents"], conditioning, own))
        return groups

    def tensors_digest(self, manifest: Mapping[str, Any]) -> str:
        """SHA-256 of the tensors' file, as the manifest has it."""
        return str(manifest["files"][TENSORS]["sha256"])

    def origins(self, manifest: Mapping[str, Any]) -> list[dict[str, Any]]:
        """The origins of every image in order, digest checked; no tensor is read. Raises StoreError."""
        return [_origin(parse_json(line)) for line in self._read(INDEX, manifest).splitlines()]

    def images(self, manifest: Mapping[str, Any]) -> list[StoredImage]:
        """Every image of the shard, digests checked. Raises StoreError."""
        for name in (*self.image_names, *self.source_names.values()):
            self._read(name, manifest)
        paths = [self.folder / name for name in self.image_names]
        sources = {
            prompt_id: SourceImage(self.folder / name, manifest["files"][name]["sha256"])
            for prompt_id, name in self.source_names.items()
        }
        return [
            StoredImage(replace(prompt, image=sources.get(prompt.id)), index, path)
            for (prompt, index), path in zip(self.slots(), paths, strict=True)
        ]

    def _read(self, name: str, manifest: Mapping[str, Any]) -> bytes:
        return read_file(self.folder / name, digest=manifest["files"][name]["sha256"], remedy=self._remedy)

    @property
    def _remedy(self) -> str:
        return f"delete the folder {self.folder} and run `{self.command}`, which makes it again"

    def _damaged(self, name: str, what: str) -> StoreError:
        return StoreError(f"{self.folder / name} {what}: {self._remedy}")

    def _head(self) -> dict[str, Any]:
        names = [prompt.id for prompt in self.prompts]
        return {"schema": SHARD_SCHEMA, "shard": self.number, "store": self.store_digest, "prompts": names}

    def _image_name(self, prompt_id: str, index: int) -> str:
        return f"images/{prompt_id}-{index:03d}.{self.image_format}"

    def _index_rows(self, groups: Sequence[Group]) -> Iterator[dict[str, Any]]:
        for group in groups:
            for index, origin in enumerate(group.origins):
                row = {"prompt_id": group.prompt.id, "index": index, **origin}
                yield row if self.image_format == "none" else row | {"file": self._image_name(group.prompt.id, index)}

    def _check_groups(self, groups: Sequence[Group]) -> None:
        if [group.prompt.id for group in groups] != [prompt.id for prompt in self.prompts]:
            raise ValueError(f"shard {self.number} needs the prompts {[prompt.id for prompt in self.prompts]} in order")
        for group, count in zip(groups, self.sizes, strict=True):
            images = 0 if self.image_format == "none" else count
            if not (len(group.latents) == len(group.origins) == count and len(group.images) == images):
                raise ValueError(f"prompt {group.prompt.id} needs {count} latents and origins, and {images} images")
            if group.source is None and group.prompt.id in self.source_names:
                raise ValueError(f"prompt {group.prompt.id} needs its source image")


def source_name(prompt_id: str, image_format: str) -> str:
    """The file of a prompt's source image, beside its images."""
    return f"{prompt_id}-source.{image_format}"


def _origin(row: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in row.items() if key not in ("prompt_id", "index", "file")}


def _tensor_bytes(groups: Sequence[Group]) -> bytes:
    tensors: dict[str, torch.Tensor] = {}
    for group in groups:
        tensors[f"{group.prompt.id}/latents"] = _own_copy(group.latents)
        for name, tensor in group.conditioning.items():
            tensors[f"{group.prompt.id}/conditioning/{name}"] = _own_copy(tensor)
    return safetensors.torch.save(tensors)


def _own_copy(tensor: torch.Tensor) -> torch.Tensor:
    """A contiguous copy on the CPU; safetensors refuses tensors that share memory."""
    return tensor.detach().to("cpu", copy=True).contiguous()


def _image_bytes(image: Image.Image, image_format: ImageFormat) -> bytes:
    buffer = io.BytesIO()
    if image_format == "png":
        image.convert("RGB").save(buffer, "PNG", compress_level=PNG_LEVEL)
    else:
        image.convert("RGB").save(buffer, "WEBP", lossless=True)
    return buffer.getvalue()
