"""Bring a user's data into the workspace: a group store of the images, and a table for each of the scores.

The data is checked as a whole before the first image is encoded. Encoding resumes shard by shard, and the scores come
last, so a store with scores is whole.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gdro_cli.config.recipe import Recipe
from gdro_cli.data.imported_scores import write_imported_scores
from gdro_cli.data.own_data import ImageSource, OwnData, read_own_data
from gdro_cli.data.records import PromptSet
from gdro_cli.data.store import GroupStore
from gdro_cli.errors import StoreError
from gdro_cli.files import sha256
from gdro_cli.identity import differences
from gdro_cli.images import Fitting
from gdro_cli.runtime.lock import folder_lock
from gdro_cli.stages.importing.encode_store import encode_store
from gdro_cli.stages.setup.imported import COMMAND, check_name, encoding_identity, imported_path
from gdro_cli.stages.setup.session import Session
from gdro_cli.stages.setup.sources import check_sources

DEMONSTRATION = "demonstration"
"""Name of the scores of data that has none: 1 for every image, for a method that needs no order."""
_SHARD_IMAGES = 128
"""Images that a shard has at least: smaller ones would spend their time on files."""
_OTHER_DATA = "data: other prompts, weights, source images or names of images"
"""In place of the two digests."""


@dataclass(frozen=True, slots=True)
class Import:
    """What to import, and how."""

    data: Path
    """A table, or a folder."""
    name: str
    """What recipes call it (``prompts.train.imported``)."""
    resize: Fitting = "crop"
    """How images are brought to the recipe's size."""
    keep_images: bool = False
    """Whether the store keeps the images beside their latents. It always does if the data has no scores."""


def import_name(data: Path, recipe: Recipe, given: str | None) -> str:
    """What the data is called: as given, else as in the recipe, else like the file.

    Raises:
        UserError: the name cannot be used.
    """
    return check_name(given or recipe.prompts.train.imported or data.resolve().stem, "the data")


@dataclass(frozen=True, slots=True)
class ImportResult:
    """A complete store of a user's data."""

    store: GroupStore
    data: OwnData
    enlarged: int
    """Images encoded by this call that were smaller than the recipe's size."""
    shards_made: int

    @property
    def summary(self) -> dict[str, str]:
        """What the command line prints."""
        name, scores = str(self.store.identity["imported"]), scores_of(self.data)
        rows = {"store": str(self.store.path), **_described(self.data)}
        if self.enlarged:
            rows["enlarged"] = f"{self.enlarged} images were smaller than the recipe's size"
        rows["shards made now"] = f"{self.shards_made} of {len(self.store.shards)}"
        keys = f"prompts.train.imported={name}"
        rows["to train on it"] = f"--set {keys} --set train.scores={scores[0]}"
        return rows


def run(session: Session, request: Import) -> ImportResult:
    """Import data; continues an import that was interrupted.

    Raises:
        UserError: the data cannot be used, or other data has this name.
        PrerequisiteError: the model is missing, or a package that reads the data.
        StoreError: the store is damaged, or the disk refuses.
        Interrupted: stopped by the user; finished shards are kept.
    """
    with session:
        engine = session.engine
        with engine.together():
            data = _read(session, request)
        for note in data.notes:
            session.reporter.say(note)
        store = engine.from_main(lambda: _open(session, request, data))
        made, enlarged = encode_store(session, store, data, how=request.resize)
        with engine.together():
            if engine.is_main:
                for name in scores_of(data):
                    write_imported_scores(store, name, _values(data, name))
        return ImportResult(store, data, enlarged, made)


def _read(session: Session, request: Import) -> OwnData:
    """The data. Raises UserError, also if it has images to edit and the model edits none, or the other way round."""
    data = read_own_data(request.data, edits=session.model.edits)
    check_sources([group.record for group in data.groups], session.model, where=str(request.data), key="source")
    return data


def describe(request: Import, recipe: Recipe, workspace: Path) -> list[tuple[str, str]]:
    """What the import would bring, as (what, how much). It makes nothing and opens no image.

    Raises:
        UserError: the data cannot be used.
        PrerequisiteError: the model is missing, or a package that reads the data.
    """
    session = Session(recipe, workspace, planning=True)
    data = _read(session, request)
    height, width = session.image_size
    rows = [
        ("data", str(request.data)),
        *_described(data).items(),
        *(("note", note) for note in data.notes),
        ("images become", f"{width} x {height}, {request.resize}"),
        ("size", _size_text(session, data)),
    ]
    path = imported_path(workspace, request.name, session.model, height=height, width=width)
    state = "none is made yet"
    if GroupStore.exists(path):
        store = GroupStore.open(path, command=COMMAND)
        _refuse_other(store, request, data, _identity(session, request, data))
        shards = len(store.shards)
        state = f"{shards - len(store.missing_shards())} of {shards} shards are made"
    return [*rows, ("store", f"{path}; {state}")]


