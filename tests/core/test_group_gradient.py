"""The gradient of the whole objective: gradcheck, unscored images, and one pass against two."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from gdro_cli.core.flow import interpolate, velocity_error, velocity_target
from gdro_cli.core.losses import group_loss, image_weights
from gdro_cli.core.seeds import generator

CASES: dict[str, dict[str, Any]] = {
    "gdro": {"method": "gdro", "tau": 0.05},
    "gdro tau 0": {"method": "gdro", "tau": 0.0},
    "rank": {"method": "rank"},
    "top1": {"method": "top1", "tau": 0.05},
    "dpo": {"method": "dpo"},
    "dpo all pairs": {"method": "dpo", "pairs": "all"},
    "lair": {"method": "regression", "target": "lair", "tau": 0.05, "penalty": 0.5},
    "crd": {"method": "regression", "target": "crd", "tau": 0.05, "penalty": 0.5},
    "dgpo": {"method": "dgpo"},
    "nft": {"method": "nft", "mixing": 0.5, "advantage_clip": 1.0},
}
every_case = pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
B, K, D = 3, 4, 5


def numbers(*, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    stream = generator(seed, "test")
    errors, reference, rewards = torch.rand(3, B, K, generator=stream, dtype=torch.float64)
    return errors, reference, rewards


def deviations(case: dict[str, Any]) -> dict[str, Tensor]:
    """What ``group_loss`` takes beside errors: for nft, deviations from the reference [B, K]."""
    if case["method"] != "nft":
        return {}
    return {"deviations": torch.rand(B, K, generator=generator(8, "test"), dtype=torch.float64)}


class Velocity(nn.Module):
    """A small velocity model: x_sigma [N, D] and sigma [N] in, v [N, D] out."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(D + 1, 8)
        self.last = nn.Linear(8, D)

    def forward(self, x: Tensor, sigma: Tensor) -> Tensor:
        hidden: Tensor = self.first(torch.cat([x, sigma[:, None]], dim=1)).tanh()
        velocity: Tensor = self.last(hidden)
        return velocity


@every_case
def test_gradcheck(case: dict[str, Any]) -> None:
    errors, reference, rewards = numbers(seed=1)
    mask = torch.tensor([[True] * 4, [True, False, True, True], [False, True, False, True]])
    rewards[~mask] = torch.nan
    reference[~mask] = torch.nan

    def loss(*values: Tensor) -> Tensor:
        given: dict[str, Any] = dict(zip(names, values, strict=True))
        whole: dict[str, Any] = {"reference_errors": reference, "rewards": rewards, "mask": mask}
        return group_loss(**given, **whole, beta=3.0, gamma=0.5, **case).loss

    leaves = {"errors": errors, **deviations(case)}
    names = list(leaves)
    assert torch.autograd.gradcheck(loss, [value.requires_grad_(True) for value in leaves.values()])


@every_case
@pytest.mark.parametrize("micro_batch", [1, 5, 12])
def test_one_pass_equals_two_passes(case: dict[str, Any], micro_batch: int) -> None:
    """Backward through sum(w * e) in parts gives the gradient of the loss itself in every parameter."""
    stream = generator(2, "test")
    x0, noise = torch.randn(2, B * K, D, generator=stream, dtype=torch.float64)
    sigma = torch.rand(B * K, generator=stream, dtype=torch.float64)
    rewards = numbers(seed=3)[2]
    torch.manual_seed(0)
    policy, reference = Velocity().double(), Velocity().double()
    x, target = interpolate(x0, noise, sigma), velocity_target(x0, noise)
    settings: dict[str, Any] = {"beta": 12.0, "gamma": 0.5, **case}
    with torch.no_grad():
        base = reference(x, sigma)
        given = {"reference_errors": velocity_error(base, target).view(B, K), "rewards": rewards}
    names = ("errors", *deviations(case))

    def measured(i: Tensor) -> Tensor:
        """Errors and, for nft, deviations [1 or 2, n]."""
        velocity = policy(x[i], sigma[i])
        return torch.stack(
            [velocity_error(velocity, other[i]) for _, other in zip(names, (target, base), strict=False)]
        )

    def named(values: Tensor) -> dict[str, Any]:
        return dict(zip(names, values.view(-1, B, K), strict=True))

    group_loss(**named(measured(torch.arange(B * K))), **given, **settings).loss.backward()
    expected = [p.grad.clone() for p in policy.parameters() if p.grad is not None]
    assert len(expected) == 4
    assert all(grad.abs().max() > 1e-6 for grad in expected)

    policy.zero_grad()
    chunks = torch.arange(B * K).split(micro_batch)
    with torch.inference_mode():
        errors = torch.cat([measured(i) for i in chunks], dim=1)
        weights = image_weights(**named(errors), **given, **settings).view(len(names), -1)
    for i in chunks:
        (weights[:, i] * measured(i)).sum().backward()
    for parameter, grad in zip(policy.parameters(), expected, strict=True):
        torch.testing.assert_close(parameter.grad, grad)


