"""FLUX.1 (dev, schnell, and anything else with the classes of ``FluxPipeline``).

Text: pooled CLIP embedding and T5 token embeddings, all tokens seen (FLUX has no text mask). Latents: the
autoencoder's map, 2 x 2 pixels packed into one token. Guidance: dev has it as an input (``guidance_embeds``), schnell
and the embedded model have none and ignore the value; there is no second, unconditional pass.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import Tensor

from gdro_cli.models.base import Conditioning
from gdro_cli.models.family import DiffusersFlow, seeded_noise

_LOG = logging.getLogger(__name__)

_MAX_TOKENS = 512
"""The most T5 tokens that FLUX was trained with."""


class FluxFlow(DiffusersFlow):
    """FLUX.1 as a ``FlowModel``; conditioning: ``prompt_embeds`` [L, D] and ``pooled_prompt_embeds`` [P]."""

    family: ClassVar[str] = "flux"
    patch: ClassVar[int] = 2
    fallback_size: ClassVar[int] = 1024
    # The layers that diffusers' own training script adapts.
    lora_targets: ClassVar[tuple[str, ...]] = (
        "attn.to_q",
        "attn.to_k",
        "attn.to_v",
        "attn.to_out.0",
        "attn.add_q_proj",
        "attn.add_k_proj",
        "attn.add_v_proj",
        "attn.to_add_out",
        "ff.net.0.proj",
        "ff.net.2",
        "ff_context.net.0.proj",
        "ff_context.net.2",
    )

    @property
    def max_sequence_length(self) -> int:
        """T5 tokens per prompt: as asked for, or the tokenizer's own length, at most 512."""
        if self._max_sequence_length is not None:
            return self._max_sequence_length
        return min(int(self._part("tokenizer_2").model_max_length), _MAX_TOKENS)

    def _encode(self, prompts: list[str]) -> Conditioning:
        clip_tokenizer, clip = self._part("tokenizer"), self._module("text_encoder")
        clip_ids = clip_tokenizer(
            prompts,
            padding="max_length",
            max_length=clip_tokenizer.model_max_length,
            truncation=True,
            return_tensors="pt",
        ).input_ids
        tokenizer, length = self._part("tokenizer_2"), self.max_sequence_length
        ids = tokenizer(
            prompts, padding="max_length", max_length=length, truncation=True, return_tensors="pt"
        ).input_ids
        for prompt, whole in zip(prompts, tokenizer(prompts).input_ids, strict=True):
            if len(whole) > length:
                _LOG.warning("prompt cut to %d of its %d text tokens: %s", length, len(whole), prompt)
        return {
            "prompt_embeds": self._module("text_encoder_2")(ids.to(self.device))[0],
            "pooled_prompt_embeds": clip(clip_ids.to(self.device)).pooler_output,
        }

    def latent_shape(self, *, height: int, width: int) -> tuple[int, ...]:
        """Return (S, C): one token per 2 x 2 latent pixels, C = 4 x latent channels."""
        rows, columns = self.grid(height=height, width=width)
        return rows * columns, int(self.transformer_config["in_channels"])

    def noise(self, seeds: Sequence[int], *, height: int, width: int) -> Tensor:
        """Return starting noise [N, S, C], packed; equal to what ``FluxPipeline`` draws in float32 for one image."""
        rows, columns = self.grid(height=height, width=width)
        channels = int(self.transformer_config["in_channels"]) // self.patch**2
        maps = seeded_noise(seeds, (channels, rows * self.patch, columns * self.patch), device=self.device)
        tokens = maps.view(len(seeds), channels, rows, self.patch, columns, self.patch).permute(0, 2, 4, 1, 3, 5)
        return tokens.reshape(len(seeds), rows * columns, channels * self.patch**2)

    def velocity(
        self,
        latents: Tensor,
        sigma: Tensor,
        conditioning: Conditioning | Sequence[Conditioning],
        *,
        guidance: float,
        height: int,
        width: int,
    ) -> Tensor:
        """Return the velocity [N, S, C]; ``guidance`` counts only where the model embeds it (FLUX.1-dev)."""
        text = self.batch_conditioning(conditioning)
        embeds = text["prompt_embeds"]
        scale = None
        if self.transformer_config.get("guidance_embeds"):
            scale = torch.full_like(sigma, guidance)
        velocity: Tensor = self.transformer(
            hidden_states=latents.to(self.dtype),
            timestep=sigma,  # the transformer itself multiplies by 1000
            guidance=scale,
            pooled_projections=text["pooled_prompt_embeds"],
            encoder_hidden_states=embeds,
            txt_ids=self._positions("text", embeds.shape[1], 1),
            img_ids=self._positions("image", *self.grid(height=height, width=width)),
            return_dict=False,
        )[0]
        return velocity

    def _positions(self, kind: str, rows: int, columns: int) -> Tensor:
        """Token positions [rows * columns, 3] (unused, row, column), cached; text tokens all stand at the origin."""
        key = (kind, rows, columns)
        if key not in self._ids:
            with torch.inference_mode(False):
                ids = torch.zeros(rows, columns, 3, dtype=self.dtype)
                if kind == "image":
                    ids[..., 1] = torch.arange(rows)[:, None]
                    ids[..., 2] = torch.arange(columns)[None, :]
                self._ids[key] = ids.reshape(rows * columns, 3).to(self.device)
        return self._ids[key]

    def _unpack(self, latents: Tensor, *, height: int, width: int) -> Tensor:
        rows, columns = self.grid(height=height, width=width)
        tokens = latents.view(len(latents), rows, columns, -1, self.patch, self.patch).permute(0, 3, 1, 4, 2, 5)
        return tokens.reshape(len(latents), -1, rows * self.patch, columns * self.patch)
