"""The embedded model's autoencoder: a linear patch encoder from PCA and a small convolutional decoder.

A convolutional ``AutoencoderKL`` takes too long to train on two CPU cores; this one takes two minutes. It has the
interface that ``FluxPipeline`` needs of a VAE, so the pipeline folder names it like any other component.
"""

from __future__ import annotations

from typing import cast

import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.autoencoders.vae import DecoderOutput, DiagonalGaussianDistribution
from diffusers.models.modeling_outputs import AutoencoderKLOutput
from diffusers.models.modeling_utils import ModelMixin
from torch import Tensor, nn
from torch.nn import functional


class PatchAutoencoder(ModelMixin, ConfigMixin):  # type: ignore[misc]
    """Autoencoder on patches: pixels [N, 3, H, W] in [-1, 1] <-> latents [N, C, H/8, W/8].

    Args:
        patch: pixels per side of a patch; also the pipeline's VAE scale factor.
        latent_channels: C.
        hidden: channels of the decoder's residual network.
        scaling_factor: the pipeline multiplies latents by it; 1, because latents already have unit variance.
        shift_factor: the pipeline subtracts it; 0.
        sample_size: height and width of the training images in pixels.
        block_out_channels: FluxPipeline's scale factor is 2 ** (length - 1), so four entries for 8.
    """

    @register_to_config  # type: ignore[untyped-decorator]
    def __init__(
        self,
        patch: int = 8,
        latent_channels: int = 32,
        hidden: int = 96,
        scaling_factor: float = 1.0,
        shift_factor: float = 0.0,
        sample_size: int = 64,
        block_out_channels: tuple[int, ...] = (1, 1, 1, 1),
    ) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        pixels = 3 * patch * patch
        self.to_latent = nn.Linear(pixels, latent_channels)
        self.to_patch = nn.Linear(latent_channels, pixels)
        last = nn.Conv2d(hidden, pixels, 1)
        nn.init.zeros_(last.weight)  # training starts from the plain PCA decoder
        nn.init.zeros_(last.bias)  # type: ignore[arg-type]
        self.refine = nn.Sequential(
            nn.Conv2d(latent_channels, hidden, 3, padding=1),
            nn.SiLU(),
            nn.Conv2d(hidden, hidden, 3, padding=1),
            nn.SiLU(),
            last,
        )
        self.patch, self.latent_channels = patch, latent_channels

    def encode(self, x: Tensor, return_dict: bool = True) -> AutoencoderKLOutput | tuple[DiagonalGaussianDistribution]:
        """Encode pixels; the distribution is deterministic: its log-variance is at the lower clamp."""
        patches = functional.pixel_unshuffle(x, self.patch)
        mean = self.to_latent(patches.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
        posterior = DiagonalGaussianDistribution(torch.cat([mean, torch.full_like(mean, -30.0)], dim=1), True)
        return AutoencoderKLOutput(latent_dist=posterior) if return_dict else (posterior,)

    def decode(self, z: Tensor, return_dict: bool = True) -> DecoderOutput | tuple[Tensor]:
        """Decode latents [N, C, h, w] to pixels [N, 3, 8h, 8w]."""
        coarse = self.to_patch(z.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
        pixels = functional.pixel_shuffle(coarse + self.refine(z), self.patch)
        return DecoderOutput(sample=pixels) if return_dict else (pixels,)

    @torch.no_grad()
    def start_from_pca(self, pixels: Tensor) -> None:
        """Set encoder and linear decoder to the leading principal components of the patches of ``pixels``.

        Channel i is divided by the square root of its standard deviation: half whitening keeps strong channels more
        important for the model. Then all are divided by one factor, so that the latents' standard deviation is 1.
        """
        patches = functional.pixel_unshuffle(pixels, self.patch).permute(0, 2, 3, 1)
        rows = patches.reshape(-1, patches.shape[-1]).double()
        mean = rows.mean(0)
        values, vectors = torch.linalg.eigh(torch.cov((rows - mean).T))
        top = torch.arange(len(values) - 1, len(values) - 1 - self.latent_channels, -1)
        directions, spread = vectors[:, top], values[top].clamp_min(1e-12).sqrt()
        overall = spread.sqrt().square().mean().sqrt()  # std of channel i after division is sqrt(spread_i)
        scale = 1 / (spread.sqrt() * overall)
        encode = (directions * scale).T
        self.to_latent.weight.copy_(encode)
        self.to_latent.bias.copy_(-encode @ mean)
        self.to_patch.weight.copy_(directions / scale)
        self.to_patch.bias.copy_(mean)


def decode_pixels(autoencoder: PatchAutoencoder, latents: Tensor) -> Tensor:
    """Pixels [N, 3, H, W] of latents [N, C, h, w]."""
    return cast(DecoderOutput, autoencoder.decode(latents)).sample


def encode_mean(autoencoder: PatchAutoencoder, pixels: Tensor) -> Tensor:
    """Latents [N, C, h, w] of pixels [N, 3, H, W] in [-1, 1], without sampling."""
    output = cast(AutoencoderKLOutput, autoencoder.encode(pixels))
    return cast(Tensor, output.latent_dist.mode())
