"""Bootstrap intervals against exact distributions, the normal approximation and their own coverage."""

from __future__ import annotations

import math
from statistics import NormalDist

import pytest
import torch

from gdro_cli.core.scores import Interval, bootstrap_ci, paired_bootstrap
from gdro_cli.core.seeds import generator


def columns(values: torch.Tensor) -> list[list[float]]:
    return [[value] for value in values.tolist()]


def test_two_prompts_exactly() -> None:
    """Resamples of prompts 0 and 1 have means 0, 1/2, 1 with chances 1/4, 1/2, 1/4.

    So the quantiles at 10 % and 90 % are 0 and 1, those at 30 % and 70 % both 1/2.
    """
    assert bootstrap_ci([[0.0], [1.0]], samples=4000, level=0.8) == Interval(0.5, 0.0, 1.0, 2, 2, 0.8)
    assert bootstrap_ci([[0.0], [1.0]], samples=4000, level=0.4) == Interval(0.5, 0.5, 0.5, 2, 2, 0.4)


def test_images_of_a_prompt_stay_together() -> None:
    """Two prompts of 50 equal images each are as uncertain as two prompts of one image."""
    interval = bootstrap_ci([[0.0] * 50, [1.0] * 50], samples=4000, level=0.8)
    assert interval == Interval(0.5, 0.0, 1.0, 2, 100, 0.8)


def test_unequal_prompts_weigh_by_images() -> None:
    """Prompt means 0 (3 images) and 1 (1 image): the mean over images is 1/4, also in the mixed resamples."""
    interval = bootstrap_ci([[0.0] * 3, [1.0]], samples=4000, level=0.4)
    assert (interval.mean, interval.low, interval.high) == (0.25, 0.25, 0.25)


def test_missing_scores_are_left_out() -> None:
    values: list[list[float | None]] = [[0.2, None, 0.4], [math.nan, 0.9], [None, math.nan]]
    assert bootstrap_ci(values) == bootstrap_ci([[0.2, 0.4], [0.9]])
    assert bootstrap_ci(values).mean == pytest.approx(0.5)
    assert (bootstrap_ci(values).prompts, bootstrap_ci(values).images) == (2, 3)


@pytest.mark.parametrize("level", [0.68, 0.95])
def test_matches_the_normal_approximation(level: float) -> None:
    """400 normal prompts: ends at mean -+ z sd / sqrt(P), here to 6 % of the half width."""
    values = torch.randn(400, generator=generator(0, "test"), dtype=torch.float64)
    half = NormalDist().inv_cdf((1 + level) / 2) * values.std(correction=0).item() / math.sqrt(400)
    interval = bootstrap_ci(columns(values), samples=10_000, level=level)
    assert interval.mean == pytest.approx(values.mean().item(), abs=1e-12)
    assert interval.low == pytest.approx(interval.mean - half, abs=0.06 * half)
    assert interval.high == pytest.approx(interval.mean + half, abs=0.06 * half)


@pytest.mark.slow
def test_coverage() -> None:
    """300 sets of 40 uniform prompts: the 90 % interval contains the true mean 0.5 in 90 % -+ 5 % of them."""
    hits = 0
    for trial in range(300):
        values = torch.rand(40, generator=generator(trial, "coverage"), dtype=torch.float64)
        interval = bootstrap_ci(columns(values), seed=trial, samples=300, level=0.9)
        hits += interval.low <= 0.5 <= interval.high
    assert 0.85 < hits / 300 < 0.95


def test_seed_names_the_interval() -> None:
    values = columns(torch.rand(30, generator=generator(1, "test"), dtype=torch.float64))
    assert bootstrap_ci(values, seed=4) == bootstrap_ci(values, seed=4)
    assert bootstrap_ci(values, seed=4) != bootstrap_ci(values, seed=5)


def test_chunks_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    values = columns(torch.rand(30, generator=generator(1, "test"), dtype=torch.float64))
    whole = bootstrap_ci(values)
    monkeypatch.setattr("gdro_cli.core.scores.DRAWS_PER_CHUNK", 100)
    assert bootstrap_ci(values) == whole


def test_paired_difference_cancels_what_prompts_share() -> None:
    """The gain is 0.1 on every prompt: the paired interval is a point, the unpaired ones overlap."""
    base = torch.rand(50, generator=generator(2, "test"), dtype=torch.float64)
    before, after = columns(base), columns(base + 0.1)
    interval = paired_bootstrap(before, after)
    assert (interval.low, interval.high) == pytest.approx((0.1, 0.1), abs=1e-12)
    assert bootstrap_ci(before).high > bootstrap_ci(after).low


