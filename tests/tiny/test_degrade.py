"""Faults of images: no change at severity 0, more with every step, and the sizes that their settings give."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
from numpy.typing import NDArray

from gdro_cli.tiny.degrade import COHERENCE, STYLE, degrade
from gdro_cli.tiny.world import Drawing, foreground_mask, random_scene, random_sign

FAULTS = (*COHERENCE, *STYLE)
SEVERITIES = (0.0, 0.2, 0.4, 0.6, 0.8, 1.0)
NOWHERE = np.zeros((64, 64), bool)
PROPORTIONAL = ("stripes", "noise", "flattened", "faded", "darkened")
"""Faults that are proportional to the severity: no pixel may return towards its original value."""


@pytest.fixture(scope="module")
def drawings() -> list[Drawing]:
    rng = np.random.default_rng(5)
    return [random_sign(rng) if number % 2 else random_scene(rng) for number in range(24)]


def pixels_of(drawing: Drawing) -> NDArray[np.uint8]:
    return np.asarray(drawing.image)


def change(drawing: Drawing, fault: str, severity: float, *, seed: int) -> NDArray[np.int64]:
    before, rng = pixels_of(drawing), np.random.default_rng(seed)
    return np.abs(degrade(before, fault, severity, rng, foreground=foreground_mask(drawing)).astype(int) - before)


def grey(level: int = 128) -> NDArray[np.uint8]:
    return np.full((64, 64, 3), level, np.uint8)


def spoilt(pixels: NDArray[np.uint8], fault: str, severity: float, *, seed: int = 0) -> NDArray[np.uint8]:
    """An image with a fault; all of it is background."""
    return degrade(pixels, fault, severity, np.random.default_rng(seed), foreground=NOWHERE)


@pytest.mark.parametrize("fault", FAULTS)
def test_severity_0_changes_nothing(fault: str, drawings: list[Drawing]) -> None:
    for seed, drawing in enumerate(drawings):
        for foreground in (NOWHERE, foreground_mask(drawing)):
            after = degrade(pixels_of(drawing), fault, 0.0, np.random.default_rng(seed), foreground=foreground)
            assert np.array_equal(after, pixels_of(drawing))


@pytest.mark.parametrize("fault", FAULTS)
def test_the_mean_change_grows_with_severity(fault: str, drawings: list[Drawing]) -> None:
    """Each image has the same random numbers at all severities."""
    means = [
        np.mean([change(drawing, fault, severity, seed=seed).mean() for seed, drawing in enumerate(drawings)])
        for severity in SEVERITIES
    ]
    assert means[0] == 0
    assert all(less < more for less, more in pairwise(means)), means
    assert means[-1] > 4  # of 255


@pytest.mark.parametrize("fault", PROPORTIONAL)
def test_no_pixel_returns_towards_its_value_with_a_proportional_fault(fault: str, drawings: list[Drawing]) -> None:
    for seed, drawing in enumerate(drawings[:8]):
        steps = [change(drawing, fault, severity, seed=seed) for severity in SEVERITIES]
        assert all((more >= less).all() for less, more in pairwise(steps))


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_gives_an_image_and_does_not_change_its_input(fault: str, drawings: list[Drawing]) -> None:
    for drawing in drawings[:4]:
        before = pixels_of(drawing).copy()
        for severity in SEVERITIES[1:]:
            after = degrade(before, fault, severity, np.random.default_rng(1), foreground=foreground_mask(drawing))
            assert (after.dtype, after.shape) == (np.uint8, (64, 64, 3))
            again = degrade(before, fault, severity, np.random.default_rng(1), foreground=foreground_mask(drawing))
            assert np.array_equal(after, again)
        assert np.array_equal(before, pixels_of(drawing))


@pytest.mark.parametrize("fault", FAULTS)
def test_only_flattening_leaves_the_foreground_unchanged(fault: str, drawings: list[Drawing]) -> None:
    inside = outside = 0
    for seed, drawing in enumerate(drawings):
        mask = foreground_mask(drawing)
        changed = change(drawing, fault, 1.0, seed=seed).any(axis=2)
        inside += int(changed[mask].sum())
        outside += int(changed[~mask].sum())
    assert outside > 0
    assert (inside == 0) == (fault == "flattened")


def test_flattening_removes_texture(drawings: list[Drawing]) -> None:
    for drawing in drawings:
        before, background = pixels_of(drawing).astype(float), ~foreground_mask(drawing)
        after = spoilt(pixels_of(drawing), "flattened", 1.0).astype(float)
        assert np.abs(after[foreground_mask(drawing)] - before[foreground_mask(drawing)]).mean() > 1  # all background
        if drawing.background == "grassy":
            assert after[background].std(axis=0).max() < before[background].std(axis=0).max()


def test_the_missing_share_of_the_foreground_follows_the_severity() -> None:
    """Pieces of at most 5 x 5 pixels on the foreground are cut out until 0.9 x severity of its 400 are gone."""
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
    """70 x 0.5 = 35 around 128, clipped at 3.6 standard deviations; 64 x 64 draws give a standard error of 0.4."""
    after = spoilt(grey(), "noise", 0.5).astype(float)
    assert after.mean() == pytest.approx(128, abs=2)
    assert after.std() == pytest.approx(35, abs=1.5)


def test_stripes_are_a_wave_of_the_right_amplitude() -> None:
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


def test_darkening_keeps_a_fifth_of_the_contrast(drawings: list[Drawing]) -> None:
    """0.2 x pixel + 0.8 x end: the standard deviation of each channel falls to a fifth, except for rounding."""
    for seed, drawing in enumerate(drawings[:8]):
        before = pixels_of(drawing).astype(float).std(axis=(0, 1))
        after = spoilt(pixels_of(drawing), "darkened", 1.0, seed=seed).astype(float)
        assert after.std(axis=(0, 1)) == pytest.approx(0.2 * before, abs=0.5)


def test_glaring_increases_colour_and_leaves_grey_unchanged() -> None:
    """At severity s: luma plus 1 + 2.5 s times the colour, then 1 + s times the contrast."""
    assert np.array_equal(spoilt(grey(77), "glaring", 1.0), grey(77))
    dull = np.full((64, 64, 3), (120, 100, 100), np.uint8)  # luma 105.98
    mean = 105.98 + 1.4 * (np.array((120, 100, 100)) - 105.98)
    after = spoilt(dull, "glaring", 0.16)[0, 0].astype(float)
    expected = 1.16 * mean - 0.16 * np.array((120, 100, 100))
    np.testing.assert_allclose(after, expected, atol=1)


def test_faults_that_need_an_edge_leave_a_flat_image_unchanged() -> None:
    for fault in ("blur", "smears", "broken edges", "flattened"):
        assert np.array_equal(spoilt(grey(), fault, 1.0), grey())


def test_an_unknown_fault_is_refused() -> None:
    with pytest.raises(KeyError, match="melted"):
        spoilt(grey(), "melted", 0.5)
