"""Bytes, operations and hours by hand."""

from __future__ import annotations

import pytest

from gdro_cli.core.footprint import (
    AdapterBytes,
    Weights,
    adapter_bytes,
    depth_plan,
    fits,
    gpu_hours,
    group_step_flops,
    weight_bytes,
)

NETWORK = Weights(values=1000, linear=640, outputs=20)
"""Two linear layers of 10 x 32 numbers and 360 others."""


@pytest.mark.parametrize(
    ("storage", "size"),
    [
        ("none", 1000 * 2),
        ("int8", 360 * 2 + 640 + 20 * 4),  # a byte each, a float32 scale per output
        ("fp8", 360 * 2 + 640 + 20 * 4),
        ("nf4", 360 * 2 + 320 + 10 * 4),  # half a byte each, a float32 scale per 64
    ],
)
def test_weights_by_hand(storage: str, size: int) -> None:
    assert weight_bytes(NETWORK, width=2, storage=storage) == size  # type: ignore[arg-type]


def test_networks_add_up() -> None:
    assert NETWORK.times(2) + Weights(5, 4, 1) == Weights(2005, 1284, 41)


def test_adapter_by_hand() -> None:
    """1,024 numbers: 4 kB each for weights, gradients and average; two moments of 4 kB, or of 1 kB and 4 scales."""
    assert adapter_bytes(1024) == AdapterBytes(weights=4096, gradients=4096, optimizer=8192, average=4096)
    assert adapter_bytes(1024, eight_bit=True).optimizer == 2 * (1024 + 4 * 4)
    assert adapter_bytes(1024).total == 20480


def test_a_two_pass_step_takes_one_more_pass_of_the_policy() -> None:
    numbers = {"images": 12, "reference": 10.0, "policy": 11.0, "update": 33.0}
    assert group_step_flops(**numbers, two_pass=False) == 12 * (10 + 33)
    assert group_step_flops(**numbers, two_pass=True) == 12 * (10 + 11 + 33)


def test_hours_at_a_speed() -> None:
    """4.5e18 operations at 125 TFLOP/s take 36,000 seconds."""
    assert gpu_hours(4.5e18) == pytest.approx(10)


def test_a_tenth_of_a_card_stays_free() -> None:
    assert fits(0.9 * 24 * 2**30) == (24, 48, 80)
    assert fits(0.9 * 24 * 2**30 + 1) == (48, 80)
    assert fits(80e9) == ()


def test_depths_by_hand_give_any_affine_count() -> None:
    """F = 100 + 7 d + 11 s at d = 19 and s = 38, from d and s of 2 and 3."""
    plan = depth_plan({"d": 19, "s": 38}, shallow=2)
    assert plan == [(1 - 17 - 36, {"d": 2, "s": 2}), (17, {"d": 3, "s": 2}), (36, {"d": 2, "s": 3})]
    assert sum(times * (100 + 7 * at["d"] + 11 * at["s"]) for times, at in plan) == 100 + 7 * 19 + 11 * 38


def test_a_kind_with_few_blocks_keeps_its_depth() -> None:
    assert depth_plan({"d": 3, "s": 0}, shallow=2) == [(1, {"d": 3, "s": 0})]
    assert depth_plan({"d": 0, "s": 9}, shallow=2) == [(-6, {"d": 0, "s": 2}), (7, {"d": 0, "s": 3})]
