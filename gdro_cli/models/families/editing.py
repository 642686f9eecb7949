"""Families that edit an image: its tokens follow those of the drawn image, and the transformer sees both.

The source image has the size of the drawn one, so every conditioning of a job has source tokens of one shape, and the
two images share one grid. The source is encoded once, with the text, and is part of the conditioning. Of the
transformer's output only the tokens of the drawn image count.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from PIL import Image
from torch import Tensor

from gdro_cli.models.base import Conditioning
from gdro_cli.models.families.packed_latents import PackedFlow
from gdro_cli.models.latents import to_pixels

SOURCE = "source_latents"
NEGATIVE = "negative_"
"""Prefix of the names of what only the unconditional pass needs, where each prompt has its own."""


def trained_on(conditioning: Conditioning) -> Conditioning:
    """Return a conditioning without what only the unconditional pass needs, which training on stored groups lacks."""
    return {name: value for name, value in conditioning.items() if not name.startswith(NEGATIVE)}


class EditingFlow(PackedFlow):
    """What editing families add to the family that they come from, which is the next base class.

    Conditioning: that of the other family, and ``source_latents`` [S, C].
    """

    edits: ClassVar[bool] = True

    def sized_shapes(self, tokens: int, *, height: int, width: int) -> dict[str, tuple[int, ...]]:
        """The text, and the source image's tokens."""
        shapes = super().sized_shapes(tokens, height=height, width=width)
        return {**shapes, SOURCE: self.latent_shape(height=height, width=width)}

    def _encode_with(self, prompts: list[str], sources: Sequence[Image.Image]) -> list[Conditioning]:
        latents = self.encode_images(to_pixels(sources)).to(self.dtype)
        texts = self._encode_edits(prompts, sources)
        return [{**text, SOURCE: own} for text, own in zip(texts, latents, strict=True)]

    def _encode_edits(self, prompts: list[str], sources: Sequence[Image.Image]) -> list[Conditioning]:
        """Encode the texts; a family whose text encoder sees the images overrides it."""
        return self._encode(prompts)

    def _velocity(self, x: Tensor, sigma: Tensor, text: Conditioning, guidance: float, grid: tuple[int, int]) -> Any:
        both = torch.cat([x, text[SOURCE]], dim=1)
        return super()._velocity(both, sigma, text, guidance, grid)[:, : x.shape[1]]  # type: ignore[safe-super]
