"""The numbers of a sweep by hand: curves, peaks and means over seeds."""

from __future__ import annotations

from typing import Any

import pytest

from gdro_cli.core.evaluation_points import MissingLimits
from gdro_cli.core.sweeps import Spread, best, curve, figures, spread, training_seconds


def point(step: int, reward: float | None, **more: Any) -> dict[str, Any]:
    return {"step": step, "reward": reward, "images": 8, "failed": 0, **more}


def test_a_spread_is_over_the_values_that_are_not_missing() -> None:
    assert spread([0.25, None, 0.75]) == Spread(0.5, 0.25, 0.75, 2)
    assert spread([0.0]) == Spread(0.0, 0.0, 0.0, 1)
    assert spread([None]) is None


def test_a_curve_has_every_step_that_some_run_has() -> None:
    """At step 4 only the first run has a point; at step 2 the second lacks the measure; step 6 has none at all."""
    first = [point(0, 0.2), point(2, 0.4), point(4, 0.6)]
    second = [point(0, 0.4), point(2, None), point(6, None)]
    points = curve([first, second], "reward")
    assert [point.step for point in points] == [0, 2, 4]
    assert points[0].over_seeds == Spread(pytest.approx(0.3), 0.2, 0.4, 2)
    assert [point.over_seeds.seeds for point in points] == [2, 1, 1]
    assert curve([[], []], "reward") == ()


def test_peaks_leave_out_the_untrained_model_and_points_that_lack_too_much() -> None:
    """Step 0 has the highest reward; step 2 the next, but 3 of its 8 images lack u; 4 and 6 are equal after that."""
    points = [
        point(0, 0.9, corrected=2.0),
        point(2, 0.8, corrected=1.5, unjudged=3),
        point(4, 0.5, corrected=1.0),
        point(6, 0.6, corrected=1.0),
        point(8, 0.4),
    ]
    chosen = figures(points[::-1], reward="reward", measure="corrected", limits=MissingLimits(0.3, 0.3))
    assert chosen.final is points[4]
    assert chosen.peak_reward is points[3]
    assert chosen.peak is points[2]  # of equal ones the earliest
    nothing = figures(points[:1], reward="reward", measure="corrected", limits=MissingLimits(0.3, 0.3))
    assert (nothing.final, nothing.peak_reward, nothing.peak) == (None, None, None)


def test_the_best_has_every_seed_and_equal_settings_are_both_named() -> None:
    settings = {"a": Spread(0.5, 0.4, 0.6, 2), "b": Spread(0.9, 0.9, 0.9, 1), "c": None}
    assert best(settings, seeds=2) == ("a",)
    assert best({**settings, "d": Spread(0.5, 0.5, 0.5, 2)}, seeds=2) == ("a", "d")
    assert best({"c": None}, seeds=1) == ()


def test_steps_that_were_not_logged_take_the_mean_time() -> None:
    """Two of ten steps are logged, of 1 s and 3 s: 10 x 2 s, and 5 s of evaluation."""
    rows = [
        {"kind": "train", "seconds": 1.0},
        {"kind": "validation", "seconds": 5.0},
        {"kind": "train", "seconds": 3.0},
    ]
    assert training_seconds(rows, steps=10) == 25.0
    assert training_seconds(rows[1:2], steps=10) is None
