"""Faults that spoil images of the embedded world, each at a severity from 0 (unchanged) to 1 (ruined).

The first six are drawing faults, which lower the embedded judge's coherence. The last four spoil what reward hacking
spoils first, background detail and natural colours; they lower its style.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

Pixels = NDArray[np.float32]
"""[64, 64, 3], 0 to 255."""
Mask = NDArray[np.bool_]
"""[64, 64], True in the sign or the shapes."""
Degradation = Callable[[Pixels, float, np.random.Generator, Mask], Pixels]


def stripes(pixels: Pixels, severity: float, rng: np.random.Generator, foreground: Mask) -> Pixels:
    """A wave of dark and light stripes over the whole image."""
    y, x = np.mgrid[0 : pixels.shape[0], 0 : pixels.shape[1]].astype(np.float32)
    angle, period = rng.uniform(0, np.pi), rng.uniform(3, 9)
    wave = np.sin(2 * np.pi * (np.cos(angle) * x + np.sin(angle) * y) / period + rng.uniform(0, 6.3))
    tint = 1 + rng.uniform(-0.3, 0.3, 3)
    return np.asarray(pixels + wave[..., None] * (severity * 90 * tint), np.float32)


def blur(pixels: Pixels, severity: float, rng: np.random.Generator, foreground: Mask) -> Pixels:
    """The whole image out of focus."""
    return np.asarray(ndimage.gaussian_filter(pixels, (3 * severity, 3 * severity, 0)), np.float32)


def noise(pixels: Pixels, severity: float, rng: np.random.Generator, foreground: Mask) -> Pixels:
    """Grain, coloured or grey."""
    channels = 3 if rng.random() < 0.5 else 1
    grain = rng.standard_normal((*pixels.shape[:2], channels), np.float32)
    return np.asarray(pixels + grain * np.float32(70 * severity), np.float32)


def smears(pixels: Pixels, severity: float, rng: np.random.Generator, foreground: Mask) -> Pixels:
    """Regions dragged along one direction, further with greater severity."""
    result = pixels.copy()
    axis = int(rng.integers(2))
    dragged = ndimage.uniform_filter1d(pixels, 1 + round(18 * severity), axis=axis, mode="nearest")
    for _ in range(3):
        mask = _rectangle(pixels.shape, 0.85, rng)
        result[mask] = dragged[mask]
    return result


def broken_edges(pixels: Pixels, severity: float, rng: np.random.Generator, foreground: Mask) -> Pixels:
    """Rows or columns shifted against each other, so that no edge is straight."""
    size, axis = pixels.shape[0], int(rng.integers(2))
    widths = rng.integers(1, 5, size)
    shifts = np.repeat(rng.normal(0, 4.5 * severity, size), widths)[:size]
    lines = pixels if axis == 0 else pixels.swapaxes(0, 1)
    whole = np.floor(shifts).astype(int)
    torn = np.stack(
        [
            (1 - (shift - low)) * np.roll(line, low, 0) + (shift - low) * np.roll(line, low + 1, 0)
            for line, shift, low in zip(lines, shifts, whole, strict=True)
        ]
    )
    return np.asarray(torn if axis == 0 else torn.swapaxes(0, 1), np.float32)


def missing_parts(pixels: Pixels, severity: float, rng: np.random.Generator, foreground: Mask) -> Pixels:
    """Pieces of the sign or the shapes cut out; ``severity`` is approximately the share that is missing."""
    result, gone = pixels.copy(), np.zeros(foreground.shape, bool)
    behind = pixels[~foreground] if (~foreground).any() else pixels.reshape(-1, 3)
    fill = behind.mean(axis=0)
    rows, columns = np.nonzero(foreground) if foreground.any() else np.nonzero(~gone)
    area = len(rows)
    while gone[rows, columns].sum() < round(0.9 * severity * area):
        pick = int(rng.integers(area))
        height, width = rng.integers(2, 6, 2)
        top, left = max(rows[pick] - height // 2, 0), max(columns[pick] - width // 2, 0)
        gone[top : top + height, left : left + width] = True
    result[gone] = fill + rng.normal(0, 8, (int(gone.sum()), 1))
    return result


def flattened(pixels: Pixels, severity: float, rng: np.random.Generator, foreground: Mask) -> Pixels:
    """The background's texture smoothed towards the mean colour of a wide neighbourhood."""
    plain = ndimage.uniform_filter(ndimage.median_filter(pixels, (5, 5, 1)), (15, 15, 1), mode="nearest")
    return np.where(foreground[..., None], pixels, pixels + severity * (plain - pixels)).astype(np.float32)


def faded(pixels: Pixels, severity: float, rng: np.random.Generator, foreground: Mask) -> Pixels:
    """Colours faded towards grey."""
    grey = pixels @ np.asarray((0.299, 0.587, 0.114), np.float32)
    return np.asarray(pixels + severity * 0.95 * (grey[..., None] - pixels), np.float32)


def darkened(pixels: Pixels, severity: float, rng: np.random.Generator, foreground: Mask) -> Pixels:
    """Brightness and contrast lost, towards black or towards one strong tint."""
    end = np.zeros(3, np.float32) if rng.random() < 0.5 else rng.uniform(120, 255, 3).astype(np.float32)
    return np.asarray(pixels + severity * 0.8 * (end - pixels), np.float32)


def glaring(pixels: Pixels, severity: float, rng: np.random.Generator, foreground: Mask) -> Pixels:
    """Unnatural colour and contrast: up to 3.5 times the colour, and then twice the contrast."""
    grey = (pixels @ np.asarray((0.299, 0.587, 0.114), np.float32))[..., None]
    vivid = grey + (1 + 2.5 * severity) * (pixels - grey)
    middle = pixels.mean(axis=(0, 1))
    return np.asarray(middle + (1 + severity) * (vivid - middle), np.float32)


def _rectangle(shape: tuple[int, ...], share: float, rng: np.random.Generator) -> NDArray[np.bool_]:
    height, width = (int(side * share * rng.uniform(0.7, 1)) for side in shape[:2])
    top, left = int(rng.integers(0, shape[0] - height + 1)), int(rng.integers(0, shape[1] - width + 1))
    mask = np.zeros(shape[:2], bool)
    mask[top : top + height, left : left + width] = True
    return mask


COHERENCE: dict[str, Degradation] = {
    "stripes": stripes,
    "blur": blur,
    "noise": noise,
    "smears": smears,
    "broken edges": broken_edges,
    "missing parts": missing_parts,
}
STYLE: dict[str, Degradation] = {
    "flattened": flattened,
    "faded": faded,
    "darkened": darkened,
    "glaring": glaring,
}
UNTEXTURED = frozenset({"plain"})
"""Backgrounds without texture, which cannot be flattened."""


def degrade(
    pixels: NDArray[np.uint8], name: str, severity: float, rng: np.random.Generator, *, foreground: Mask
) -> NDArray[np.uint8]:
    """An image [64, 64, 3] with one fault of ``COHERENCE`` or ``STYLE``; ``severity`` 0 changes nothing.

    Raises:
        KeyError: no fault has that name.
    """
    spoil = (COHERENCE | STYLE)[name]
    return np.clip(spoil(pixels.astype(np.float32), severity, rng, foreground) + 0.5, 0, 255).astype(np.uint8)
