"""Latents and images as tensors: seeded noise, patches packed into tokens, decoder output to images.

Shapes: N images, C channels, R x K tokens (rows x columns), p latent pixels per side of a token.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from PIL import Image
from torch import Tensor

NOT_FINITE = "the image is not finite"
"""Why an image is missing."""

_DECODE_PIXELS = 1 << 21
"""Pixels per pass through the autoencoder (two images of 1024 x 1024), which bounds its memory."""


def decoded_at_once(height: int, width: int) -> int:
    """Images per pass through the autoencoder."""
    return max(1, _DECODE_PIXELS // (height * width))


def seeded_noise(seeds: Sequence[int], shape: Sequence[int], *, device: torch.device) -> Tensor:
    """Draw standard normal noise [N, *shape] in float32, image i from a CPU generator of ``seeds[i]`` alone.

    A pipeline of diffusers in float32 draws the same for one image and ``torch.Generator().manual_seed(seed)``.
    """
    draws = [torch.randn(1, *shape, generator=torch.Generator().manual_seed(seed)) for seed in seeds]
    return torch.cat(draws).to(device)


def pack(maps: Tensor, *, patch: int) -> Tensor:
    """Turn maps [N, C, R * p, K * p] into tokens [N, R * K, C * p * p]; a token's numbers are ordered channel first."""
    count, channels, height, width = maps.shape
    rows, columns = height // patch, width // patch
    tokens = maps.view(count, channels, rows, patch, columns, patch).permute(0, 2, 4, 1, 3, 5)
    return tokens.reshape(count, rows * columns, channels * patch**2)


def unpack(tokens: Tensor, grid: tuple[int, int], *, patch: int) -> Tensor:
    """Undo ``pack``: turn tokens [N, R * K, C * p * p] on a grid (R, K) into maps [N, C, R * p, K * p]."""
    rows, columns = grid
    maps = tokens.view(len(tokens), rows, columns, -1, patch, patch).permute(0, 3, 1, 4, 2, 5)
    return maps.reshape(len(tokens), -1, rows * patch, columns * patch)


def positions(*sizes: int, device: torch.device) -> Tensor:
    """Positions [product of sizes, number of sizes] on a raster of these sizes, the last axis fastest."""
    return torch.cartesian_prod(*(torch.arange(size, device=device) for size in sizes))


def to_images(pixels: Tensor) -> list[Image.Image | None]:
    """Turn decoder output [N, 3, height, width] in [-1, 1] into images.

    An image with a number that is not finite is None: its pixels would not be the model's.
    """
    finite = pixels.isfinite().flatten(1).all(1).tolist()
    values = (pixels / 2 + 0.5).clamp(0, 1).float().permute(0, 2, 3, 1).cpu().numpy()
    return [
        Image.fromarray((one * 255).round().astype(np.uint8)) if whole else None
        for one, whole in zip(values, finite, strict=True)
    ]


def to_pixels(images: Sequence[Image.Image]) -> Tensor:
    """Undo ``to_images``: turn RGB images of one size into pixels [N, 3, height, width] in [-1, 1], float32.

    The numbers are those of diffusers' ``VaeImageProcessor.preprocess``.
    """
    levels = torch.from_numpy(np.stack([np.asarray(image, dtype=np.float32) for image in images]))
    return (levels / 255).permute(0, 3, 1, 2).contiguous() * 2 - 1


def complete(images: Sequence[Image.Image | None]) -> list[Image.Image]:
    """Return the images if none is None. Raises ValueError otherwise."""
    finite = [image for image in images if image is not None]
    if len(finite) < len(images):
        raise ValueError(NOT_FINITE)
    return finite
