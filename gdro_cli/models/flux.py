"""FLUX.1 (dev, schnell, and anything else with the classes of ``FluxPipeline``).

Text: pooled CLIP embedding and T5 token embeddings, all tokens seen (FLUX has no text mask). Latents: the
autoencoder's map, 2 x 2 pixels packed into one token. Guidance: dev has it as an input (``guidance_embeds``), schnell
and the embedded model have none and ignore the value. No model takes a second, unconditional pass.
"""

from __future__ import annotations

import functools
from typing import Any, ClassVar

import torch
from torch import Tensor

from gdro_cli.models.base import Conditioning, GuidanceKind
from gdro_cli.models.packed_latents import PackedFlow
from gdro_cli.models.text import split, tokenize


class FluxFlow(PackedFlow):
    """FLUX.1 as a ``FlowModel``; conditioning: ``prompt_embeds`` [L, D] and ``pooled_prompt_embeds`` [P]."""

    family: ClassVar[str] = "flux"
    depth_keys: ClassVar[tuple[str, ...]] = ("num_layers", "num_single_layers")
    longest_text: ClassVar[int] = 512  # the most T5 tokens that FLUX was trained with
    # The layers that diffusers' own training script adapts.
    lora_targets: tuple[str, ...] = (
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
        """T5 tokens per prompt: as the recipe says, or the tokenizer's own length, at most 512."""
        if self._max_sequence_length is not None:
            return self._max_sequence_length
        return self._own_length

    @functools.cached_property
    def _own_length(self) -> int:
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
        """``embedded`` where the transformer has the input (dev), else ``none`` (schnell, the embedded model)."""
        return "embedded" if self.transformer_config.get("guidance_embeds") else "none"

    def _encode(self, prompts: list[str]) -> list[Conditioning]:
        clip_tokenizer, clip = self._component("tokenizer"), self._network("text_encoder")
        clip_ids = clip_tokenizer(
            prompts,
            padding="max_length",
            max_length=clip_tokenizer.model_max_length,
            truncation=True,
            return_tensors="pt",
        ).input_ids
        ids = tokenize(self._component("tokenizer_2"), prompts, length=self.max_sequence_length).input_ids
        return split(
            {
                "prompt_embeds": self._network("text_encoder_2")(ids.to(self.device))[0],
                "pooled_prompt_embeds": clip(clip_ids.to(self.device)).pooler_output,
            }
        )

    def _velocity(self, x: Tensor, sigma: Tensor, text: Conditioning, guidance: float, grid: tuple[int, int]) -> Any:
        embeds = text["prompt_embeds"]
        scale = None
        if self.transformer_config.get("guidance_embeds"):
            scale = torch.full_like(sigma, guidance)
        return self.transformer(
            hidden_states=x,
            timestep=sigma,  # the transformer itself multiplies by 1000
            guidance=scale,
            pooled_projections=text["pooled_prompt_embeds"],
            encoder_hidden_states=embeds,
            txt_ids=self._positions("text", embeds.shape[1], 1),
            img_ids=self._positions("image", *grid),
            return_dict=False,
        )[0]

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
