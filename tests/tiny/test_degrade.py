"""Faults of pictures: nothing at severity 0, more with every step, and of the sizes that their settings say."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
from numpy.typing import NDArray

from gdro_cli.tiny.degrade import COHERENCE, STYLE, degrade
from gdro_cli.tiny.world import Picture, foreground_mask, random_scene, random_sign

FAULTS = (*COHERENCE, *STYLE)
SEVERITIES = (0.0, 0.2, 0.4, 0.6, 0.8, 1.0)
NOWHERE = np.zeros((64, 64), bool)
PROPORTIONAL = ("stripes", "noise", "flattened", "faded", "darkened")
"""Faults that add severity times something: no pixel may come back towards what it was."""


@pytest.fixture(scope="module")
def pictures() -> list[Picture]:
    rng = np.random.default_rng(5)
    return [random_sign(rng) if number % 2 else random_scene(rng) for number in range(24)]


def pixels_of(picture: Picture) -> NDArray[np.uint8]:
    return np.asarray(picture.image)


def change(picture: Picture, fault: str, severity: float, *, seed: int) -> NDArray[np.int64]:
    before, rng = pixels_of(picture), np.random.default_rng(seed)
    return np.abs(degrade(before, fault, severity, rng, foreground=foreground_mask(picture)).astype(int) - before)


def grey(level: int = 128) -> NDArray[np.uint8]:
    return np.full((64, 64, 3), level, np.uint8)


def spoilt(pixels: NDArray[np.uint8], fault: str, severity: float, *, seed: int = 0) -> NDArray[np.uint8]:
    """A picture that is nothing but background."""
    return degrade(pixels, fault, severity, np.random.default_rng(seed), foreground=NOWHERE)


@pytest.mark.parametrize("fault", FAULTS)
def test_severity_0_changes_nothing(fault: str, pictures: list[Picture]) -> None:
    for seed, picture in enumerate(pictures):
        for foreground in (NOWHERE, foreground_mask(picture)):
            after = degrade(pixels_of(picture), fault, 0.0, np.random.default_rng(seed), foreground=foreground)
            assert np.array_equal(after, pixels_of(picture))


@pytest.mark.parametrize("fault", FAULTS)
def test_the_mean_change_grows_with_severity(fault: str, pictures: list[Picture]) -> None:
    """Each picture meets the same random numbers at all severities."""
    means = [
        np.mean([change(picture, fault, severity, seed=seed).mean() for seed, picture in enumerate(pictures)])
        for severity in SEVERITIES
    ]
    assert means[0] == 0
    assert all(less < more for less, more in pairwise(means)), means
    assert means[-1] > 4  # of 255


@pytest.mark.parametrize("fault", PROPORTIONAL)
def test_no_pixel_of_a_proportional_fault_comes_back(fault: str, pictures: list[Picture]) -> None:
    for seed, picture in enumerate(pictures[:8]):
        steps = [change(picture, fault, severity, seed=seed) for severity in SEVERITIES]
        assert all((more >= less).all() for less, more in pairwise(steps))


@pytest.mark.parametrize("fault", FAULTS)
def test_a_picture_stays_a_picture_and_the_given_one_as_it_was(fault: str, pictures: list[Picture]) -> None:
    for picture in pictures[:4]:
        before = pixels_of(picture).copy()
        for severity in SEVERITIES[1:]:
            after = degrade(before, fault, severity, np.random.default_rng(1), foreground=foreground_mask(picture))
            assert (after.dtype, after.shape) == (np.uint8, (64, 64, 3))
            again = degrade(before, fault, severity, np.random.default_rng(1), foreground=foreground_mask(picture))
            assert np.array_equal(after, again)
        assert np.array_equal(before, pixels_of(picture))


@pytest.mark.parametrize("fault", FAULTS)
def test_only_flattening_leaves_the_foreground_alone(fault: str, pictures: list[Picture]) -> None:
    inside = outside = 0
    for seed, picture in enumerate(pictures):
        mask = foreground_mask(picture)
        changed = change(picture, fault, 1.0, seed=seed).any(axis=2)
        inside += int(changed[mask].sum())
        outside += int(changed[~mask].sum())
    assert outside > 0
    assert (inside == 0) == (fault == "flattened")


def test_flattening_takes_texture_and_not_the_mean(pictures: list[Picture]) -> None:
    for picture in pictures:
        before, background = pixels_of(picture).astype(float), ~foreground_mask(picture)
        after = spoilt(pixels_of(picture), "flattened", 1.0).astype(float)
        assert np.abs(after[foreground_mask(picture)] - before[foreground_mask(picture)]).mean() > 1  # all background
        if picture.background == "grassy":
            assert after[background].std(axis=0).max() < before[background].std(axis=0).max()


def test_the_missing_share_of_the_foreground_is_the_severity_s() -> None:
    """Pieces of at most 5 x 5 are cut out until 0.9 x severity of 400 pixels are gone, and none but near them."""
    mask = NOWHERE.copy()
    mask[20:40, 20:40] = True
    before = grey(60)
    before[mask] = 220
    near = np.zeros_like(mask)
    near[16:44, 16:44] = True
    for severity in (0.1, 0.5, 1.0):
        after = degrade(before, "missing parts", severity, np.random.default_rng(1), foreground=mask)
        gone = (after[mask].astype(int) < 160).all(axis=1).sum()  # the background's 60 and a noise of 8
        assert 360 * severity <= gone < 360 * severity + 25
        assert np.array_equal(after[~near], before[~near])


def test_noise_has_its_standard_deviation() -> None:
    """70 x 0.5 = 35 around 128, cut off at 3.6 standard deviations; 64 x 64 draws: a standard error of 0.4."""
    after = spoilt(grey(), "noise", 0.5).astype(float)
    assert after.mean() == pytest.approx(128, abs=2)
    assert after.std() == pytest.approx(35, abs=1.5)


def test_stripes_are_a_wave_of_their_height() -> None:
    """A sine of amplitude 90 x 0.5 x (1 +- 0.3) has a root mean square of 45 / sqrt(2) = 31.8 (1 +- 0.3)."""
    for seed in range(6):
        wave = spoilt(grey(), "stripes", 0.5, seed=seed).astype(float) - 128
        for channel in np.sqrt(np.square(wave).mean(axis=(0, 1))):
            assert 0.67 * 31.8 < channel < 1.33 * 31.8


def test_fading_keeps_a_twentieth_of_the_colour() -> None:
    """Red 200, 100, 40 has a grey of 0.299 x 200 + 0.587 x 100 + 0.114 x 40 = 123.06.

    At severity 1: 123.06 + 0.05 x (76.94, -23.06, -83.06) = 126.9, 121.9, 118.9; rounded 127, 122, 119.
    """
    red = np.empty((64, 64, 3), np.uint8)
    red[:] = (200, 100, 40)
    after = spoilt(red, "faded", 1.0)
    assert np.unique(after.reshape(-1, 3), axis=0).tolist() == [[127, 122, 119]]
    assert np.array_equal(spoilt(grey(77), "faded", 1.0), grey(77))


def test_darkening_keeps_a_fifth_of_the_contrast(pictures: list[Picture]) -> None:
    """0.2 x pixel + 0.8 x end: the standard deviation of each channel falls to a fifth, rounding aside."""
    for seed, picture in enumerate(pictures[:8]):
        before = pixels_of(picture).astype(float).std(axis=(0, 1))
        after = spoilt(pixels_of(picture), "darkened", 1.0, seed=seed).astype(float)
        assert after.std(axis=(0, 1)) == pytest.approx(0.2 * before, abs=0.5)


def test_glaring_drives_colours_apart_and_leaves_a_grey_field() -> None:
    """At 1: luma plus 3.5 times the colour, cut off at black and white, and no contrast where there is none."""
    assert np.array_equal(spoilt(grey(77), "glaring", 1.0), grey(77))
    dull = np.full((64, 64, 3), (120, 100, 100), np.uint8)  # luma 105.98
    mean = 105.98 + 1.4 * (np.array((120, 100, 100)) - 105.98)
    after = spoilt(dull, "glaring", 0.16)[0, 0].astype(float)
    expected = 1.16 * mean - 0.16 * np.array((120, 100, 100))
    np.testing.assert_allclose(after, expected, atol=1)


def test_what_needs_an_edge_leaves_a_flat_picture_flat() -> None:
    for fault in ("blur", "smears", "broken edges", "flattened"):
        assert np.array_equal(spoilt(grey(), fault, 1.0), grey())


def test_an_unknown_fault_is_refused() -> None:
    with pytest.raises(KeyError, match="melted"):
        spoilt(grey(), "melted", 0.5)
