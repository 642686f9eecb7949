"""Image signals by hand on drawn patterns, on the embedded world's images, and as properties of any image."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import asdict

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from numpy.typing import NDArray

from gdro_cli.core.signals import ImageSignals, group_diversity, image_signals, rank_disagreement
from gdro_cli.tiny.world import random_scene, random_sign

Pixels = NDArray[np.uint8]

any_image = hnp.arrays(np.uint8, st.tuples(st.integers(8, 20), st.integers(8, 20), st.just(3)))


def grey(levels: NDArray[np.generic]) -> Pixels:
    """A grey image from levels [H, W], 0 to 255."""
    return np.repeat(np.clip(np.rint(levels), 0, 255).astype(np.uint8)[..., None], 3, axis=2)


def wave(period: float, *, height: int = 64, width: int = 64, amplitude: float = 100, angle: float = 0) -> Pixels:
    """Grey stripes with a period in pixels; angle 0 changes along the width."""
    y, x = np.mgrid[0:height, 0:width]
    return grey(127.5 + amplitude * np.sin(2 * np.pi * (math.cos(angle) * x + math.sin(angle) * y) / period + 0.3))


def larger(image: Pixels, factor: int) -> Pixels:
    return image.repeat(factor, axis=0).repeat(factor, axis=1)


# -- by hand --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("level", "dark"), [(0, 1.0), (63, 1.0), (64, 0.0), (255, 0.0)])
def test_one_colour_has_nothing_but_its_brightness(level: int, dark: float) -> None:
    """The limit of darkness, luma 0.25, is between 63 / 255 and 64 / 255."""
    assert image_signals(np.full((24, 40, 3), level, np.uint8)) == ImageSignals(dark, 0.0, 0.0, 0.0, 0.0)


def test_luma_weighs_the_colours() -> None:
    """Pure green has luma 0.587, pure red 0.299: light. Pure blue has 0.114: dark. A third of the rows each."""
    image = np.zeros((24, 24, 3), np.uint8)
    for channel in range(3):
        image[channel * 8 : channel * 8 + 8, :, channel] = 255
    assert image_signals(image).dark_share == pytest.approx(1 / 3)
    assert image_signals(image).colour_entropy == pytest.approx(math.log2(3))


def test_half_black() -> None:
    """Half the pixels are dark; two colours are 1 bit; of the 62 inner columns the two beside the step are edges.

    A step has energy 1 / k^2 at odd k. The sum over all is pi^2 / 8, beyond 16 cycles it is about 1 / 32: 2.5 % of it.
    """
    image = np.full((32, 64, 3), 255, np.uint8)
    image[:, :32] = 0
    signals = image_signals(image)
    assert (signals.dark_share, signals.colour_entropy) == (0.5, 1.0)
    assert signals.edge_density == pytest.approx(2 / 62)
    assert signals.high_frequency == pytest.approx(8 / math.pi**2 / 32, abs=2e-3)


@pytest.mark.parametrize(("step", "edges"), [(25, 0.0), (26, 2 / 62)])
def test_the_limit_of_an_edge(step: int, edges: float) -> None:
    """Sobel gives half the step: 0.05 is between 25 / 510 = 0.0490 and 26 / 510 = 0.0510."""
    levels = np.full((32, 64), 100)
    levels[:, 32:] += step
    assert image_signals(grey(levels)).edge_density == pytest.approx(edges)
    assert image_signals(grey(levels.T)).edge_density == pytest.approx(edges)


def test_checkerboard_of_single_pixels() -> None:
    """All energy at the highest frequency; Sobel averages it away, which gives 0."""
    y, x = np.mgrid[0:32, 0:32]
    signals = image_signals(grey((x + y) % 2 * 255))
    assert signals.colour_entropy == 1.0
    assert signals.edge_density == 0.0
    assert signals.high_frequency == pytest.approx(1.0)
    assert signals.stripe_peak == pytest.approx(1.0)


@pytest.mark.parametrize("count", [1, 2, 8, 64, 512])
def test_entropy_of_equally_frequent_colours(count: int) -> None:
    """n colours in different cells of the 8 x 8 x 8 raster: log2 n bits, at most 9."""
    codes = np.arange(1024) % count * (512 // count)
    image = np.stack([codes // 64, codes // 8 % 8, codes % 8], axis=-1).reshape(32, 32, 3) * 32 + 5
    assert image_signals(image.astype(np.uint8)).colour_entropy == pytest.approx(math.log2(count), abs=1e-12)


def test_colours_of_one_cell_are_one_colour() -> None:
    levels = np.where(np.arange(64) % 2, 32, 63)[None, :].repeat(16, axis=0)
    assert image_signals(grey(levels)).colour_entropy == 0.0


@pytest.mark.parametrize(("period", "peak", "high"), [(3.2, 1, 1), (64 / 14, 1, 0), (8, 1, 0), (16, 0, 0), (64, 0, 0)])
def test_stripes_of_whole_periods(period: float, peak: float, high: float) -> None:
    """20, 14 and 8 cycles are stripes, 4 and 1 are composition; a period of 3.2 pixels is a high frequency."""
    signals = image_signals(wave(period))
    assert signals.stripe_peak == pytest.approx(peak, abs=2e-3)
    assert signals.high_frequency == pytest.approx(high, abs=2e-3)


@pytest.mark.parametrize("period", [3.3, 4.7, 5.9, 7.1])
@pytest.mark.parametrize("angle", [0, 0.5, math.pi / 2, 2.2])
def test_stripes_of_any_period_and_direction(period: float, angle: float) -> None:
    """Between two frequencies half way on both axes, the nine bins still hold (0.9796)^2 of the energy."""
    assert 0.95 < image_signals(wave(period, angle=angle, height=72, width=100)).stripe_peak <= 1


def test_stripes_over_noise_count_by_their_energy() -> None:
    """A wave of amplitude a over noise of deviation s: a^2 / 2 of a^2 / 2 + s^2; here 800 of 800 + 400, or 2/3."""
    noise = np.random.default_rng(0).normal(0, 20, (128, 128))
    x = np.arange(128)[None, :]
    signals = image_signals(grey(128 + 40 * np.sin(2 * np.pi * x / 4) + noise))
    assert signals.stripe_peak == pytest.approx(2 / 3, abs=0.03)


def test_white_noise() -> None:
    """Energy is the same at all frequencies of the square of side 1; those up to 0.25 are a disc of area pi / 16."""
    signals = image_signals(grey(np.random.default_rng(0).normal(128, 30, (256, 256))))
    assert signals.high_frequency == pytest.approx(1 - math.pi / 16, abs=0.02)
    assert signals.stripe_peak < 0.01


@pytest.mark.parametrize("size", [64, 256])
def test_a_soft_ramp_has_no_high_frequencies(size: int) -> None:
    """As a periodic signal without a window it would have a hard edge; only the 8-bit rounding is left."""
    signals = image_signals(grey(np.linspace(40, 210, size)[None, :].repeat(size, axis=0)))
    assert signals.high_frequency < 1e-3
    assert signals.stripe_peak < 1e-3
    assert signals.edge_density == 0


# -- size -----------------------------------------------------------------------------------------------------------


def test_sizes() -> None:
    """Each pixel fourfold: shares of pixels and colours stay; a period of 3.2 pixels becomes one of 6.4."""
    small, large = image_signals(wave(3.2)), image_signals(larger(wave(3.2), 2))
    assert (large.dark_share, large.colour_entropy) == (small.dark_share, small.colour_entropy)
    assert small.high_frequency > 0.99
    assert large.high_frequency < 0.3


@pytest.mark.parametrize("factor", [2, 4])
def test_edges_of_the_same_scene_at_another_size(factor: int) -> None:
    """From 256 pixels on, edges are counted after averaging to 128 or more: block copies give the same count."""
    scene = larger(world_images(1)[0], 4)
    assert scene.shape == (256, 256, 3)
    assert image_signals(larger(scene, factor)).edge_density == image_signals(scene).edge_density > 0


def test_odd_sizes_are_also_averaged() -> None:
    """300 x 391 pixels become 150 x 195; a vertical edge then is 2 of 193 columns, or 3 if it cuts a block."""
    levels = np.zeros((300, 391))
    levels[:, 200:] = 255
    assert image_signals(grey(levels)).edge_density in (pytest.approx(2 / 193), pytest.approx(3 / 193))


@pytest.mark.parametrize(
    "image",
    [
        np.zeros((7, 64, 3), np.uint8),
        np.zeros((64, 64), np.uint8),
        np.zeros((64, 64, 4), np.uint8),
        np.zeros((64, 64, 3), np.float32),
    ],
)
def test_other_arrays_are_refused(image: NDArray[np.generic]) -> None:
    with pytest.raises(ValueError, match=r"uint8 \[H, W, 3\] with sides of 8 or more"):
        image_signals(image)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"uint8 \[H, W, 3\] with sides of 8 or more"):
        group_diversity([image, image])  # type: ignore[list-item]


# -- any image ----------------------------------------------------------------------------------------------------


@settings(deadline=None)
@given(any_image)
def test_ranges(image: Pixels) -> None:
    signals = image_signals(image)
    assert 0 <= signals.colour_entropy <= 9
    for share in (signals.dark_share, signals.edge_density, signals.high_frequency, signals.stripe_peak):
        assert 0 <= share <= 1


@settings(deadline=None)
@given(any_image, st.sampled_from([np.flipud, np.fliplr, lambda p: p.swapaxes(0, 1)]))
def test_mirrored_and_turned(image: Pixels, turn: Callable[[Pixels], Pixels]) -> None:
    """All but the peak, which may be another one among several of equal energy."""
    signals, turned = asdict(image_signals(image)), asdict(image_signals(np.ascontiguousarray(turn(image))))
    for name in ("dark_share", "edge_density", "colour_entropy", "high_frequency"):
        assert turned[name] == pytest.approx(signals[name], abs=1e-9)


# -- the embedded world ---------------------------------------------------------------------------------------------


def world_images(count: int = 30) -> list[Pixels]:
    rng = np.random.default_rng(7)
    return [np.asarray((random_sign, random_scene)[i % 2](rng).image.convert("RGB")) for i in range(count)]


def striped(image: Pixels) -> Pixels:
    stripes = 40 * np.sin(2 * np.pi * np.arange(image.shape[1]) / 5)
    return np.clip(image + stripes[None, :, None], 0, 255).astype(np.uint8)


def blurred(image: Pixels) -> Pixels:
    """Four times the mean of three pixels along both axes."""
    soft = image.astype(float)
    for axis in (0, 1) * 4:
        soft = (np.roll(soft, 1, axis) + soft + np.roll(soft, -1, axis)) / 3
    return np.rint(soft).astype(np.uint8)


def darkened(image: Pixels) -> Pixels:
    return (image * 0.3).astype(np.uint8)


def flattened(image: Pixels) -> Pixels:
    """All colours drawn towards their mean."""
    mean = image.mean(axis=(0, 1))
    return np.rint(mean + 0.2 * (image - mean)).astype(np.uint8)


def noisy(image: Pixels) -> Pixels:
    return np.clip(image + np.random.default_rng(1).normal(0, 30, image.shape), 0, 255).astype(np.uint8)


@pytest.mark.parametrize(
    ("degrade", "signal", "direction"),
    [
        (striped, "stripe_peak", +1),
        (striped, "edge_density", +1),
        (blurred, "edge_density", -1),
        (blurred, "high_frequency", -1),
        (darkened, "dark_share", +1),
        (darkened, "colour_entropy", -1),
        (flattened, "colour_entropy", -1),
        (flattened, "edge_density", -1),
        (noisy, "high_frequency", +1),
        (noisy, "colour_entropy", +1),
    ],
)
def test_degraded_images_of_the_world(degrade: Callable[[Pixels], Pixels], signal: str, direction: int) -> None:
    """The mean moves clearly, and at least four images of five move that way or stay.

    Not all: on a plain ground, blur has no texture to remove and widens the few hard edges.
    """
    changes = [
        direction * (asdict(image_signals(degrade(image)))[signal] - asdict(image_signals(image))[signal])
        for image in world_images()
    ]
    assert np.mean(changes) > 0.05
    assert np.mean([change >= -1e-9 for change in changes]) >= 0.8


# -- groups ---------------------------------------------------------------------------------------------------------


def test_diversity_by_hand() -> None:
    """Black, white, black: distances 1, 0, 1; all pairs weigh alike."""
    black, white = np.zeros((40, 30, 3), np.uint8), np.full((40, 30, 3), 255, np.uint8)
    assert group_diversity([black, white]) == 1.0
    assert group_diversity([black, white, black]) == pytest.approx(2 / 3)
    half = white.copy()
    half[:20] = 0
    assert group_diversity([white, half]) == pytest.approx(math.sqrt(0.5))


def test_diversity_of_copies_and_of_too_few() -> None:
    image = world_images(1)[0]
    assert group_diversity([image] * 4) == 0.0
    assert group_diversity([image]) is None
    assert group_diversity([]) is None


def test_diversity_compares_the_coarse_image() -> None:
    """Fine grain hardly counts; another background does. The size changes nothing."""
    images = world_images(6)
    apart, grain = group_diversity(images), group_diversity([images[0], noisy(images[0])])
    assert apart is not None and grain is not None and grain < apart / 5
    assert group_diversity([larger(image, 3) for image in images]) == pytest.approx(apart, rel=1e-9)


def test_diversity_needs_one_size() -> None:
    with pytest.raises(ValueError, match="one size"):
        group_diversity([np.zeros((16, 16, 3), np.uint8), np.zeros((16, 17, 3), np.uint8)])


@settings(deadline=None)
@given(st.lists(hnp.arrays(np.uint8, (9, 12, 3)), min_size=2, max_size=4))
def test_diversity_range_and_order(images: list[Pixels]) -> None:
    diversity = group_diversity(images)
    assert diversity is not None and 0 <= diversity <= 1
    assert group_diversity(images[::-1]) == pytest.approx(diversity, abs=1e-12)


# -- rank disagreement ----------------------------------------------------------------------------------------------


def test_rank_disagreement_by_hand() -> None:
    """Rewards 3, 2, 2, 1 have five pairs: (0,1) is against, (0,2), (0,3) and (1,3) agree, (2,3) counts half."""
    assert rank_disagreement([3, 2, 2, 1], [4, 5, 1, 1]) == pytest.approx(1.5 / 5)


def test_rank_disagreement_limits() -> None:
    rewards = [0.1, 0.9, 0.5]
    assert rank_disagreement(rewards, [1.0, 3.0, 2.0]) == 0.0
    assert rank_disagreement(rewards, [3.0, 1.0, 2.0]) == 1.0
    assert rank_disagreement(rewards, [3.0, 3.0, 3.0]) == 0.5


def test_rank_disagreement_without_a_pair() -> None:
    assert rank_disagreement([], []) is None
    assert rank_disagreement([0.5], [3.0]) is None
    assert rank_disagreement([0.5, 0.5], [3.0, 4.0]) is None
    assert rank_disagreement([0.5, None, 0.7], [3.0, 4.0, math.nan]) is None


def test_rank_disagreement_leaves_out_what_is_missing() -> None:
    assert rank_disagreement([0.1, None, 0.9, 0.5], [1.0, 5.0, 3.0, None]) == 0.0
    with pytest.raises(ValueError):
        rank_disagreement([0.1, 0.2], [3.0])


@given(st.lists(st.tuples(st.integers(0, 5), st.integers(1, 5)), max_size=8))
def test_the_reverse_order_disagrees_where_the_order_agrees(pairs: list[tuple[int, int]]) -> None:
    rewards, judged = [float(r) for r, _ in pairs], [float(u) for _, u in pairs]
    share, reverse = rank_disagreement(rewards, judged), rank_disagreement(rewards, [-u for u in judged])
    if share is None:
        assert reverse is None
    else:
        assert 0 <= share <= 1
        assert reverse == pytest.approx(1 - share)
