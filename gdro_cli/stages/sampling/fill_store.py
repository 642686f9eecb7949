"""Fill a store: the model samples the groups that it lacks.

Image i of prompt p depends only on (seed, p, i): batches, shards, restarts and processes change only the rounding.
Several processes share the shards. One process makes each shard, in the batches that a single process would make. A
sharded model runs in all processes at once: they share the images of every shard, and the main process writes it.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Self

import torch
from PIL import Image

from gdro_cli.data.records import PromptRecord
from gdro_cli.data.shard_times import add_time
from gdro_cli.data.store import Group, GroupStore
from gdro_cli.errors import StoreError
from gdro_cli.models.adapters import merged
from gdro_cli.models.base import Conditioning, FlowModel
from gdro_cli.models.families.editing import trained_on
from gdro_cli.models.latents import complete
from gdro_cli.models.sampling import sample_latents
from gdro_cli.runtime.distributed import Engine
from gdro_cli.runtime.lock import folder_lock
from gdro_cli.stages.setup.session import Session
from gdro_cli.stages.setup.sources import encode_prompts
from gdro_cli.stages.setup.store import SamplingPlan


def fill_store(session: Session, store: GroupStore, plan: SamplingPlan, *, label: str = "sampling") -> int:
    """Sample the shards that ``store`` lacks, all processes together, and return their number.

    Raises:
        Interrupted: between two steps of a batch; finished shards are kept.
        UserError: the model has no schedule of so many steps.
        StoreError: another job is filling the store, or an image is not finite.
        EndedElsewhere: one of these was raised in another process.
    """
    engine, recipe, stop = session.engine, session.recipe, session.stop
    missing = engine.from_main(store.missing_shards)
    if not missing:
        return 0
    with engine.together():  # a schedule that cannot be used is known before the model is loaded
        session.model.sigmas(plan.steps, height=plan.height, width=plan.width)
    sharded = engine.world > 1 and recipe.model.sharding == "fsdp"
    own = missing if sharded else engine.share(missing)
    total = sum(store.images_in(number) for number in own)
    stopped = f"stopped while {label}; finished shards are kept in {store.path}: run the command again to continue"
    image_steps = 0

    def advance(images: int) -> None:
        nonlocal image_steps
        image_steps += images * (engine.world if sharded else 1)
        progress.advance(min(image_steps // plan.steps, total) - progress.done)
        if not sharded:
            stop.check(stopped)
        elif engine.hear(stop):  # a process that stopped alone would leave the others waiting inside the model
            engine.stop_together(stopped)

    def make(number: int) -> None:
        start = time.perf_counter()
        groups = sample_groups(
            session.model,
            store.shards[number],
            plan,
            batch_size=recipe.sample.batch_size,
            on_step=advance,
            split=engine if sharded else None,
        )
        writer.write(number, groups, start)

    with (
        engine.held_by_main(folder_lock(store.path / "lock")),
        ShardWriter(store, processes=1 if sharded else engine.world) as writer,
        session.reporter.track(label + own_part(engine, sharded), total=total, unit="images") as progress,
        merged(session.model),
    ):
        if sharded:
            for number in missing:
                make(number)
                with engine.together():
                    writer.finish()
        else:
            engine.take_turns(missing, make)
            with engine.together():
                writer.finish()
    return len(missing)


class ShardWriter:
    """Writes a shard on a thread while the next images are drawn; one at a time.

    Args:
        store: where the shards belong.
        processes: number of processes that make shards in parallel.
    """

    def __init__(self, store: GroupStore, *, processes: int) -> None:
        self._store, self._processes = store, processes
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="shard")
        self._pending: Future[None] | None = None
        self._ended = 0.0

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._thread.shutdown()

    def write(self, number: int, groups: list[Group], start: float) -> None:
        """Begin to write a shard whose images were begun at ``start``. Raises what the last writing raised."""
        self.finish()
        if groups:
            self._pending = self._thread.submit(self._write, number, groups, start)

    def finish(self) -> None:
        """Wait for the shard that is being written. Raises what the writing raised."""
        pending, self._pending = self._pending, None
        if pending is not None:
            pending.result()

    def _write(self, number: int, groups: list[Group], start: float) -> None:
        self._store.write_shard(number, groups)
        began, self._ended = max(start, self._ended), time.perf_counter()  # the times of shards do not overlap
        add_time(self._store.path, number, self._ended - began, processes=self._processes)


def own_part(engine: Engine, sharded: bool = False) -> str:
    """Suffix of a progress label that shows the progress of one process of several."""
    return "" if sharded or engine.world == 1 else f" (process {engine.rank + 1} of {engine.world})"


def sample_groups(
    model: FlowModel,
    prompts: tuple[PromptRecord, ...],
    plan: SamplingPlan,
    *,
    batch_size: int,
    on_step: Callable[[int], None] | None = None,
    split: Engine | None = None,
) -> list[Group]:
    """Sample one group per prompt. Each prompt is encoded once; a batch may have images of several groups.

    Args:
        model: the model, with or without an adapter.
        prompts: B prompts.
        plan: K images per prompt, and the settings.
        batch_size: images per forward pass.
        on_step: see ``sample_latents``.
        split: see ``sample_images``. The main process then gets the groups, and the others get an empty list.

    Returns:
        B groups with latents [K, ...] in the model's dtype.

    Raises:
        StoreError: an image is not finite.
    """
    count = plan.images_per_prompt
    conditioning = encode_prompts(model, prompts)
    seeds = [[plan.image_seed(prompt.id, index) for index in range(count)] for prompt in prompts]
    latents = sample_images(model, conditioning, seeds, plan, batch_size=batch_size, on_step=on_step, split=split)
    if split is not None and not split.is_main:
        return []
    groups = []
    for position, prompt in enumerate(prompts):
        own = latents[position * count : (position + 1) * count]
        images = _all_finite(prompt, decode_images(model, own, plan, batch_size=batch_size))
        origins = [{"seed": seed} for seed in seeds[position]]
        kept = trained_on(conditioning[position])
        groups.append(Group(prompt, own.to("cpu", model.dtype), kept, images, origins, prompt.source))
    return groups


def _all_finite(prompt: PromptRecord, images: Sequence[Image.Image | None]) -> list[Image.Image]:
    try:
        return complete(images)
    except ValueError as error:
        raise StoreError(
            f"an image of prompt {prompt.id} ({prompt.prompt[:80]!r}) is not finite, so its shard was not written:"
            " sample with another dtype (float32 or bfloat16) or with less guidance"
        ) from error


def decode_images(
    model: FlowModel, latents: torch.Tensor, plan: SamplingPlan, *, batch_size: int
) -> list[Image.Image | None]:
    """Images of clean latents [N, ...]; None for an image that is not finite."""
    return [
        image
        for part in latents.split(batch_size)
        for image in model.decode(part, height=plan.height, width=plan.width)
    ]


def sample_images(
    model: FlowModel,
    conditioning: list[Conditioning],
    seeds: list[list[int]],
    plan: SamplingPlan,
    *,
    batch_size: int,
    on_step: Callable[[int], None] | None = None,
    split: Engine | None = None,
) -> torch.Tensor:
    """Clean latents [number of seeds, ...]: prompt p has one image for each of ``seeds[p]``.

    With ``split`` the processes share the images equally, and each gets all of them; all must call this with the same
    images. The batches then differ from those of a single process, which changes the rounding.
    """
    flat = [seed for group in seeds for seed in group]
    texts = [text for text, group in zip(conditioning, seeds, strict=True) for _ in group]
    whole = len(flat)
    if split is not None and split.world > 1:
        count = -(-whole // split.world)
        own = [min(split.rank * count + offset, whole - 1) for offset in range(count)]  # repeats the last image
        flat, texts = [flat[i] for i in own], [texts[i] for i in own]
    latents = sample_latents(
        model,
        model.noise(flat, height=plan.height, width=plan.width),
        texts,
        steps=plan.steps,
        guidance=plan.guidance,
        height=plan.height,
        width=plan.width,
        batch_size=batch_size,
        on_step=on_step,
    )
    return latents if split is None else split.gather_rows(latents)[:whole]
