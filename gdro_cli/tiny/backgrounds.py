"""The six textured backgrounds of the embedded world, drawn with NumPy.

Their random textures are details that a model loses first when it hacks a reward; that is why the world has them.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

SIZE = 64
Pixels = NDArray[np.float32]


def _smooth(noise: Pixels, *, width: int, axis: int) -> Pixels:
    """Moving average of ``width`` pixels along ``axis``, wrapping at the edge; variance restored to 1."""
    total = sum(np.roll(noise, shift, axis=axis) for shift in range(width))
    return np.asarray(total / np.sqrt(width), dtype=np.float32)


def _tinted(base: tuple[float, float, float], field: Pixels, strength: float) -> Pixels:
    return np.asarray(base, np.float32) + field[..., None] * np.float32(strength)


def _plain(rng: np.random.Generator) -> Pixels:
    start, end = rng.uniform(150, 250, (2, 3)).astype(np.float32)
    angle = rng.uniform(0, 2 * np.pi)
    y, x = np.mgrid[0:SIZE, 0:SIZE].astype(np.float32) / (SIZE - 1) - 0.5
    share = np.clip(0.5 + (np.cos(angle) * x + np.sin(angle) * y) / np.float32(1.42), 0, 1)[..., None]
    return np.asarray(start * (1 - share) + end * share, np.float32)


def _wooden(rng: np.random.Generator) -> Pixels:
    grain = _smooth(rng.standard_normal((SIZE, SIZE), np.float32), width=14, axis=1)
    board = np.empty((SIZE, 1), np.float32)
    seam = np.zeros((SIZE, 1), np.float32)
    row = -int(rng.integers(0, 12))
    while row < SIZE:
        height = int(rng.integers(10, 15))
        board[max(row, 0) : row + height] = rng.normal(0, 9)
        if row >= 0:
            seam[row] = -42
        row += height
    return _tinted((166, 116, 68), grain * 8 + board + seam, 1)


def _brick(rng: np.random.Generator) -> Pixels:
    pixels = np.full((SIZE, SIZE, 3), (196, 186, 174), np.float32)
    offset = int(rng.integers(0, 16))
    for course in range(SIZE // 8):
        shift = offset + 8 * (course % 2)
        for column in range(-1, SIZE // 16 + 2):
            left = column * 16 + shift - 16
            colour = np.asarray((158, 74, 58), np.float32) + np.float32(rng.normal(0, 13))
            pixels[course * 8 : course * 8 + 7, max(left, 0) : max(left + 15, 0)] = colour
    return pixels + rng.normal(0, 4, (SIZE, SIZE, 1)).astype(np.float32)


def _grassy(rng: np.random.Generator) -> Pixels:
    blades = _smooth(rng.standard_normal((SIZE, SIZE), np.float32), width=6, axis=0)
    shade = np.linspace(14, -14, SIZE, dtype=np.float32)[:, None]
    return _tinted((88, 148, 62), blades * 17 + shade, 1)


def _starry(rng: np.random.Generator) -> Pixels:
    night = np.linspace(0, rng.uniform(8, 30), SIZE, dtype=np.float32)[:, None, None]
    pixels = np.full((SIZE, SIZE, 3), (16, 18, 46), np.float32) + night
    for _ in range(int(rng.integers(26, 42))):
        y, x = rng.integers(1, SIZE - 1, 2)
        light = np.float32(rng.uniform(90, 225))
        pixels[y, x] += light
        if light > 160:  # bright stars get arms
            for dy, dx in ((0, 1), (0, -1), (1, 0), (-1, 0)):
                pixels[y + dy, x + dx] += light * np.float32(0.4)
    return pixels


def _sandy(rng: np.random.Generator) -> Pixels:
    y, x = np.mgrid[0:SIZE, 0:SIZE].astype(np.float32)
    bend = rng.uniform(2, 5) * np.sin(x / rng.uniform(8, 14) + rng.uniform(0, 6))
    dunes = np.sin((y + bend) / np.float32(rng.uniform(2.6, 4.2)) + np.float32(rng.uniform(0, 6)))
    grain = rng.standard_normal((SIZE, SIZE), np.float32)
    return _tinted((222, 194, 140), np.asarray(dunes, np.float32) * 11 + grain * 7, 1)


BACKGROUNDS: dict[str, Callable[[np.random.Generator], Pixels]] = {
    "plain": _plain,
    "wooden": _wooden,
    "brick": _brick,
    "grassy": _grassy,
    "starry": _starry,
    "sandy": _sandy,
}


def draw_background(name: str, rng: np.random.Generator) -> NDArray[np.uint8]:
    """Draw one background: uint8 pixels [64, 64, 3] with a fresh random texture.

    Raises:
        KeyError: no background has that name.
    """
    return np.clip(BACKGROUNDS[name](rng), 0, 255).astype(np.uint8)
