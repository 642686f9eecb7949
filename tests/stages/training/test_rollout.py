"""Rollouts: what they depend on, and what the updates get from them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from gdro_cli.config.recipe import Recipe
from gdro_cli.core.flow import euler_step
from gdro_cli.core.sde import log_prob
from gdro_cli.models.base import FlowModel
from gdro_cli.stages.setup.model import open_model
from gdro_cli.stages.setup.session import Session
from gdro_cli.stages.training.rollout import Policy, Rollout, RolloutImage, prompts_of_round, roll_out, trained_steps

MakeRecipe = Callable[..., Recipe]


@pytest.fixture(scope="module")
def model(make_online: MakeRecipe) -> FlowModel:
    return open_model(make_online())


def policy_of(recipe: Recipe, model: FlowModel) -> Policy:
    assert recipe.online_method is not None
    return Policy(model, recipe.online_method, 1.0, (64, 64))


def images_of(recipe: Recipe, *, visit: int = 0) -> list[RolloutImage]:
    records = Session(recipe, Path()).prompts("train").records[:2]
    return [RolloutImage(record, visit, image) for record in records for image in range(2)]


def drawn_by(policy: Policy, names: list[RolloutImage]) -> Rollout:
    return roll_out(policy, names, policy.model.encode([name.prompt.prompt for name in names]), seed=3)


def test_an_image_depends_on_the_visit_but_not_on_the_batch(make_online: MakeRecipe, model: FlowModel) -> None:
    recipe = make_online()
    policy, names = policy_of(recipe, model), images_of(recipe)
    whole = drawn_by(policy, names)
    single = Rollout.joined([drawn_by(policy, [name]) for name in names])
    for name in ("states", "log_probs", "clean"):
        torch.testing.assert_close(getattr(whole, name), getattr(single, name), rtol=1e-4, atol=1e-4)
    later = drawn_by(policy, images_of(recipe, visit=1))
    assert (whole.states[:, 0] - later.states[:, 0]).abs().amax(dim=(1, 2)).min() > 0.1


@pytest.mark.parametrize("name", ["flow-grpo", "dance-grpo"])
def test_log_probs_belong_to_the_states_and_the_last_step_has_no_noise(
    name: str, make_online: MakeRecipe, model: FlowModel
) -> None:
    recipe = make_online(method={"name": name})
    policy, names = policy_of(recipe, model), images_of(recipe)
    rollout = drawn_by(policy, names)
    assert rollout.states.shape == (4, 4, *model.latent_shape(height=64, width=64))
    text = model.batch_conditioning(model.encode([name.prompt.prompt for name in names]))
    with torch.no_grad():
        for i in range(3):
            step = policy.step(rollout.states[:, i], torch.full((4,), i), text)
            torch.testing.assert_close(log_prob(rollout.states[:, i + 1], step), rollout.log_probs[:, i])
        sigma = policy.schedule()[3]
        velocity = policy.velocity(rollout.states[:, 3], sigma.expand(4), text)
        torch.testing.assert_close(euler_step(rollout.states[:, 3], velocity, sigma, 0.0), rollout.clean)


def test_a_group_shares_its_initial_noise_if_the_recipe_says_so(make_online: MakeRecipe, model: FlowModel) -> None:
    for shared in (True, False):
        recipe = make_online(method={"share_initial_noise": shared})
        start = drawn_by(policy_of(recipe, model), images_of(recipe)).states[:, 0]
        assert torch.equal(start[0], start[1]) is shared
        assert not torch.equal(start[1], start[2])  # another prompt


def test_updates_can_differentiate_through_a_rollout(make_online: MakeRecipe, model: FlowModel) -> None:
    recipe = make_online()
    states = drawn_by(policy_of(recipe, model), images_of(recipe)[:1]).states
    weight = torch.ones((), requires_grad=True)
    (weight * states).sum().backward()
    assert weight.grad is not None


def test_trained_steps_are_a_random_share_of_the_stochastic_ones(make_online: MakeRecipe) -> None:
    """0.6 of 5 stochastic steps are 3, different for different images; a tiny share is one step."""
    recipe = make_online(method={"train_sample_steps": 6, "timestep_fraction": 0.6})
    assert recipe.online_method is not None
    names = [RolloutImage(record, 0, image) for record, _, _ in images_of(recipe) for image in range(8)]
    steps = trained_steps(recipe.online_method, names, seed=0)
    assert steps.shape == (32, 3)
    assert all(len(set(row)) == 3 and set(row) <= set(range(5)) for row in steps.tolist())
    assert len({frozenset(row) for row in steps.tolist()}) > 3
    least = make_online(method={"timestep_fraction": 0.01}).online_method
    assert least is not None and trained_steps(least, names, seed=0).shape == (32, 1)


def test_rounds_visit_every_prompt_once_per_epoch(make_online: MakeRecipe) -> None:
    """Three rounds of four prompts are two epochs of six."""
    recipe = make_online(prompts={"train": {"count": 6}})
    records = Session(recipe, Path()).prompts("train").records
    seen = [pair for number in range(3) for pair in prompts_of_round(records, number, count=4, seed=1)]
    assert sorted((record.id, visit) for record, visit in seen) == sorted(
        (record.id, visit) for record in records for visit in (0, 1)
    )
