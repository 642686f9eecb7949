"""Rectified flow: inverse pairs and analytic answers in float64, and the effect of half precision."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch

from gdro_cli.core.flow import euler_step, interpolate, velocity_error, velocity_target, with_norms_of
from gdro_cli.core.seeds import generator


def latents(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=generator(0, "test", *shape), dtype=torch.float64)


def test_interpolate_by_hand() -> None:
    """x0 = 2, eps = 10: sigma 0 -> 2, 0.25 -> 0.75 * 2 + 0.25 * 10 = 4, 1 -> 10; one sigma per image."""
    x0, noise = torch.full((3, 2, 2), 2.0), torch.full((3, 2, 2), 10.0)
    x = interpolate(x0, noise, torch.tensor([0.0, 0.25, 1.0]))
    assert x[:, 0, 0].tolist() == [2.0, 4.0, 10.0]
    assert torch.equal(interpolate(x0, noise, 0.25), torch.full_like(x0, 4.0))


def test_velocity_is_the_slope_of_the_path() -> None:
    x0, noise = latents(4, 3, 5), latents(4, 5, 3).view(4, 3, 5)
    low, high = torch.tensor([0.1, 0.2, 0.5, 0.0]), torch.tensor([0.4, 0.9, 0.6, 1.0])
    low, high = low.double(), high.double()
    slope = interpolate(x0, noise, high) - interpolate(x0, noise, low)
    torch.testing.assert_close(slope / (high - low).view(-1, 1, 1), velocity_target(x0, noise))


@pytest.mark.parametrize("steps", [1, 3, 8])
def test_euler_is_exact_on_a_straight_path(steps: int) -> None:
    """With the true velocity, any number of steps leads from pure noise to x0."""
    x0, noise = latents(2, 6), latents(6, 2).view(2, 6)
    sigmas = torch.linspace(1, 0, steps + 1, dtype=torch.float64).square()
    x = noise
    for sigma, sigma_next in pairwise(sigmas):
        x = euler_step(x, velocity_target(x0, noise), sigma, sigma_next)
    torch.testing.assert_close(x, x0)


def test_velocity_error_by_hand() -> None:
    """Differences (1, 3) and (0, 2): squares sum to 10 and 4, mean to 5 and 2."""
    target = torch.zeros(2, 1, 2)
    v = torch.tensor([[[1.0, 3.0]], [[0.0, 2.0]]])
    assert velocity_error(v, target).tolist() == [5.0, 2.0]
    assert velocity_error(v, target, reduction="sum").tolist() == [10.0, 4.0]


def test_velocity_error_is_reduced_in_float32() -> None:
    """4096 squares of 2^-7 in bfloat16: a bfloat16 sum would stall at 256 of them."""
    v = torch.full((1, 4096), 1 + 2**-7, dtype=torch.bfloat16)
    error = velocity_error(v, torch.ones(1, 4096), reduction="sum")
    assert error.dtype == torch.float32
    assert error.item() == 4096 * 2**-14


def test_rows_take_the_norms_of_others() -> None:
    """(3, 4) of norm 5 to norm 10; a row of zeros has no direction and stays."""
    target, values = torch.tensor([[0.0, 10.0], [1.0, 0.0]]), torch.tensor([[3.0, 4.0], [0.0, 0.0]])
    assert with_norms_of(target, values).tolist() == [[6.0, 8.0], [0.0, 0.0]]


def test_dtypes() -> None:
    half = torch.ones(2, 3, dtype=torch.bfloat16)
    assert interpolate(half, half, 0.5).dtype == torch.float32
    assert velocity_target(half, half).dtype == torch.float32
    assert euler_step(half, half, 0.5, 0.4).dtype == torch.bfloat16


def test_wrong_shapes() -> None:
    x = torch.zeros(2, 3)
    with pytest.raises(ValueError, match="sigma must be"):
        interpolate(x, x, torch.zeros(3))
    with pytest.raises(ValueError, match="differ"):
        velocity_error(x, torch.zeros(2, 1))
    with pytest.raises(KeyError, match="max"):
        velocity_error(x, x, reduction="max")  # type: ignore[arg-type]
