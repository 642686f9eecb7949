"""Stage ``sample``: generate groups of images per prompt, once, with the untrained model.

Image i of prompt p depends only on (seed, p, i): batches, shards, restarts and processes change nothing but rounding.
Several processes share the shards, each of which is one process's own, with the batches that one process would make.
A sharded model runs in all processes at once: they share the images of every shard, and the main one writes it.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image

from gdro_cli.config.recipe import Recipe
from gdro_cli.data.records import PromptRecord
from gdro_cli.data.shard_times import add_time
from gdro_cli.data.store import Group, GroupStore
from gdro_cli.errors import StoreError
from gdro_cli.models.base import Conditioning, FlowModel
from gdro_cli.models.latents import complete
from gdro_cli.models.sampling import sample_latents
from gdro_cli.runtime.distributed import Engine
from gdro_cli.runtime.interrupt import STOPPING, StopFlag
from gdro_cli.runtime.lock import folder_lock
from gdro_cli.runtime.progress import Reporter
from gdro_cli.stages.setup.workspace import (
    SamplingPlan,
    open_engine,
    open_model,
    open_prompts,
    open_store,
    refuse_online,
    store_identity,
    stores_folder,
    training_plan,
)


@dataclass(frozen=True, slots=True)
class SampleResult:
    """A complete store and how much of it this call made."""

    store: GroupStore
    shards_made: int

    @property
    def summary(self) -> dict[str, str]:
        """What the command line shows."""
        images = len(self.store.prompts) * self.store.images_per_prompt
        return {
            "store": str(self.store.path),
            "prompts": str(len(self.store.prompts)),
            "images": str(images),
            "shards made now": f"{self.shards_made} of {len(self.store.shards)}",
        }


def run(recipe: Recipe, workspace: Path, reporter: Reporter) -> SampleResult:
    """Make the missing shards of the recipe's training store.

    Raises:
        UserError: prompts cannot be used, or the recipe's method keeps no store.
        PrerequisiteError: the model is missing.
        StoreError: the store is damaged or the disk refuses.
        Interrupted: stopped by the user; finished shards are kept.
    """
    refuse_online(recipe, "sample")
    with StopFlag(on_request=lambda: reporter.say(STOPPING)) as stop:
        engine = open_engine(recipe)
        model = open_model(recipe, engine=engine)
        store, plan = engine.from_main(lambda: training_store(recipe, workspace, model))
        made = fill_store(model, store, plan, engine, recipe=recipe, reporter=reporter, stop=stop)
        engine.end()
    return SampleResult(store, made)


def training_store(recipe: Recipe, workspace: Path, model: FlowModel) -> tuple[GroupStore, SamplingPlan]:
    """Make or open the (perhaps still empty) training store of a recipe."""
    prompts = open_prompts(recipe, recipe.prompts.train)
    plan = training_plan(recipe, model)
    identity = store_identity(recipe, model, plan, prompts)
    return open_store(recipe, stores_folder(workspace), identity, prompts, plan), plan


def fill_store(
    model: FlowModel,
    store: GroupStore,
    plan: SamplingPlan,
    engine: Engine,
    *,
    recipe: Recipe,
    reporter: Reporter,
    stop: StopFlag,
    label: str = "sampling",
) -> int:
    """Sample the shards that ``store`` lacks, all processes together, and return their number.

    Raises:
        Interrupted: between two steps of a batch; finished shards are kept.
        StoreError: another job is filling the store, or a picture is not finite.
        EndedElsewhere: one of these was raised in another process.
    """
    missing = engine.from_main(store.missing_shards)
    if not missing:
        return 0
    sharded = engine.world > 1 and recipe.model.sharding == "fsdp"
    here = missing if sharded else engine.share(missing)
    todo = sum(len(store.shards[number]) for number in here) * plan.images_per_prompt
    stopped = f"stopped while {label}; finished shards are kept in {store.path}: run the command again to go on"
    forwards = 0  # images x steps done

    def advance(images: int) -> None:
        nonlocal forwards
        forwards += images * (engine.world if sharded else 1)
        progress.advance(min(forwards // plan.steps, todo) - progress.done)
        if not sharded:
            stop.check(stopped)
        elif engine.hear(stop):  # one that stopped alone would leave the others waiting in the middle of the model
            engine.stop_together(stopped)

    def draw(number: int) -> list[Group]:
        size, split = recipe.sample.batch_size, engine if sharded else None
        return sample_groups(model, store.shards[number], plan, batch_size=size, on_step=advance, split=split)

    def make(number: int) -> None:
        began = time.perf_counter()
        store.write_shard(number, draw(number))
        add_time(store.path, number, time.perf_counter() - began, processes=engine.world)

    with (
        engine.held_by_main(folder_lock(store.path / "lock")),
        reporter.track(label + own_part(engine, sharded), total=todo, unit="images") as progress,
    ):
        if sharded:
            for number in missing:
                began = time.perf_counter()
                groups = draw(number)
                with engine.together():
                    if engine.is_main:
                        store.write_shard(number, groups)
                        add_time(store.path, number, time.perf_counter() - began)
        else:
            engine.take_turns(missing, make)
    return len(missing)


def own_part(engine: Engine, sharded: bool = False) -> str:
    """What a label says where the progress is that of one process of several."""
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
    """Sample one group per prompt; each prompt is encoded once, and batches run across groups.

    Args:
        model: the model, with or without an adapter.
        prompts: B prompts.
        plan: K images per prompt, and the settings.
        batch_size: images per forward.
        on_step: passed to ``sample_latents``.
        split: see ``sample_images``; the main process then makes the groups, and the others get none.

    Returns:
        B groups with latents [K, ...] in the model's dtype.

    Raises:
        StoreError: a picture is not finite.
    """
    count = plan.images_per_prompt
    conditioning = model.encode([prompt.prompt for prompt in prompts])
    seeds = [[plan.image_seed(prompt.id, index) for index in range(count)] for prompt in prompts]
    latents = sample_images(model, conditioning, seeds, plan, batch_size=batch_size, on_step=on_step, split=split)
    if split is not None and not split.is_main:
        return []
    groups = []
    for place, prompt in enumerate(prompts):
        own = latents[place * count : (place + 1) * count]
        pictures = _all_of(prompt, decode_images(model, own, plan, batch_size=batch_size))
        kept = own.to("cpu", model.dtype)
        groups.append(Group(prompt, kept, conditioning[place], pictures, seeds[place]))
    return groups


def _all_of(prompt: PromptRecord, pictures: Sequence[Image.Image | None]) -> list[Image.Image]:
    try:
        return complete(pictures)
    except ValueError as error:
        raise StoreError(
            f"a picture of prompt {prompt.id} ({prompt.prompt[:80]!r}) is not finite, so its shard was not written: "
            "sample with another dtype (float32 or bfloat16) or with less guidance"
        ) from error


def decode_images(
    model: FlowModel, latents: torch.Tensor, plan: SamplingPlan, *, batch_size: int
) -> list[Image.Image | None]:
    """Pictures of clean latents [N, ...]; None stands for one that is not finite."""
    return [
        picture
        for part in latents.split(batch_size)
        for picture in model.decode(part, height=plan.height, width=plan.width)
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
    """Clean latents [sum of seeds, ...]: prompt p has one image for each of ``seeds[p]``.

    ``split`` shares the images over the processes, an equal number each, and gives all of them to all; every process
    must ask for the same ones. Their batches are then others, which changes rounding.
    """
    flat = [seed for group in seeds for seed in group]
    texts = [text for text, group in zip(conditioning, seeds, strict=True) for _ in group]
    whole = len(flat)
    if split is not None and split.world > 1:
        each = -(-whole // split.world)
        own = [min(split.rank * each + place, whole - 1) for place in range(each)]  # the last one fills up
        flat, texts = [flat[place] for place in own], [texts[place] for place in own]
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
