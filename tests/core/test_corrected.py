"""The corrected score by hand, reward * (u - 3) + 0.2: the mean of the images' scores, and the score of the means."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gdro_cli.core.corrected import RewardAndQuality, corrected_of_means, corrected_score
from gdro_cli.core.scores import bootstrap_ci, paired_bootstrap

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


# --- of the means --------------------------------------------------------------------------------------------


def test_the_two_readings_by_hand() -> None:
    """Images (r, u) = (1, 4) and (0, 2).

    Mean of products: ((1 * 1 + 0.2) + (0 * -1 + 0.2)) / 2 = 0.7. Product of means: 0.5 * (3 - 3) + 0.2 = 0.2.
    """
    scores = [corrected_score(1.0, 4.0), corrected_score(0.0, 2.0)]
    assert bootstrap_ci([scores]).mean == pytest.approx(0.7)
    assert corrected_of_means(RewardAndQuality([[1.0, 0.0]], [[4.0, 2.0]])).mean == pytest.approx(0.2)


def test_resampled_means_by_hand() -> None:
    """Two prompts of one image: every resample is (1, 4) twice, (0, 2) twice or both: 1.2, 0.2 and 0.2."""
    found = corrected_of_means(RewardAndQuality([[1.0], [0.0]], [[4.0], [2.0]]), samples=200)
    assert (found.low, found.mean, found.high) == (pytest.approx(0.2), pytest.approx(0.2), pytest.approx(1.2))
    assert (found.prompts, found.images, found.level) == (2, 2, 0.95)


def test_equal_u_makes_the_readings_one_with_one_interval() -> None:
    """With u = 4 throughout both are mean(r) + 0.2, and the prompts that are drawn are the same."""
    rewards = [[0.1, 0.9], [0.4, 0.6], [1.0, 0.2]]
    found = corrected_of_means(RewardAndQuality(rewards, [[4.0, 4.0]] * 3), samples=100)
    expected = bootstrap_ci([[corrected_score(r, 4.0) for r in prompt] for prompt in rewards], samples=100)
    assert (found.mean, found.low, found.high) == pytest.approx((expected.mean, expected.low, expected.high))


def test_the_difference_of_two_models_is_paired() -> None:
    """r rises by 0.5 everywhere at u = 4: the difference is 0.5, whichever prompts are drawn."""
    base, trained = ([[0.0 + gain], [0.5 + gain]] for gain in (0.0, 0.5))
    us = [[4.0], [4.0]]
    found = corrected_of_means(RewardAndQuality(trained, us), base=RewardAndQuality(base, us), samples=100)
    assert (found.mean, found.low, found.high) == pytest.approx((0.5, 0.5, 0.5))
    assert found.mean == pytest.approx(paired_bootstrap(base, trained).mean)


def test_the_mean_of_rewards_is_that_of_strata_and_u_is_a_plain_mean() -> None:
    """Tags: r of counting 1, 1 and 1, of colors 0, so r = 0.5; u = (4 + 4 + 4 + 2) / 4 = 3.5; 0.5 * 0.5 + 0.2."""
    rewards, us = [[1.0], [1.0], [1.0], [0.0]], [[4.0], [4.0], [4.0], [2.0]]
    strata = ["counting"] * 3 + ["colors"]
    found = corrected_of_means(RewardAndQuality(rewards, us, strata))
    assert found.mean == pytest.approx(0.45)
    # counting is always 1 and colors always 0, with the same u in each resample
    assert (found.low, found.high) == pytest.approx((0.45, 0.45))


def test_missing_values_are_left_out_of_their_own_mean_and_of_both_sides_of_a_difference() -> None:
    """r = 0.5 over two images, u = 4 over one. In the difference u is missing on both sides but for the last image."""
    images = RewardAndQuality([[1.0, 0.0, None]], [[4.0, None, math.nan]])
    found = corrected_of_means(images)
    assert (found.mean, found.images) == (pytest.approx(0.7), 1)
    base = RewardAndQuality([[0.0, 0.0, 1.0]], [[4.0, 5.0, 5.0]])
    assert corrected_of_means(images, base=base).mean == pytest.approx(0.5)  # r 0.5 and 0, u 4 and 4


@pytest.mark.parametrize(("rewards", "us"), [([[None]], [[4.0]]), ([[1.0]], [[None]]), ([], [])])
def test_nothing_to_average_is_refused(rewards: list[list[float | None]], us: list[list[float | None]]) -> None:
    with pytest.raises(ValueError, match="no scored image"):
        corrected_of_means(RewardAndQuality(rewards, us))
