"""The image side of a model: clean latents to images, and images to clean latents.

Shapes as in ``models/base.py``: N images, latents [N, ...] as the transformer takes them, maps [N, C, H, W] as the
autoencoder does.
"""

from __future__ import annotations

import abc
from typing import Any, ClassVar

import torch
from PIL import Image
from torch import Tensor

from gdro_cli.models.latents import decoded_at_once, to_images


class Autoencoding(abc.ABC):
    """What a ``FlowModel`` does with its autoencoder, which is loaded at its first use."""

    patch: ClassVar[int] = 2
    """Latent pixels per side of one token."""
    device: torch.device
    dtype: torch.dtype
    vae_config: dict[str, Any]

    @abc.abstractmethod
    def _network(self, name: str) -> Any:
        """A component with weights, loaded once, on the device."""

    @abc.abstractmethod
    def grid(self, *, height: int, width: int) -> tuple[int, int]:
        """Return the token grid (rows, columns) of an image. Raises ``UserError`` if the size does not fit."""

    @property
    def default_size(self) -> tuple[int, int]:
        """Native height and width of the model in pixels, from the autoencoder's configuration or else 1024."""
        size = self.vae_config.get("sample_size") or 1024
        height, width = (size, size) if isinstance(size, int) else size
        return int(height), int(width)

    def _vae_scale(self) -> int:
        """Pixels per side of one latent pixel."""
        return int(2 ** (len(self.vae_config["block_out_channels"]) - 1))

    # -- latents to images --------------------------------------------------------------------------------------

    def decode(self, latents: Tensor, *, height: int, width: int) -> list[Image.Image | None]:
        """Decode clean latents [N, ...] into N RGB images, a few at a time; None for an image that is not finite."""
        vae, at_once = self._network("vae"), decoded_at_once(height, width)
        images: list[Image.Image | None] = []
        with torch.inference_mode():
            for start in range(0, len(latents), at_once):
                batch = latents[start : start + at_once].to(self.device, self.dtype)
                images += to_images(self.pixels(vae, batch, height=height, width=width))
        return images

    def pixels(self, vae: Any, latents: Tensor, *, height: int, width: int) -> Tensor:
        """Pixels [N, 3, height, width] in [-1, 1] of clean latents [N, ...] in the autoencoder's dtype."""
        return self._decode(vae, self._unpack(latents, height=height, width=width))

    def _unpack(self, latents: Tensor, *, height: int, width: int) -> Tensor:
        """Turn the transformer's latents into the autoencoder's maps [N, C, H, W], still scaled."""
        return latents

    def _decode(self, vae: Any, maps: Tensor) -> Tensor:
        """Pixels [N, 3, height, width] in [-1, 1] of scaled maps [N, C, H, W]."""
        scale, shift = self._scale_and_shift()
        pixels: Tensor = vae.decode(maps / scale + shift, return_dict=False)[0]
        return pixels

    def _scale_and_shift(self) -> tuple[float, float]:
        return self.vae_config["scaling_factor"], self.vae_config.get("shift_factor") or 0.0

    # -- images to latents --------------------------------------------------------------------------------------

    def encode_images(self, pixels: Tensor) -> Tensor:
        """Encode images into clean latents in the form in which ``sample_latents`` ends and that ``decode`` takes.

        The latents are the mode of the autoencoder's posterior. So they are the same in every run, and no noise of the
        autoencoder is between an image and what is learnt from it. Of diffusers' pipelines, the image-to-image ones
        draw a sample for the noise that they add anyway; the editing ones (FLUX.1 Kontext, Qwen-Image-Edit, FLUX.2)
        take the mode.

        Args:
            pixels: images [N, 3, height, width] in [-1, 1], on any device.

        Returns:
            Latents [N, ...], float32, on the model's device. The autoencoder works in the model's dtype, a few images
            at a time; scale, shift and statistics are applied in float32.

        Raises:
            UserError: the size does not fit the model.
        """
        height, width = pixels.shape[-2:]
        self.grid(height=height, width=width)
        vae = self._network("vae")
        with torch.no_grad(), torch.inference_mode(False):  # autograd refuses inference tensors for good
            batches = (part.to(self.device, self.dtype) for part in pixels.split(decoded_at_once(height, width)))
            return self._pack(torch.cat([self._encode_pixels(vae, batch) for batch in batches]))

    def _pack(self, maps: Tensor) -> Tensor:
        """Undo ``_unpack``."""
        return maps

    def _encode_pixels(self, vae: Any, pixels: Tensor) -> Tensor:
        """Undo ``_decode``: scaled maps [N, C, H, W], float32, of pixels in the autoencoder's dtype."""
        scale, shift = self._scale_and_shift()
        return (posterior_mode(vae, pixels) - shift) * scale


def posterior_mode(vae: Any, pixels: Tensor) -> Tensor:
    """Return the mode of the autoencoder's posterior, float32, before any scaling."""
    mode: Tensor = vae.encode(pixels, return_dict=False)[0].mode()
    return mode.float()
