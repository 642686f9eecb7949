"""The noise of a step, and the gradient of groups in one pass and in two, on the embedded transformer."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch

from gdro_cli.config.methods import METHODS, GdroMethod, GroupMethod
from gdro_cli.config.recipe import Recipe
from gdro_cli.core.loss_output import LossOutput
from gdro_cli.core.losses import DEVIATION_LOSSES, group_loss
from gdro_cli.data.dataset import GroupBatch
from gdro_cli.data.records import PromptRecord
from gdro_cli.models.base import FlowModel
from gdro_cli.stages.setup.model import attach_adapter, open_model
from gdro_cli.stages.training.group_gradient import GroupGradient, draw_noise, loss_arguments, noisy_groups
from gdro_cli.stages.training.trainer import learning_rate

PROMPTS = ('a red sign that says "OPEN" on a brick background', 'a blue sign that says "SALE" on a sandy background')


STORED = [name for name, method in METHODS.items() if issubclass(method, GroupMethod)]
METHOD_SECTIONS = [*({"name": name} for name in STORED), {"name": "regression", "target": "crd"}]


def batch_of(model: FlowModel | None, *, k: int = 3, prompts: tuple[str, ...] = PROMPTS) -> GroupBatch:
    """Groups of random latents; without a model the conditioning is empty."""
    count = len(prompts)
    rewards = torch.linspace(0, 1, count * k).view(count, k)
    return GroupBatch(
        latents=torch.randn(count, k, 16, 128, generator=torch.Generator().manual_seed(0)),
        rewards=rewards,
        mask=torch.ones(count, k, dtype=torch.bool),
        weights=torch.ones(count),
        prompts=tuple(PromptRecord.of(prompt) for prompt in prompts),
        image_indices=torch.arange(k).expand(count, k),
        conditioning=tuple(model.encode(prompts)) if model else ({},) * count,
        visits=(0,) * count,
    )


def test_a_group_shares_sigma_and_noise_by_default() -> None:
    sigma, noise = draw_noise(batch_of(None), GdroMethod(name="gdro"), seed=0)
    assert torch.equal(sigma[:, 0], sigma[:, 2])
    assert noise.shape == (2, 1, 16, 128)
    assert sigma[0, 0] != sigma[1, 0]
    assert not torch.equal(noise[0, 0], noise[1, 0])


def test_each_image_can_have_its_own_sigma_and_noise() -> None:
    method = GdroMethod(name="gdro", share_noise=False, share_sigma=False)
    sigma, noise = draw_noise(batch_of(None), method, seed=0)
    assert len(set(sigma.flatten().tolist())) == 6
    assert not torch.equal(noise[0, 0], noise[0, 1])


@pytest.mark.parametrize("shared", [True, False])
def test_noisy_latents_and_targets_part_by_part(shared: bool, make_recipe: Callable[..., Recipe]) -> None:
    method = GdroMethod(name="gdro", share_noise=shared)
    model = open_model(make_recipe())
    batch = batch_of(model)
    sigma, noise = draw_noise(batch, method, seed=0)
    groups = noisy_groups(model, batch, (sigma, noise))
    for part in (slice(1, 5), torch.tensor([5, 0])):
        latents, target = groups.at(part)
        for position, image in enumerate(torch.arange(6)[part].tolist()):
            group, k = divmod(image, 3)
            clean, own = batch.latents[group, k], noise[group, 0 if shared else k]
            torch.testing.assert_close(latents[position], (1 - sigma[group, k]) * clean + sigma[group, k] * own)
            torch.testing.assert_close(target[position], own - clean)


def test_noise_depends_on_the_prompt_not_on_its_position_in_the_batch() -> None:
    """A process with only the second group draws the same noise for it as the whole batch."""
    method = GdroMethod(name="gdro")
    sigma, noise = draw_noise(batch_of(None), method, seed=3)
    part = batch_of(None).share(1, 2)
    own_sigma, own_noise = draw_noise(part, method, seed=3)
    assert torch.equal(own_sigma[0], sigma[1])
    assert torch.equal(own_noise[0], noise[1])


def test_sigma_stays_in_the_recipes_range() -> None:
    method = GdroMethod(name="gdro", sigma_min=0.4, sigma_max=0.6, share_sigma=False, share_noise=False)
    sigma, noise = draw_noise(batch_of(None, k=40), method, seed=0)
    assert 0.4 <= float(sigma.min()) < 0.45
    assert 0.55 < float(sigma.max()) < 0.6
    assert float(noise.std()) == pytest.approx(1, abs=0.02)


@pytest.mark.slow
@pytest.mark.parametrize("method", METHOD_SECTIONS, ids=lambda method: "-".join(method.values()))
def test_the_gradient_does_not_depend_on_passes_and_micro_batches(
    make_recipe: Callable[..., Recipe], method: dict[str, str]
) -> None:
    """One pass over all groups, over one or two groups at a time, and two passes that split groups of 3."""
    recipe = make_recipe(method=method)
    model = open_model(recipe)
    parameters = attach_adapter(recipe, model)
    with torch.no_grad():
        for parameter in parameters:  # away from the reference, where all s are 0
            parameter.add_(0.02 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)))
    batch = batch_of(model, prompts=(*PROMPTS, PROMPTS[0]))
    batch = replace(batch, mask=torch.tensor([[True, True, True], [True, False, True], [True, True, True]]))
    groups = noisy_groups(model, batch, draw_noise(batch, recipe.method, seed=0))
    kept: list[int] = []

    def gradient(*, one_pass: bool, micro_batch: int | None) -> tuple[torch.Tensor, LossOutput]:
        kept.clear()

        def backward(loss: torch.Tensor) -> None:
            kept.append(1)
            loss.backward()

        compute = GroupGradient(
            model=model,
            loss=loss_arguments(recipe.method),
            reduction="mean",
            guidance=1.0,
            size=(64, 64),
            micro_batch=micro_batch,
            one_pass=one_pass,
            backward=backward,
        )
        output = compute(groups)
        flat = torch.cat([parameter.grad.flatten() for parameter in parameters if parameter.grad is not None])
        for parameter in parameters:
            parameter.grad = None
        return flat, output

    whole, expected = gradient(one_pass=True, micro_batch=None)
    assert float(whole.norm()) > 1e-3 and len(kept) == 1
    for one_pass, micro_batch, times in ((True, 8, 2), (True, 3, 3), (False, 4, 3), (False, 2, 5), (False, 1, 9)):
        parts, output = gradient(one_pass=one_pass, micro_batch=micro_batch)
        assert len(kept) == times
        torch.testing.assert_close(output.per_group, expected.per_group, rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(output.metrics, expected.metrics, rtol=1e-3, atol=1e-5, equal_nan=True)
        assert float((parts - whole).norm() / whole.norm()) < 1e-3


def test_loss_arguments_fit_every_method(make_recipe: Callable[..., Recipe]) -> None:
    errors = torch.rand(2, 3)
    for section in METHOD_SECTIONS:
        arguments = loss_arguments(make_recipe(method=section).method)
        given = {"errors": errors, "reference_errors": errors, "rewards": errors}
        if arguments["method"] in DEVIATION_LOSSES:
            given["deviations"] = errors
        assert torch.isfinite(group_loss(**given, **arguments).loss)


def test_learning_rate_schedules(make_recipe: Callable[..., Recipe]) -> None:
    """Linear from 1 at step 2 to 0 at step 12 after a warm-up of 2: step 7 is half way; cosine agrees there."""
    common = {"steps": 12, "lr": 1.0, "warmup_steps": 2}
    for schedule, half in (("constant", 1.0), ("linear", 0.5), ("cosine", 0.5)):
        section = make_recipe(train={**common, "lr_schedule": schedule}).train
        assert learning_rate(section, 0) == 0.5
        assert learning_rate(section, 2) == 1.0
        assert learning_rate(section, 7) == pytest.approx(half)
