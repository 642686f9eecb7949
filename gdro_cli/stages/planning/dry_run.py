"""What a command would do, for ``--dry-run``: counts, batches, disk, memory, time, and what is there. Makes nothing.

Without the model's weights it tells the same of models whose configurations are known, all but the names of store and
run, which depend on the weights.
"""

from __future__ import annotations

import math
from pathlib import Path

from gdro_cli.config.methods import OnlineMethod
from gdro_cli.config.recipe import Recipe
from gdro_cli.core.flow import Reduction
from gdro_cli.core.implicit import equivalent_beta
from gdro_cli.data.store import GroupStore
from gdro_cli.models.base import FlowModel, takes_two_passes
from gdro_cli.models.meta_model import open_folder
from gdro_cli.models.published import PublishedFolder
from gdro_cli.stages.planning.estimate import Estimate
from gdro_cli.stages.planning.needs import evaluation_time, sampling_needs, training_needs
from gdro_cli.stages.runs.identity import run_path
from gdro_cli.stages.setup.workspace import (
    image_size,
    model_folder,
    open_model,
    open_prompts,
    refuse_online,
    runs_folder,
    store_identity,
    store_path,
    stores_folder,
    training_plan,
)
from gdro_cli.stages.training.batch_sizes import check_shares, images_per_process, takes_one_pass
from gdro_cli.stages.training.rollout import policy_guidance
from gdro_cli.stages.training.rounds import steps_per_round
from gdro_cli.stages.training.training_data import expected_inputs

PIXEL_BYTES = 1.6  # a PNG of a generated picture, per pixel: measured on a store of the embedded model


def describe(recipe: Recipe, stage: str, workspace: Path, *, world: int = 1) -> list[tuple[str, str]]:
    """Lines about ``stage`` (sample, score, train or eval) as (what, how much), carried out by ``world`` processes.

    Raises:
        UserError: prompts cannot be used, or the processes cannot share a training step.
        PrerequisiteError: the model is missing.
    """
    if stage != "train" and stage != "eval":
        refuse_online(recipe, stage)
    if stage == "train":
        check_shares(recipe, world)
    folder = open_folder(model_folder(recipe))
    estimate = Estimate(recipe, world=world)
    here = not isinstance(folder, PublishedFolder)
    model: FlowModel = open_model(recipe, folder=folder) if here else estimate.model.flow
    height, width = image_size(recipe, model)
    rows = [
        ("recipe", f"{recipe.name}, digest {recipe.digest()}"),
        ("model", f"{recipe.model.path} ({model.family}), pictures {width} x {height}"),
    ]
    if not here:
        rows.append(("weights", f"not here; described from the published configuration of {recipe.model.path}"))
    if stage == "eval":
        return rows + _evaluation(recipe) + sampling_needs(estimate) + evaluation_time(estimate)
    if recipe.online_method is not None:
        return rows + _online(recipe, recipe.online_method, model, workspace, here) + training_needs(estimate)
    rows += describe_store(recipe, model, workspace, here=here)
    if stage == "score":
        return rows
    rows += [_encodings(recipe, estimate), *sampling_needs(estimate)]
    return rows + _training(recipe, model, workspace, world) + training_needs(estimate) if stage == "train" else rows


def _encodings(recipe: Recipe, estimate: Estimate) -> tuple[str, str]:
    prompts = len(open_prompts(recipe, recipe.prompts.train))
    size = prompts * estimate.text_per_prompt
    return "text encodings", f"{size / 1e6:.0f} MB more on disk, and in the CPU's memory while training"


