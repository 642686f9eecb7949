"""What a command would do, for ``--dry-run``: counts, batches, disk, memory, time, what exists. It makes nothing.

It needs no weights of models with a published configuration; only the names of store and run depend on the weights.
"""

from __future__ import annotations

import math
from pathlib import Path

from gdro_cli.config.methods import OnlineMethod
from gdro_cli.config.recipe import Recipe
from gdro_cli.core.flow import Reduction
from gdro_cli.core.footprint import CARDS, usable_bytes
from gdro_cli.core.implicit import equivalent_beta
from gdro_cli.data.store import GroupStore
from gdro_cli.models.base import FlowModel, takes_two_passes
from gdro_cli.models.meta_model import open_folder
from gdro_cli.models.published import PublishedFolder
from gdro_cli.stages.planning.needs import evaluation_time, sampling_needs, scoring_needs, training_needs
from gdro_cli.stages.runs.identity import run_path
from gdro_cli.stages.setup.model import model_folder, open_model
from gdro_cli.stages.setup.session import Session
from gdro_cli.stages.setup.store import runs_folder, store_path, stores_folder, training_identity, training_plan
from gdro_cli.stages.training.batch_sizes import (
    check_shares,
    images_at_once,
    images_per_process,
    takes_one_pass,
    with_micro_batch,
)
from gdro_cli.stages.training.estimate import Estimate
from gdro_cli.stages.training.rollout import policy_guidance
from gdro_cli.stages.training.rounds import steps_per_round

PIXEL_BYTES = 1.6
"""A PNG of a generated image, per pixel: measured on a store of the embedded model."""


def describe(recipe: Recipe, stage: str, workspace: Path, *, world: int = 1) -> list[tuple[str, str]]:
    """Lines about ``stage`` (sample, score, train or eval) in ``world`` processes, as (what, how much).

    ``train.micro_batch: auto`` is described as on the largest of ``CARDS``.

    Raises:
        UserError: the reward cannot use the prompts, or the processes cannot share a training step.
        PrerequisiteError: the model is missing.
    """
    if stage == "train":
        check_shares(recipe, world)
    if recipe.train.micro_batch == "auto":
        most = Estimate(recipe, world=world).largest_micro_batch(usable_bytes(max(CARDS)))
        recipe = with_micro_batch(recipe, most or 1)
    session = Session(recipe, workspace, planning=True)
    if stage in ("sample", "score"):
        session.require_store(stage)
    return _describe(session, stage, world=world) + session.remarks


def _describe(session: Session, stage: str, *, world: int) -> list[tuple[str, str]]:
    recipe = session.recipe
    folder = open_folder(model_folder(recipe))
    has_weights = not isinstance(folder, PublishedFolder)
    estimate = Estimate(recipe, world=world)
    session.model = model = open_model(recipe, folder=folder) if has_weights else estimate.model.flow
    height, width = session.image_size
    rows = [
        ("recipe", f"{recipe.name}, digest {recipe.digest()}"),
        ("model", f"{recipe.model.path} ({model.family}), images {width} x {height}"),
    ]
    if not has_weights:
        rows.append(("weights", f"not here; described from the published configuration of {recipe.model.path}"))
    if estimate.initial is not None:
        rows.append(("starts from", f"{estimate.initial.path}, {len(estimate.initial.pairs)} layers, kept frozen"))
    scoring = [] if stage == "sample" else scoring_needs(session)
    if stage == "eval":
        return rows + _evaluation(session) + sampling_needs(estimate) + scoring + evaluation_time(estimate, session)
    if recipe.online_method is not None:
        return rows + _online(session, recipe.online_method, has_weights) + training_needs(estimate, session) + scoring
    rows += describe_store(session, has_weights=has_weights)
    if stage == "score":
        return rows + scoring
    size = len(session.prompts("train")) * estimate.text_per_prompt
    rows.append(("text encodings", f"{size / 1e6:.0f} MB more on disk, and in the CPU's memory while training"))
    rows += sampling_needs(estimate)
    if stage == "train":
        rows += _training(session, world) + training_needs(estimate, session)
    return rows + scoring


def describe_store(session: Session, *, has_weights: bool = True) -> list[tuple[str, str]]:
    """Lines about the training store: its path, its counts, its finished shards, its cost.

    ``has_weights``: whether the model's weights are on this machine; without them the store has no name.
    """
    if session.imported_store is not None:
        return _describe_imported(session, session.imported_store)
    recipe, model, plan = session.recipe, session.model, training_plan(session)
    prompts = len(session.prompts("train"))
    images = prompts * plan.images_per_prompt
    path, state = stores_folder(session.workspace) / "(named once the weights are here)", "none is made yet"
    if has_weights:
        path = store_path(session, stores_folder(session.workspace), training_identity(session))
    if path.exists():
        store = GroupStore.open(path)
        shards = len(store.shards)
        state = f"{shards - len(store.missing_shards())} of {shards} shards are made"
    latent_bytes = images * math.prod(model.latent_shape(height=plan.height, width=plan.width)) * model.dtype.itemsize
    twice = ", 2 passes each" if takes_two_passes(model, plan.guidance) else ""
    disk = latent_bytes + images * plan.height * plan.width * PIXEL_BYTES
    return [
        ("store", str(path)),
        ("samples", f"{prompts} prompts x {plan.images_per_prompt} = {images} images; {state}"),
        ("forward passes", f"{math.ceil(images / recipe.sample.batch_size)} batches x {plan.steps} steps{twice}"),
        ("guidance", _guidance(model, plan.guidance)),
        ("disk", f"about {disk / 1e6:.0f} MB and the text encoders' outputs"),
        ("latents in memory", f"{latent_bytes / 1e6:.0f} MB while training"),
    ]


