"""Costs of a training run by hand."""

from __future__ import annotations

import pytest

from gdro_cli.core.costs import Batch, Costs, costs_until, first_step_at

STORE = Batch(step=0, sampling=30.0, scoring=10.0)


def step(number: int, seconds: float, **more: float) -> dict[str, object]:
    return {"kind": "train", "step": number, "seconds": seconds, **more}


def test_training_on_a_store_pays_for_the_store_first() -> None:
    rows = [step(1, 2.0), step(2, 4.0), {"kind": "validation", "step": 2, "seconds": 99.0}, step(3, 9.0)]
    assert costs_until(0, rows, [STORE]) == Costs(30.0, 10.0, 0.0)
    assert costs_until(2, rows, [STORE]) == Costs(30.0, 10.0, 6.0)
    assert costs_until(3, rows, [STORE]) == Costs(30.0, 10.0, 15.0)


def test_steps_that_were_not_logged_cost_the_mean_of_the_others() -> None:
    assert costs_until(4, [step(2, 1.0), step(4, 3.0)], []) == Costs(0.0, 0.0, 8.0)


def test_online_training_pays_as_it_goes() -> None:
    rows = [step(n, 6.0, seconds_sampling=3.0, seconds_scoring=1.0, seconds_updates=2.0) for n in (1, 2, 3)]
    costs = costs_until(2, rows, [])
    assert costs == Costs(6.0, 2.0, 4.0)
    assert costs.total == pytest.approx(12.0)


def test_a_later_store_is_paid_for_by_the_steps_that_learn_from_it() -> None:
    rows, later = [step(n, 1.0) for n in range(1, 5)], Batch(step=2, sampling=5.0, scoring=6.0)
    assert costs_until(2, rows, [STORE, later]) == Costs(30.0, 10.0, 2.0)
    assert costs_until(3, rows, [STORE, later]) == Costs(35.0, 16.0, 3.0)


def test_a_cost_that_was_not_logged_is_unknown_and_not_zero() -> None:
    assert costs_until(3, [{"kind": "train", "step": 3}], [STORE]) is None


def test_the_first_point_at_a_reward() -> None:
    points = [{"step": 0, "reward": 0.5}, {"step": 10, "reward": None}, {"step": 20, "reward": 0.8}]
    points += [{"step": 30, "reward": 0.7}]
    assert first_step_at(0.5, points) == 0
    assert first_step_at(0.6, points) == 20
    assert first_step_at(0.9, points) is None
