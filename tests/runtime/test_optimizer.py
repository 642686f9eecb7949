"""The optimizer of a recipe: plain AdamW, and the one with 8-bit moments, saved and restored."""

from __future__ import annotations

import sys

import pytest
import torch

from gdro_cli.errors import PrerequisiteError
from gdro_cli.runtime.checkpoint import flatten_optimizer, restore_optimizer
from gdro_cli.runtime.optimizer import OptimizerKind, make_optimizer

SETTINGS = {"lr": 1e-2, "betas": (0.9, 0.95), "weight_decay": 0.1}


def weights() -> list[torch.nn.Parameter]:
    """One that is large enough for 8 bits and one that is not."""
    draw = torch.Generator().manual_seed(0)
    return [torch.nn.Parameter(torch.randn(shape, generator=draw)) for shape in ((64, 128), (8, 8))]


def step(optimizer: torch.optim.Optimizer, parameters: list[torch.nn.Parameter], number: int) -> None:
    draw = torch.Generator().manual_seed(number)
    for parameter in parameters:
        parameter.grad = torch.randn(parameter.shape, generator=draw)
    optimizer.step()


@pytest.mark.parametrize("kind", ["adamw", "adamw8bit"])
def test_a_restored_optimizer_continues_exactly(kind: OptimizerKind) -> None:
    if kind == "adamw8bit":
        pytest.importorskip("bitsandbytes")
    straight, resumed = weights(), weights()
    whole, first = make_optimizer(kind, straight, **SETTINGS), make_optimizer(kind, resumed, **SETTINGS)
    for number in range(4):
        step(whole, straight, number)
    for number in range(2):
        step(first, resumed, number)
    tensors, state = flatten_optimizer(first)
    second = make_optimizer(kind, resumed, **SETTINGS)
    restore_optimizer(second, tensors, state)
    for number in (2, 3):
        step(second, resumed, number)
    for ours, theirs in zip(resumed, straight, strict=True):
        assert torch.equal(ours, theirs)


def test_8_bit_moments_follow_the_exact_ones() -> None:
    pytest.importorskip("bitsandbytes")
    exact, small = weights(), weights()
    optimizers = make_optimizer("adamw", exact, **SETTINGS), make_optimizer("adamw8bit", small, **SETTINGS)
    for number in range(5):
        for optimizer, parameters in zip(optimizers, (exact, small), strict=True):
            step(optimizer, parameters, number)
    moved = (exact[0] - weights()[0]).norm()
    assert (exact[0] - small[0]).norm() < 0.1 * moved
    torch.testing.assert_close(exact[1], small[1])  # too few values for 8 bits


def test_a_missing_package_is_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "bitsandbytes.optim", None)
    with pytest.raises(PrerequisiteError, match=r"pip install 'gdro_cli\[bitsandbytes\]'"):
        make_optimizer("adamw8bit", weights(), **SETTINGS)
