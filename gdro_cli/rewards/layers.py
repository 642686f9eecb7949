"""What the embedded world's small networks share: their input, and the block that they are built of."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional


class ResidualBlock(nn.Module):
    """Two 3 x 3 convolutions with a residual connection."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm = nn.GroupNorm(8, channels)
        self.first = nn.Conv2d(channels, channels, 3, padding=1)
        self.second = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        """[N, C, h, w] -> the same shape."""
        hidden: Tensor = self.second(functional.silu(self.first(functional.silu(self.norm(x)))))
        return x + hidden


def to_pixels(images: Sequence[Image.Image]) -> Tensor:
    """RGB images of one size -> [N, 3, H, W] in [-1, 1]."""
    return scale_pixels(torch.from_numpy(np.stack([np.asarray(image) for image in images])))


def scale_pixels(pixels: Tensor) -> Tensor:
    """uint8 RGB [N, H, W, 3] -> [N, 3, H, W] in [-1, 1]."""
    return pixels.permute(0, 3, 1, 2).float() / 127.5 - 1
