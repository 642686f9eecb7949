"""Train the embedded model's autoencoder: PCA first, then the decoder's residual network."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch.nn import functional

from gdro_cli.core.seeds import seed_for
from gdro_cli.rewards.layers import to_pixels
from gdro_cli.tiny.autoencoder import PatchAutoencoder, decode_pixels, encode_mean
from gdro_cli.tiny.pretraining_set import random_drawing

IMAGES = 4096
BATCH = 64
LATENT_NOISE = 0.03  # the flow model's latents are never exact, so the decoder learns to tolerate errors
LEARNING_RATE = 2e-3


def train_autoencoder(*, steps: int, seed: int, log: Callable[[dict[str, float]], None]) -> PatchAutoencoder:
    """Return an autoencoder trained on freshly drawn images; ``log`` receives {step, mse}."""
    rng = np.random.default_rng(seed_for(seed, "tiny-autoencoder"))
    pixels = to_pixels([random_drawing(rng, sign_share=0.5).image for _ in range(IMAGES)])
    torch.manual_seed(seed_for(seed, "tiny-autoencoder-weights"))
    autoencoder: PatchAutoencoder = PatchAutoencoder()
    autoencoder.start_from_pca(pixels)
    with torch.no_grad():
        latents = encode_mean(autoencoder, pixels)
    parameters = [*autoencoder.to_patch.parameters(), *autoencoder.refine.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=LEARNING_RATE, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for step in range(steps):
        pick = torch.from_numpy(rng.integers(0, IMAGES, BATCH))
        noisy = latents[pick] + LATENT_NOISE * torch.randn_like(latents[pick])
        difference = decode_pixels(autoencoder, noisy) - pixels[pick]
        loss = difference.abs().mean() + difference.square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        if step % 100 == 99:
            log({"step": step + 1, "mse": difference.square().mean().item()})
    autoencoder.eval()
    with torch.no_grad():
        error = functional.mse_loss(decode_pixels(autoencoder, latents[:512]), pixels[:512])
    log({"step": steps, "mse": error.item(), "latent_std": latents.std().item()})
    return autoencoder
