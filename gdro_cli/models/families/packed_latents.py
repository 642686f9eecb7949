"""Families whose latents are packed into tokens before the transformer sees them: FLUX, Chroma and Qwen-Image."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

from torch import Tensor

from gdro_cli.models.base import FlowModel
from gdro_cli.models.latents import pack, seeded_noise, unpack


class PackedFlow(FlowModel):
    """A family whose tokens are packed outside the transformer: latents [S, C], one token per p x p latent pixels."""

    packed: ClassVar[int] = 2
    """Pixels of the noise map per side of a token: C = packed * packed times the map's channels."""

    def latent_shape(self, *, height: int, width: int) -> tuple[int, ...]:
        """Return (S, C)."""
        rows, columns = self.grid(height=height, width=width)
        return rows * columns, int(self.transformer_config["in_channels"])

    def noise(self, seeds: Sequence[int], *, height: int, width: int) -> Tensor:
        """Return starting noise [N, S, C], packed; equal to what the pipeline draws in float32 for one image."""
        rows, columns = self.grid(height=height, width=width)
        channels = int(self.transformer_config["in_channels"]) // self.packed**2
        maps = seeded_noise(seeds, (channels, rows * self.packed, columns * self.packed), device=self.device)
        return pack(maps, patch=self.packed)

    def _unpack(self, latents: Tensor, *, height: int, width: int) -> Tensor:
        return unpack(latents, self.grid(height=height, width=width), patch=self.packed)

    def _pack(self, maps: Tensor) -> Tensor:
        return pack(maps, patch=self.packed)