def describe_store(recipe: Recipe, model: FlowModel, workspace: Path, *, here: bool = True) -> list[tuple[str, str]]:
    """Lines about the training store: where it lies, its counts, what is there, what it costs.

    ``here``: whether the model's weights are, without which the store has no name.
    """
    prompts = open_prompts(recipe, recipe.prompts.train)
    plan = training_plan(recipe, model)
    images = len(prompts) * plan.images_per_prompt
    path = stores_folder(workspace) / "(named when the weights are there)"
    if here:
        path = store_path(recipe, stores_folder(workspace), store_identity(recipe, model, plan, prompts))
    if path.exists():
        store = GroupStore.open(path)
        missing = len(store.missing_shards())
        state = f"{len(store.shards) - missing} of {len(store.shards)} shards are there"
    else:
        state = "nothing is there yet"
    latent_bytes = images * math.prod(model.latent_shape(height=plan.height, width=plan.width)) * model.dtype.itemsize
    twice = ", 2 passes each" if takes_two_passes(model, plan.guidance) else ""
    disk = latent_bytes + images * plan.height * plan.width * PIXEL_BYTES
    return [
        ("store", str(path)),
        ("samples", f"{len(prompts)} prompts x {plan.images_per_prompt} = {images} images; {state}"),
        ("forward passes", f"{math.ceil(images / recipe.sample.batch_size)} batches x {plan.steps} steps{twice}"),
        ("guidance", _guidance(model, plan.guidance)),
        ("disk", f"about {disk / 1e6:.0f} MB and the text encoders' outputs"),
        ("latents in memory", f"{latent_bytes / 1e6:.0f} MB while training"),
    ]


def _guidance(model: FlowModel, scale: float, *, online: bool = False) -> str:
    """What the guidance scale will do."""
    if model.guidance_kind == "embedded":
        return f"{scale:g}, an input of the model, in training, too"
    if model.guidance_kind == "none":
        return "this model has none" + ("" if scale == 1.0 else f": {scale:g} is ignored")
    if takes_two_passes(model, scale):
        where = "in rounds and updates" if online else "in sampling only; training uses the conditional velocity"
        return f"{scale:g}, classifier-free, {where}"
    return f"{scale:g}, so none: classifier-free guidance begins above 1"


def _online(
    recipe: Recipe, method: OnlineMethod, model: FlowModel, workspace: Path, here: bool
) -> list[tuple[str, str]]:
    train = recipe.train
    images = method.prompts_per_round * method.group_size
    rounds = math.ceil(train.steps / method.steps_per_round)
    height, width = image_size(recipe, model)
    values = math.prod(model.latent_shape(height=height, width=width)) * method.train_sample_steps
    guidance = policy_guidance(recipe, method)
    return [
        ("runs", str(runs_folder(workspace))),
        *([("run", run_path(recipe, workspace, expected_inputs(recipe, model)).name)] if here else []),
        ("method", f"{method.name}, clip range {method.clip_range:g}, KL weight {method.beta_kl:g}"),
        ("prompts", f"{len(open_prompts(recipe, recipe.prompts.train))}"),
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


def _training(recipe: Recipe, model: FlowModel, workspace: Path, world: int) -> list[tuple[str, str]]:
    train, method = recipe.train, recipe.group_method
    images, own = train.groups_per_step * method.k, images_per_process(recipe, world)
    micro = min(train.micro_batch or own, own)
    height, width = image_size(recipe, model)
    other: Reduction = "sum" if method.reduction == "mean" else "mean"
    dims = math.prod(model.latent_shape(height=height, width=width))
    same = equivalent_beta(method.beta, latent_dims=dims, given=method.reduction, wanted=other)
    shared = f", {own} in each of {world} processes" if world > 1 else ""
    return [
        ("runs", str(runs_folder(workspace))),
        (
            "method",
            f"{method.name}, K {method.k}, beta {method.beta:g} (errors are a {method.reduction} over {dims} numbers;"
            f" for a {other} it would be {same:.3g}), gamma {method.gamma:g}",
        ),
        (
            "step",
            f"{train.groups_per_step} groups x {method.k} = {images} images{shared}, in micro-batches of {micro}",
        ),
        ("gradient", "one pass" if takes_one_pass(recipe, world) else "two passes"),
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


def _evaluation(recipe: Recipe) -> list[tuple[str, str]]:
    prompts = open_prompts(recipe, recipe.prompts.eval)
    images = len(prompts) * recipe.eval.images_per_prompt
    return [
        (
            "held-out prompts",
            f"{len(prompts)} x {recipe.eval.images_per_prompt} = {images} images of each model",
        ),
        (
            "sampling",
            f"{recipe.eval_steps} steps, guidance {recipe.eval_guidance:g}, seed {recipe.eval.seed}",
        ),
    ]