@every_case
def test_weights_are_the_gradient_of_the_loss(case: dict[str, Any]) -> None:
    errors, reference, rewards = numbers(seed=4)
    settings: dict[str, Any] = {"beta": 6.0, "gamma": 1.0, **case}
    leaves = {name: x.clone().requires_grad_(True) for name, x in {"errors": errors, **deviations(case)}.items()}
    group_loss(**leaves, reference_errors=reference, rewards=rewards, **settings).loss.backward()
    with torch.no_grad():
        weights = image_weights(**leaves, reference_errors=reference, rewards=rewards, **settings)
    torch.testing.assert_close(weights.view(-1, B, K), torch.stack([leaf.grad for leaf in leaves.values()]))


@every_case
@pytest.mark.parametrize("junk", [torch.nan, torch.inf, 1e30])
def test_unscored_image_is_as_good_as_absent(case: dict[str, Any], junk: float) -> None:
    """Image 1 of every group is unscored: loss, metrics and weights are those of the group without it."""
    errors, reference, rewards = numbers(seed=5)
    mask = torch.ones(B, K, dtype=torch.bool)
    mask[:, 1] = False
    scored = [0, 2, 3]
    settings: dict[str, Any] = {"beta": 12.0, "gamma": 0.5, **case}
    apart = deviations(case)
    smaller: dict[str, Any] = {
        **{name: value[:, scored] for name, value in apart.items()},
        "errors": errors[:, scored],
        "reference_errors": reference[:, scored],
        "rewards": rewards[:, scored],
    }
    expected = group_loss(**smaller, **settings)
    expected_weights = image_weights(**smaller, **settings)

    for values in (errors, reference, rewards, *apart.values()):
        values[~mask] = junk
    whole: dict[str, Any] = {
        **apart,
        "errors": errors,
        "reference_errors": reference,
        "rewards": rewards,
        "mask": mask,
    }
    out = group_loss(**whole, **settings)
    weights = image_weights(**whole, **settings)
    torch.testing.assert_close(out.per_group, expected.per_group)
    torch.testing.assert_close(weights[..., scored], expected_weights)
    assert not weights[..., 1].any()
    assert out.metrics.keys() - expected.metrics.keys() == {"s_rank_4"}
    for name, value in expected.metrics.items():
        torch.testing.assert_close(out.metrics[name], value)


def test_group_without_scores_adds_nothing() -> None:
    errors, reference, rewards = numbers(seed=6)
    mask = torch.ones(B, K, dtype=torch.bool)
    mask[1] = False
    rewards[1] = torch.nan
    settings: dict[str, Any] = {"beta": 12.0, "gamma": 0.5, "tau": 0.05}
    out = group_loss("gdro", errors, reference, rewards, mask, **settings)
    weights = image_weights("gdro", errors, reference, rewards, mask, **settings)
    assert out.per_group[1] == 0
    assert not weights[1].any()
    assert torch.isfinite(weights).all()


def test_no_gradient_reaches_reference_or_metrics() -> None:
    errors, reference, rewards = numbers(seed=7)
    errors.requires_grad_(True)
    reference.requires_grad_(True)
    out = group_loss("gdro", errors, reference, rewards, beta=12.0, gamma=0.5, tau=0.05)
    out.loss.backward()
    assert reference.grad is None
    assert errors.grad is not None
    assert not any(value.requires_grad for value in out.metrics.values())