def _size_text(session: Session, data: OwnData) -> str:
    """What the encoded data takes."""
    model, (height, width) = session.model, session.image_size
    latents = math.prod(model.latent_shape(height=height, width=width)) * sum(
        len(group.images) for group in data.groups
    )
    shapes = model.sized_shapes(model.max_sequence_length, height=height, width=width).values()
    texts = sum(math.prod(shape) for shape in shapes) * len(data.groups)
    sizes = [f"{values * model.dtype.itemsize / 1e6:,.0f} MB" for values in (latents, texts)]
    return f"latents {sizes[0]}, texts at most {sizes[1]}: on disk, and in the memory of each process that trains"


def scores_of(data: OwnData) -> Sequence[str]:
    """The names of the score tables that the data gets."""
    return data.score_names or (DEMONSTRATION,)


def _described(data: OwnData) -> dict[str, str]:
    sizes = [len(group.images) for group in data.groups]
    each = str(sizes[0]) if min(sizes) == max(sizes) else f"{min(sizes)} to {max(sizes)}"
    rows = {"form": data.form, "groups": f"{len(sizes)} of {each} images", "images": str(sum(sizes))}
    counts = {name: len(_values(data, name)) for name in scores_of(data)}
    rows["scores"] = ", ".join(f"{name} ({count} images)" for name, count in counts.items())
    if max(sizes) == 1:
        rows["note"] = "every group has one image, so only method.name sft can learn from them"
    return rows


def _values(data: OwnData, name: str) -> dict[tuple[str, int], float | str]:
    """The scores of a name by prompt id and index of the image; an image without one is left out."""
    slots = ((group, index, image) for group in data.groups for index, image in enumerate(group.images))
    if not data.score_names:
        return {(group.record.id, index): 1.0 for group, index, _ in slots}
    return {(group.record.id, index): image.scores[name] for group, index, image in slots if name in image.scores}


def _identity(session: Session, request: Import, data: OwnData) -> dict[str, Any]:
    height, width = session.image_size
    about = {"imported": request.name, "form": data.form, "data": data.digest, "resize": request.resize}
    return about | encoding_identity(session.model, height=height, width=width)


def _open(session: Session, request: Import, data: OwnData) -> GroupStore:
    height, width = session.image_size
    path = imported_path(session.workspace, request.name, session.model, height=height, width=width)
    identity = _identity(session, request, data)
    if GroupStore.exists(path):
        store = GroupStore.open(path, command=COMMAND)
        if len(store.missing_shards()) < len(store.shards):
            _refuse_other(store, request, data, identity)
        else:  # an import that failed at once has left nothing but its manifest
            with folder_lock(path / "lock"):
                store.discard()
    sizes = [len(group.images) for group in data.groups]
    keeps = request.keep_images or not data.score_names
    return GroupStore.create_or_open(
        path,
        identity=identity,
        prompts=PromptSet(tuple(group.record for group in data.groups), dropped_duplicates=0),
        images_per_prompt=sizes,
        prompts_per_shard=max(session.recipe.sample.prompts_per_shard, _SHARD_IMAGES * len(sizes) // sum(sizes)),
        image_format=session.recipe.sample.image_format if keeps else "none",
        weights={group.record.id: group.weight for group in data.groups if group.weight != 1},
        command=COMMAND,
    )


def _refuse_other(store: GroupStore, request: Import, data: OwnData, identity: dict[str, Any]) -> None:
    """Raise StoreError unless the store was made of this data in this way; what it has of it must not have changed."""
    changes = [
        _OTHER_DATA if difference.path == "data" else str(difference)
        for difference in differences(store.identity, identity)
    ]
    if changes:
        raise StoreError(
            f"the data {request.name} was imported from something else ({'; '.join(changes[:4])}): choose another"
            f" --name, or delete {store.path}"
        )
    if request.keep_images and store.image_format == "none":
        raise StoreError(
            f"{store.path} was imported without images: choose another --name, or delete it and run the command again"
        )
    groups = {group.record.id: group for group in data.groups}
    for number in sorted(set(range(len(store.shards))) - set(store.missing_shards())):
        sources = [image.source for prompt in store.shards[number] for image in groups[prompt.id].images]
        for source, origin in zip(sources, store.origins(number), strict=True):
            if _has_changed(source, origin):
                raise StoreError(
                    f"{source.name} has changed since it was imported as {request.name}: choose another --name, or"
                    f" delete {store.path}"
                )


def _has_changed(source: ImageSource, origin: Mapping[str, Any]) -> bool:
    """Whether an image is another than when it was encoded; it is only read if its file was written since."""
    if source.size() != origin["bytes"]:
        return True
    return source.modified() != origin["modified"] and sha256(source.read()) != str(origin["sha256"])