def _describe_imported(session: Session, store: GroupStore) -> list[tuple[str, str]]:
    height, width = session.image_size
    values = math.prod(session.model.latent_shape(height=height, width=width))
    return [
        ("store", str(store.path)),
        ("imported", f"{len(store.prompts)} groups, {store.images_in_all} images"),
        (
            "latents in memory",
            f"{store.images_in_all * values * session.model.dtype.itemsize / 1e6:.0f} MB while training",
        ),
    ]


def _guidance(model: FlowModel, scale: float, *, online: bool = False) -> str:
    """The effect of the guidance scale."""
    if model.guidance_kind == "embedded":
        return f"{scale:g}, an input of the model, also in training"
    if model.guidance_kind == "none":
        return "this model has none" + ("" if scale == 1.0 else f": {scale:g} is ignored")
    if takes_two_passes(model, scale):
        where = "in rounds and updates" if online else "in sampling only; training uses the conditional velocity"
        return f"{scale:g}, classifier-free, {where}"
    return f"{scale:g}, so none, since classifier-free guidance begins above 1"


def _online(session: Session, method: OnlineMethod, has_weights: bool) -> list[tuple[str, str]]:
    recipe, model, train = session.recipe, session.model, session.recipe.train
    images = method.prompts_per_round * method.group_size
    rounds = math.ceil(train.steps / method.steps_per_round)
    height, width = session.image_size
    values = math.prod(model.latent_shape(height=height, width=width)) * method.train_sample_steps
    guidance = policy_guidance(recipe, method)
    return [
        ("runs", str(runs_folder(session.workspace))),
        *([("run", run_path(session).name)] if has_weights else []),
        ("method", f"{method.name}, clip range {method.clip_range:g}, KL weight {method.beta_kl:g}"),
        ("prompts", str(len(session.prompts("train")))),
        ("round", f"{method.prompts_per_round} prompts x {method.group_size} = {images} images, sampled and scored"),
        (
            "sampling",
            f"{method.train_sample_steps} steps, of which {method.trained_sample_steps} are trained in each image",
        ),
        ("guidance", _guidance(model, guidance, online=True)),
        ("updates", f"{method.updates_per_round} x {method.inner_epochs} optimizer steps per round"),
        ("steps", f"{train.steps}, so {rounds} rounds and {rounds * images} images"),
        ("trajectories in memory", f"{images * values * 4 / 1e6:.0f} MB, over all processes together"),
        ("checkpoints", f"every {train.checkpoint_every} steps, the last {train.keep_checkpoints} are kept"),
    ]


def _training(session: Session, world: int) -> list[tuple[str, str]]:
    recipe, model = session.recipe, session.model
    train, method = recipe.train, recipe.group_method
    images, own = train.groups_per_step * method.k, images_per_process(recipe, world)
    micro = images_at_once(recipe, world)
    height, width = session.image_size
    other: Reduction = "sum" if method.reduction == "mean" else "mean"
    dims = math.prod(model.latent_shape(height=height, width=width))
    same = equivalent_beta(method.beta, latent_dims=dims, given=method.reduction, wanted=other)
    shared = f", {own} in each of {world} processes" if world > 1 else ""
    return [
        ("runs", str(runs_folder(session.workspace))),
        (
            "method",
            f"{method.name}, K {method.k}, beta {method.beta:g} (errors are a {method.reduction} over {dims} numbers;"
            f" for a {other} it would be {same:.3g}), gamma {method.gamma:g}",
        ),
        (
            "step",
            f"{train.groups_per_step} groups x {method.k} = {images} images{shared}, in micro-batches of {micro}",
        ),
        ("gradient", "one pass" if takes_one_pass(recipe) else "two passes"),
        ("steps", f"{train.steps}, so {train.steps * images} images with policy and reference"),
        *_rounds(recipe),
        ("checkpoints", f"every {train.checkpoint_every} steps, the last {train.keep_checkpoints} are kept"),
    ]


def _rounds(recipe: Recipe) -> list[tuple[str, str]]:
    if recipe.train.rounds == 1:
        return []
    size = steps_per_round(recipe)
    more = math.ceil(recipe.train.steps / size) - 1
    return [
        ("rounds", f"of {size} steps; {more} times as many images as in the store are sampled and scored on the way")
    ]


def _evaluation(session: Session) -> list[tuple[str, str]]:
    recipe, prompts = session.recipe, len(session.prompts("eval"))
    count = recipe.eval.images_per_prompt
    return [
        ("held-out prompts", f"{prompts} x {count} = {prompts * count} images of each model"),
        ("sampling", f"{recipe.eval_steps} steps, guidance {recipe.eval_guidance:g}, seed {recipe.eval.seed}"),
    ]
