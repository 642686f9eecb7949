"""Encode a user's images and prompts into the shards of a store, while threads read the next ones."""

from __future__ import annotations

import time
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice
from typing import Self

import torch
from PIL import Image

from gdro_cli.data.own_data import OwnData, OwnGroup, OwnImage
from gdro_cli.data.store import Group, GroupStore
from gdro_cli.errors import UserError
from gdro_cli.files import sha256
from gdro_cli.images import Fitting, UnusableImageError, fit, open_image, scaling
from gdro_cli.models.latents import to_pixels
from gdro_cli.rewards.pool import usable_cores
from gdro_cli.runtime.lock import folder_lock
from gdro_cli.stages.sampling.fill_store import ShardWriter, own_part
from gdro_cli.stages.setup.session import Session

_SHARDS_AHEAD = 1
"""Shards whose images are read while another is encoded."""


def encode_store(session: Session, store: GroupStore, data: OwnData, *, how: Fitting) -> tuple[int, int]:
    """Make the shards that ``store`` lacks, all processes together.

    Returns:
        The number of shards, and of images that had to be enlarged.

    Raises:
        UserError: an image cannot be read.
        StoreError: another job is filling the store, or an image's latents are not finite.
        Interrupted: between two batches; finished shards are kept.
        EndedElsewhere: another process raised one of these.
    """
    engine, model, batch_size = session.engine, session.model, session.recipe.sample.batch_size
    missing = engine.from_main(store.missing_shards)
    if not missing:
        return 0, 0
    own = engine.share(missing)
    stopped = f"stopped while importing; finished shards are kept in {store.path}: run the command again to continue"
    enlarged = 0

    def make(number: int) -> None:
        nonlocal enlarged
        start = time.perf_counter()
        latents: list[torch.Tensor] = []
        images: list[_Fitted] = []
        futures = readers.take(number)
        for first in range(0, len(futures), batch_size):
            batch = [future.result() for future in futures[first : first + batch_size]]
            pixels = to_pixels([one.image for one in batch])
            latents.append(model.encode_images(pixels).to("cpu", model.dtype))
            images += batch
            progress.advance(len(batch))
            session.stop.check(stopped)
        enlarged += sum(one.enlarged for one in images)
        texts = model.encode([prompt.prompt for prompt in store.shards[number]])
        rest, parts = (
            iter(images),
            torch.cat(latents).split([store.sizes[prompt.id] for prompt in store.shards[number]]),
        )
        groups = []
        for prompt, part, text in zip(store.shards[number], parts, texts, strict=True):
            members = list(islice(rest, len(part)))
            kept = [] if store.image_format == "none" else [one.image for one in members]
            groups.append(Group(prompt, part, text, kept, [one.origin for one in members]))
        writer.write(number, groups, start)

    total = sum(store.images_in(number) for number in own)
    with (
        engine.held_by_main(folder_lock(store.path / "lock")),
        _Readers(store, data, own, size=session.image_size, how=how) as readers,
        ShardWriter(store, processes=engine.world) as writer,
        session.reporter.track("importing" + own_part(engine), total=total, unit="images") as progress,
    ):
        engine.take_turns(missing, make)
        with engine.together():
            writer.finish()
    return len(missing), int(engine.sum(torch.tensor(float(enlarged), device=engine.device)))


@dataclass(frozen=True, slots=True)
class _Fitted:
    image: Image.Image
    """Of the recipe's size."""
    origin: dict[str, object]
    enlarged: bool


class _Readers:
    """Threads that read and fit the images of the shards of this process, in order, a little ahead of their use."""

    def __init__(
        self, store: GroupStore, data: OwnData, shards: Sequence[int], *, size: tuple[int, int], how: Fitting
    ) -> None:
        self._store, self._shards = store, shards
        self._groups = {group.record.id: group for group in data.groups}
        self._size, self._how = size, how
        self._threads = ThreadPoolExecutor(usable_cores(), thread_name_prefix="read")
        self._begun: dict[int, list[Future[_Fitted]]] = {}

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._threads.shutdown(cancel_futures=True)

    def take(self, number: int) -> list[Future[_Fitted]]:
        """The images of shard ``number`` in order; a result raises UserError if the image cannot be used."""
        place = self._shards.index(number)
        for shard in self._shards[place : place + 1 + _SHARDS_AHEAD]:
            if shard not in self._begun:
                groups = [self._groups[prompt.id] for prompt in self._store.shards[shard]]
                self._begun[shard] = [
                    self._threads.submit(self._read, group, image) for group in groups for image in group.images
                ]
        return self._begun.pop(number)

    def _read(self, group: OwnGroup, image: OwnImage) -> _Fitted:
        content = image.source.read()
        try:
            shown = open_image(content)
        except UnusableImageError as error:
            raise UserError(f"{group.where}: {image.source.name} cannot be used: {error}") from error
        height, width = self._size
        enlarged = scaling(shown, height=height, width=width, how=self._how) > 1
        origin = {"source": image.source.name, "bytes": len(content), "sha256": sha256(content)}
        return _Fitted(fit(shown, height=height, width=width, how=self._how), origin, enlarged)
