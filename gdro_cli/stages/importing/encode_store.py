"""Encode a user's images and prompts into the shards of a store, while threads read the next ones."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice, zip_longest
from typing import Self

import torch
from PIL import Image

from gdro_cli.data.own_data import ImageSource, OwnData, OwnGroup, OwnImage
from gdro_cli.data.promptfile import MAX_PROBLEMS
from gdro_cli.data.store import Group, GroupStore
from gdro_cli.errors import UserError
from gdro_cli.files import sha256
from gdro_cli.images import Fitting, UnusableImageError, fit, open_image, scaling
from gdro_cli.models.families.editing import trained_on
from gdro_cli.models.latents import to_pixels
from gdro_cli.rewards.pool import usable_cores
from gdro_cli.runtime.lock import folder_lock
from gdro_cli.stages.sampling.fill_store import ShardWriter, own_part
from gdro_cli.stages.setup.session import Session


def encode_store(session: Session, store: GroupStore, data: OwnData, *, how: Fitting) -> tuple[int, int]:
    """Make the shards that ``store`` lacks, all processes together.

    Returns:
        The number of shards, and of images that had to be enlarged.

    Raises:
        UserError: images cannot be used; the message has up to ten of them.
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
    keeps, enlarged = store.image_format != "none", 0
    sources = {group.record.id: group for group in data.groups if group.source is not None}

    def make(number: int) -> None:
        nonlocal enlarged
        start = time.perf_counter()
        latents: list[torch.Tensor] = []
        images: list[Image.Image] = []
        origins: list[dict[str, object]] = []
        for first in range(0, store.images_in(number), batch_size):
            batch = readers.take(min(batch_size, store.images_in(number) - first))
            pixels = to_pixels([one.image for one in batch])
            latents.append(model.encode_images(pixels).to("cpu", model.dtype))
            enlarged += sum(one.enlarged for one in batch)
            images += [one.image for one in batch] if keeps else []
            origins += [one.origin for one in batch]
            progress.advance(len(batch))
            session.stop.check(stopped)
        prompts, whole, end = store.shards[number], torch.cat(latents), 0
        groups = []
        edited = [_source(sources[prompt.id], session.image_size, how) for prompt in prompts if prompt.id in sources]
        texts = model.encode([prompt.prompt for prompt in prompts], edited)
        for prompt, text, source in zip_longest(prompts, map(trained_on, texts), edited):
            members = slice(end, end := end + store.sizes[prompt.id])
            groups.append(Group(prompt, whole[members], text, images[members], origins[members], source))
        writer.write(number, groups, start)

    total = sum(store.images_in(number) for number in own)
    threads = max(1, usable_cores() // engine.local_world)
    with (
        engine.held_by_main(folder_lock(store.path / "lock")),
        _Readers(session, _images(store, data, own), threads, how=how, stopped=stopped) as readers,
        ShardWriter(store, processes=engine.world) as writer,
        session.reporter.track("importing" + own_part(engine), total=total, unit="images") as progress,
    ):
        engine.take_turns(missing, make)
        with engine.together():
            writer.finish()
    return len(missing), int(engine.sum(torch.tensor(float(enlarged), device=engine.device)))


def _images(store: GroupStore, data: OwnData, shards: Sequence[int]) -> Iterator[tuple[OwnGroup, OwnImage]]:
    """The images of some shards, in order."""
    groups = {group.record.id: group for group in data.groups}
    return (
        (groups[prompt.id], image)
        for number in shards
        for prompt in store.shards[number]
        for image in groups[prompt.id].images
    )


def _source(group: OwnGroup, size: tuple[int, int], how: Fitting) -> Image.Image:
    """The image that was edited, of the recipe's size. Raises UserError if it cannot be used or has changed."""
    if group.source is None:
        raise TypeError(f"{group.where} has no image that was edited")
    content = group.source.read()
    if sha256(content) != group.record.image_sha256:
        raise UserError(f"{group.where}: {group.source.name} has changed since the import began: run the command again")
    return fit(_opened(content, group, group.source), height=size[0], width=size[1], how=how)


def _opened(content: bytes, group: OwnGroup, source: ImageSource) -> Image.Image:
    try:
        return open_image(content)
    except UnusableImageError as error:
        where = "" if group.where == source.name else f"{group.where}: "  # the same in a folder without a table
        raise UserError(f"{where}{source.name} cannot be used: {error}") from error


@dataclass(frozen=True, slots=True)
class _Fitted:
    image: Image.Image
    """Of the recipe's size."""
    origin: dict[str, object]
    enlarged: bool


class _Readers:
    """Threads that read and fit images in order, a little ahead of their use.

    Args:
        session: has the size of the images, of which two batches are read ahead.
        images: what to read.
        threads: number of threads.
        how: how images are brought to the size.
        stopped: what a stop says.
    """

    def __init__(
        self,
        session: Session,
        images: Iterator[tuple[OwnGroup, OwnImage]],
        threads: int,
        *,
        how: Fitting,
        stopped: str,
    ) -> None:
        self._session, self._stopped = session, stopped
        self._images, self._ahead = images, 2 * session.recipe.sample.batch_size + threads
        self._size, self._how = session.image_size, how
        self._threads = ThreadPoolExecutor(threads, thread_name_prefix="read")
        self._begun: deque[Future[_Fitted]] = deque()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._threads.shutdown(cancel_futures=True)

    def take(self, count: int) -> list[_Fitted]:
        """The next images. Raises UserError if one cannot be used, naming those after it as well."""
        try:
            return [self._next() for _ in range(count)]
        except UserError as error:
            raise UserError(self._with_the_rest(str(error))) from error

    def _next(self) -> _Fitted:
        for group, image in islice(self._images, self._ahead - len(self._begun)):
            # Cells of a table are read here, row by row: each thread would read all of the table's pages.
            content = None if image.source.row is None else image.source.read()
            self._begun.append(self._threads.submit(self._read, group, image, content))
        return self._begun.popleft().result()

    def _with_the_rest(self, first: str) -> str:
        """A problem with those of the images that are still to come, so that one repair is enough."""
        self._session.reporter.say("an image cannot be used; reading the rest for more of them")
        problems = [first]
        while len(problems) <= MAX_PROBLEMS:
            self._session.stop.check(self._stopped)
            try:
                self._next()
            except UserError as error:
                problems.append(str(error))
            except IndexError:  # there are no more
                break
        more = ["and more"] if len(problems) > MAX_PROBLEMS else []
        count = [f"{len(problems) - len(more)} images cannot be used"] if len(problems) > 1 else []
        remedy = "put a good file in its place" if len(problems) == 1 else "put good files in their places"
        return "; ".join([*count, *problems[:MAX_PROBLEMS], *more, f"{remedy} and run the command again"])

    def _read(self, group: OwnGroup, image: OwnImage, content: bytes | None) -> _Fitted:
        source = image.source
        content = source.read() if content is None else content
        shown = _opened(content, group, source)
        height, width = self._size
        enlarged = scaling(shown, height=height, width=width, how=self._how) > 1
        origin = {"source": source.name, "bytes": len(content), "modified": source.modified()}
        fitted = fit(shown, height=height, width=width, how=self._how)
        return _Fitted(fitted, {**origin, "sha256": sha256(content)}, enlarged)
