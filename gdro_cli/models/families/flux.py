"""FLUX.1 (dev, schnell, and anything else with the classes of ``FluxPipeline``).

Text: pooled CLIP embedding and T5 token embeddings, padding included (FLUX has no text mask). Latents: the
autoencoder's map, 2 x 2 pixels packed into one token. Guidance: dev has it as an input (``guidance_embeds``); schnell
and the embedded model ignore the value. No model takes a second, unconditional pass.
"""

from __future__ import annotations

import functools
from typing import Any, ClassVar

import torch
from torch import Tensor

from gdro_cli.models.base import JOINT_ATTENTION_LAYERS, Conditioning, GuidanceKind
from gdro_cli.models.families.packed_latents import PackedFlow
from gdro_cli.models.latents import positions
from gdro_cli.models.text import clip_ids, split, tokenize


class FluxFlow(PackedFlow):
    """FLUX.1 as a ``FlowModel``; conditioning: ``prompt_embeds`` [L, D] and ``pooled_prompt_embeds`` [P]."""

    family: ClassVar[str] = "flux"
    depth_keys: ClassVar[tuple[str, ...]] = ("num_layers", "num_single_layers")
    longest_text: ClassVar[int] = 512  # the most T5 tokens that FLUX was trained with
    lora_targets: tuple[str, ...] = (
        *JOINT_ATTENTION_LAYERS, "ff.net.0.proj", "ff.net.2", "ff_context.net.0.proj", "ff_context.net.2"
    )  # fmt: skip

    @functools.cached_property
    def max_sequence_length(self) -> int:
        """T5 tokens per prompt: as the recipe sets, or the tokenizer's own length, at most 512."""
        if self._max_sequence_length is not None:
            return self._max_sequence_length
        tokenizer = self.folder.config("tokenizer_2", file="tokenizer_config.json")
        return min(int(tokenizer.get("model_max_length", self.longest_text)), self.longest_text)

    def conditioning_shapes(self, tokens: int) -> dict[str, tuple[int, ...]]:
        """T5 tokens and CLIP's pooled embedding."""
        config = self.transformer_config
        return {
            "prompt_embeds": (tokens, int(config["joint_attention_dim"])),
            "pooled_prompt_embeds": (int(config["pooled_projection_dim"]),),
        }

    @property
    def guidance_kind(self) -> GuidanceKind:
        """``embedded`` if the transformer has the input (dev), else ``none`` (schnell, the embedded model)."""
        return "embedded" if self.transformer_config.get("guidance_embeds") else "none"

    def _encode(self, prompts: list[str]) -> list[Conditioning]:
        tokenizer = self._component("tokenizer")
        ids = clip_ids(tokenizer, prompts, length=tokenizer.model_max_length)
        pooled = self._network("text_encoder")(ids.to(self.device)).pooler_output
        ids = tokenize(self._component("tokenizer_2"), prompts, length=self.max_sequence_length).input_ids
        embeds = self._network("text_encoder_2")(ids.to(self.device))[0]
        return split({"prompt_embeds": embeds, "pooled_prompt_embeds": pooled})

    def _velocity(self, x: Tensor, sigma: Tensor, text: Conditioning, guidance: float, grid: tuple[int, int]) -> Any:
        embeds = text["prompt_embeds"]
        return self.transformer(
            hidden_states=x,
            timestep=sigma,  # the transformer itself multiplies by 1000
            guidance=torch.full_like(sigma, guidance) if self.guidance_kind == "embedded" else None,
            pooled_projections=text["pooled_prompt_embeds"],
            encoder_hidden_states=embeds,
            txt_ids=torch.zeros(embeds.shape[1], 3, dtype=self.dtype, device=self.device),
            img_ids=self._image_positions(grid),
            return_dict=False,
        )[0]

    def _image_positions(self, grid: tuple[int, int]) -> Tensor:
        """Positions [S, 3] of the image tokens: (unused, row, column)."""
        return positions(1, *grid, device=self.device).to(self.dtype)
