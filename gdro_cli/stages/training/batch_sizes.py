"""How the processes of a job share a training step, and how many images each takes at a time."""

from __future__ import annotations

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
    """Images of an optimizer step in each of ``world`` processes."""
    return recipe.train.groups_per_step // world * recipe.group_method.k


def takes_one_pass(recipe: Recipe) -> bool:
    """Whether a group goes forward and backward once, with the activations of all its images kept."""
    train = recipe.train
    fits = train.micro_batch is None or recipe.group_method.k <= train.micro_batch
    return train.group_gradient == "one_pass" or (train.group_gradient == "auto" and fits)


def images_at_once(recipe: Recipe, world: int) -> int:
    """Images whose activations one of ``world`` processes keeps at once."""
    images, k = images_per_process(recipe, world), recipe.group_method.k
    if recipe.train.micro_batch is None:
        return images
    return min(images, recipe.train.micro_batch // k * k if takes_one_pass(recipe) else recipe.train.micro_batch)
