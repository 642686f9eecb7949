"""How the processes of a job share a training step, and how many images each takes at a time."""

from __future__ import annotations

import math

from gdro_cli.config.recipe import Recipe
from gdro_cli.errors import UserError


def check_shares(recipe: Recipe, world: int) -> None:
    """Raise UserError unless ``world`` processes can share the groups of a step, or the prompts of a round, equally."""
    online = recipe.online_method
    key, count = (
        ("train.groups_per_step", recipe.train.groups_per_step)
        if online is None
        else ("method.prompts_per_round", online.prompts_per_round)
    )
    if count % world:
        raise UserError(f"{key} is {count}, which {world} processes cannot share equally: choose a multiple")


def images_per_process(recipe: Recipe, world: int) -> int:
    """Images of an optimizer step in each of ``world`` processes; for online methods the mean, rounded up."""
    online = recipe.online_method
    if online is not None:
        return math.ceil(online.prompts_per_round * online.group_size / online.updates_per_round / world)
    return recipe.train.groups_per_step // world * recipe.group_method.k


def micro_batch(recipe: Recipe) -> int | None:
    """``train.micro_batch`` as a number; None for all images, and for ``auto`` that has not been chosen."""
    return None if recipe.train.micro_batch == "auto" else recipe.train.micro_batch


def with_micro_batch(recipe: Recipe, images: int | None) -> Recipe:
    """The recipe with this ``train.micro_batch``."""
    return recipe.model_copy(update={"train": recipe.train.model_copy(update={"micro_batch": images})})


def micro_batches(recipe: Recipe, world: int) -> list[int]:
    """The micro-batches that differ, from the smallest: in one pass whole groups, else any number of images."""
    images, way = images_per_process(recipe, world), recipe.train.group_gradient
    if recipe.online_method is not None or way == "two_pass":
        return list(range(1, images + 1))
    k = recipe.group_method.k
    return [*(range(1, k) if way == "auto" else ()), *range(k, images + 1, k)]


def takes_one_pass(recipe: Recipe) -> bool:
    """Whether a group goes forward and backward once, with the activations of all its images kept."""
    size, way = micro_batch(recipe), recipe.train.group_gradient
    return way == "one_pass" or (way == "auto" and (size is None or recipe.group_method.k <= size))


def images_at_once(recipe: Recipe, world: int) -> int:
    """Images whose activations one of ``world`` processes keeps at once."""
    images, size = images_per_process(recipe, world), micro_batch(recipe)
    if size is None:
        return images
    if recipe.online_method is None and takes_one_pass(recipe):
        size = size // recipe.group_method.k * recipe.group_method.k
    return min(images, size)