def test_paired_direction_and_missing() -> None:
    """Candidate minus baseline; only image 0 of each prompt is scored on both sides: 0.3 and 0.5."""
    interval = paired_bootstrap([[0.1, 0.9], [0.2, None]], [[0.4, None], [0.7, 0.0]])
    assert interval.mean == pytest.approx(0.4)
    assert (interval.prompts, interval.images) == (2, 2)


def test_one_prompt_is_a_point() -> None:
    assert bootstrap_ci([[0.25, 0.75]]) == Interval(0.5, 0.5, 0.5, 1, 2, 0.95)


def test_wrong_arguments() -> None:
    with pytest.raises(ValueError, match="no scored image"):
        bootstrap_ci([[None], []])
    with pytest.raises(ValueError, match="same prompts"):
        paired_bootstrap([[1.0]], [[1.0, 2.0]])


# --- strata --------------------------------------------------------------------------------------------------


def test_the_mean_of_strata_weighs_them_alike() -> None:
    """Means over images: a 1/4 (prompts of 3 and 1 images), b 1. Their mean is 5/8; over all images it is 2/5."""
    values = [[0.0, 0.0, 0.0], [1.0], [1.0]]
    interval = bootstrap_ci(values, strata=["a", "a", "b"])
    assert interval.mean == pytest.approx(5 / 8)
    assert (interval.prompts, interval.images) == (3, 5)
    assert bootstrap_ci(values).mean == pytest.approx(2 / 5)


def test_prompts_are_drawn_within_their_stratum() -> None:
    """All prompts of a stratum have one value: every resample has the means 0 and 1, so the interval is a point.

    If prompts were drawn from all four, 1 in 16 resamples would have no 1 at all.
    """
    values = [[0.0], [1.0], [0.0], [1.0]]
    interval = bootstrap_ci(values, strata=["a", "b", "a", "b"], level=0.99)
    assert (interval.mean, interval.low, interval.high) == (0.5, 0.5, 0.5)
    assert bootstrap_ci(values, level=0.99).low == 0.0


def test_strata_are_resampled_independently() -> None:
    """Two strata of the prompts 0 and 1: each mean is 0, 1/2, 1 with 1/4, 1/2, 1/4, so their mean is 0 in 1 of 16.

    The mean is 0 or 1/4 in 1/16 + 2 * 1/8 = 5/16 of them, so the 5 % quantile is 0 and the 20 % quantile 1/4. If both
    strata shared their draws, 1/4 of the means would be 0, and so would the 20 % quantile.
    """
    values, strata = [[0.0], [1.0], [0.0], [1.0]], ["a", "a", "b", "b"]
    interval = bootstrap_ci(values, strata=strata, samples=8000, level=0.6)
    assert (interval.mean, interval.low, interval.high) == (0.5, 0.25, 0.75)
    assert bootstrap_ci(values, strata=strata, samples=8000, level=0.9).low == 0.0


def test_one_stratum_changes_nothing() -> None:
    values = columns(torch.rand(30, generator=generator(1, "test"), dtype=torch.float64))
    assert bootstrap_ci(values, strata=["a"] * 30) == bootstrap_ci(values)


def test_an_empty_stratum_is_an_error_that_names_it() -> None:
    values: list[list[float | None]] = [[1.0], [None, math.nan], []]
    with pytest.raises(ValueError, match="^no scored image to average in counting, position$"):
        bootstrap_ci(values, strata=["colors", "counting", "position"])
    with pytest.raises(ValueError, match="^no scored image to average$"):
        bootstrap_ci([[None]])
    assert bootstrap_ci(values, strata=["a", "a", "a"]).images == 1
    with pytest.raises(ValueError, match="longer"):
        bootstrap_ci(values, strata=["a"])


def test_paired_strata() -> None:
    """Gains: a 0.3 and 0.1, mean 0.2; b 1; mean of both 0.6. An image missing on one side empties its stratum."""
    before: list[list[float | None]] = [[0.1], [0.2], [0.0]]
    after: list[list[float | None]] = [[0.4], [0.3], [1.0]]
    assert paired_bootstrap(before, after, strata=["a", "a", "b"]).mean == pytest.approx(0.6)
    with pytest.raises(ValueError, match="in b"):
        paired_bootstrap(before, [[0.4], [0.3], [None]], strata=["a", "a", "b"])
