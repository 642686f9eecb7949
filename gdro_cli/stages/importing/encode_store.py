"""Encode a user's images and prompts into the shards of a store, while threads read the next ones."""

from __future__ import annotations

import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

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


@dataclass(frozen=True, slots=True)
class _Opened:
    image: Image.Image
    origin: dict[str, object]
    enlarged: bool


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
    engine, model, stop = session.engine, session.model, session.stop
    missing = engine.from_main(store.missing_shards)
    if not missing:
        return 0, 0
    groups, own = {group.record.id: group for group in data.groups}, engine.share(missing)
    height, width = session.image_size
    stopped = f"stopped while importing; finished shards are kept in {store.path}: run the command again to continue"
    reading: dict[int, list[Future[_Opened]]] = {}
    enlarged = 0

    def read(group: OwnGroup, image: OwnImage) -> _Opened:
        content = image.source.read()
        try:
            opened = open_image(content)
        except UnusableImageError as error:
            raise UserError(f"{group.where}: {image.source.name} cannot be used: {error}") from error
        enlarged = scaling(opened, height=height, width=width, how=how) > 1
        origin = {"source": image.source.name, "bytes": len(content), "sha256": sha256(content)}
        return _Opened(fit(opened, height=height, width=width, how=how), origin, enlarged)

    def read_ahead(number: int) -> None:
        first = own.index(number)
        for shard in own[first : first + 1 + _SHARDS_AHEAD]:
            if shard not in reading:
                members = [groups[prompt.id] for prompt in store.shards[shard]]
                reading[shard] = [readers.submit(read, group, image) for group in members for image in group.images]

    def make(number: int) -> None:
        nonlocal enlarged
        start = time.perf_counter()
        read_ahead(number)
        latents: list[torch.Tensor] = []
        opened: list[_Opened] = []
        futures, size = reading.pop(number), session.recipe.sample.batch_size
        for first in range(0, len(futures), size):
            opened += (images := [future.result() for future in futures[first : first + size]])
            pixels = to_pixels([image.image for image in images])
            latents.append(model.encode_images(pixels).to("cpu", model.dtype))
            progress.advance(len(images))
            stop.check(stopped)
        enlarged += sum(image.enlarged for image in opened)
        prompts = store.shards[number]
        texts = model.encode([prompt.prompt for prompt in prompts])
        sizes = [store.sizes[prompt.id] for prompt in prompts]
        parts, members = torch.cat(latents).split(sizes), _split(opened, sizes)
        keeps = store.image_format != "none"
        made = [
            Group(
                prompt,
                part,
                text,
                [image.image for image in own_images] if keeps else [],
                [image.origin for image in own_images],
            )
            for prompt, part, text, own_images in zip(prompts, parts, texts, members, strict=True)
        ]
        writer.write(number, made, start)

    total = sum(store.images_in(number) for number in own)
    with (
        engine.held_by_main(folder_lock(store.path / "lock")),
        ThreadPoolExecutor(usable_cores(), thread_name_prefix="read") as readers,
        ShardWriter(store, processes=engine.world) as writer,
        session.reporter.track("importing" + own_part(engine), total=total, unit="images") as progress,
    ):
        engine.take_turns(missing, make)
        with engine.together():
            writer.finish()
    return len(missing), int(engine.sum(torch.tensor(float(enlarged), device=engine.device)))


def _split(images: list[_Opened], sizes: list[int]) -> Iterator[list[_Opened]]:
    rest = iter(images)
    return ([next(rest) for _ in range(size)] for size in sizes)
