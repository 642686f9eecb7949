"""The corrected score by hand: reward * (u - 3) + 0.2."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gdro_cli.core.corrected import corrected_score

rewards = st.floats(0, 1)
qualities = st.floats(1, 5)


@pytest.mark.parametrize(
    ("reward", "u", "expected"),
    [
        (0.5, 4.0, 0.7),  # 0.5 * 1 + 0.2
        (1.0, 3.5, 0.7),  # worth as much: half the reward, twice the distance from 3
        (1.0, 5.0, 2.2),
        (1.0, 1.0, -1.8),
        (0.0, 1.0, 0.2),
        (0.0, 5.0, 0.2),
        (0.9, 3.0, 0.2),
    ],
)
def test_by_hand(reward: float, u: float, expected: float) -> None:
    assert corrected_score(reward, u) == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize(("reward", "u"), [(None, 4.0), (0.5, None), (None, None), (math.nan, 4.0), (0.5, math.nan)])
def test_missing_stays_missing(reward: float | None, u: float | None) -> None:
    assert corrected_score(reward, u) is None


def test_a_measured_zero_is_not_missing() -> None:
    assert corrected_score(0.0, 4.0) == 0.2


def test_below_three_a_higher_reward_lowers_the_score() -> None:
    assert corrected_score(0.9, 2.5) < corrected_score(0.1, 2.5)  # type: ignore[operator]
    assert corrected_score(0.9, 3.5) > corrected_score(0.1, 3.5)  # type: ignore[operator]


@given(rewards, qualities)
def test_range(reward: float, u: float) -> None:
    score = corrected_score(reward, u)
    assert score is not None and -1.8 - 1e-12 <= score <= 2.2 + 1e-12


@given(rewards, qualities, qualities)
def test_never_falls_with_quality(reward: float, u: float, other: float) -> None:
    low, high = sorted((u, other))
    assert corrected_score(reward, low) <= corrected_score(reward, high)  # type: ignore[operator]
