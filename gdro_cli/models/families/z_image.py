"""Z-Image and Z-Image-Turbo (``ZImagePipeline``).

Text: the second-to-last hidden states of Qwen3 for the prompt as a chat turn, as long as the prompt. Latents: the
autoencoder's map, which the transformer cuts into tokens itself. Time: the transformer counts from noise to image, so
it takes 1 - sigma; it predicts x0 - eps, so the velocity is its negative. Guidance: classifier-free, away from the
empty prompt. The scale is that of ``base.GuidanceKind``, which is the pipeline's ``guidance_scale`` + 1 (Turbo,
published with 0 there, has 1 here). Training uses the conditional velocity.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor

from gdro_cli.models.base import Conditioning, FlowModel
from gdro_cli.models.text import chat, own_tokens, tokenize


class ZImageFlow(FlowModel):
    """Z-Image as a ``FlowModel``; conditioning: ``prompt_embeds`` [L, D], L the prompt's own length."""

    family: ClassVar[str] = "z-image"
    depth_keys: ClassVar[tuple[str, ...]] = ("n_layers",)
    pads_text: ClassVar[bool] = False
    lora_targets: tuple[str, ...] = ("attention.to_q", "attention.to_k", "attention.to_v", "attention.to_out.0")

    def _encode(self, prompts: list[str]) -> list[Conditioning]:
        tokenizer = self._component("tokenizer")
        texts = chat(tokenizer, prompts, thinking=True)
        length = self.max_sequence_length
        tokens = tokenize(tokenizer, texts, length=length, to_length=False, prompts=prompts).to(self.device)
        ids, mask = tokens.input_ids, tokens.attention_mask
        states = self._network("text_encoder")(input_ids=ids, attention_mask=mask, output_hidden_states=True)
        return [{"prompt_embeds": one} for one in own_tokens(states.hidden_states[-2], mask)]

    def conditioning_shapes(self, tokens: int) -> dict[str, tuple[int, ...]]:
        """Qwen3's token embeddings."""
        return {"prompt_embeds": (tokens, int(self.transformer_config["cap_feat_dim"]))}

    def _pipeline_guidance(self, guidance: float) -> dict[str, Any]:
        return {"guidance_scale": max(0.0, guidance - 1.0)}

    def _velocity(self, x: Tensor, sigma: Tensor, text: Conditioning, guidance: float, grid: tuple[int, int]) -> Any:
        embeds, mask = text["prompt_embeds"], text.get("prompt_embeds_mask")
        captions = list(embeds) if mask is None else [one[own] for one, own in zip(embeds, mask, strict=True)]
        frames = list(x[:, :, None])  # one frame each
        slopes = self.transformer(frames, 1.0 - sigma, captions, return_dict=False)[0]
        return -torch.stack(slopes)[:, :, 0]
