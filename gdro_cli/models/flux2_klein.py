"""FLUX.2 klein, distilled and base (``Flux2KleinPipeline``).

Text: the hidden states after layers 9, 18 and 27 of Qwen3, side by side, for the prompt as a chat turn, padding
included (the transformer has no text mask and was trained with the padding). Latents: the autoencoder's map, 2 x 2
pixels gathered into channels and normalised by the autoencoder's batch statistics; one token per gathered pixel.
Guidance: the distilled models have none; base has classifier-free guidance away from the empty prompt, and trains on
the conditional velocity. Schedule: a shift that depends on image size and number of steps.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor

from gdro_cli.models.autoencoding import posterior_mode
from gdro_cli.models.base import ATTENTION_LAYERS, Conditioning, GuidanceKind
from gdro_cli.models.folder import PipelineFolder
from gdro_cli.models.latents import positions
from gdro_cli.models.packed_latents import PackedFlow
from gdro_cli.models.text import chat, split, tokenize

_LAYERS = (9, 18, 27)
_STEPS = (10, 200)
"""Step counts at which the shift was fitted; elsewhere it is linear in the number of steps."""
_FITS = ((8.73809524e-05, 1.89833333), (0.00016927, 0.45666666))
"""Slope and intercept of the shift over the number of image tokens, at each of ``_STEPS``."""
_MANY_TOKENS = 4300
"""Above this many image tokens the shift is that of 200 steps at any number of steps."""


class Flux2KleinFlow(PackedFlow):
    """FLUX.2 klein as a ``FlowModel``; conditioning: ``prompt_embeds`` [L, 3 D]."""

    family: ClassVar[str] = "flux2-klein"
    packed: ClassVar[int] = 1  # the pipeline draws noise after gathering
    depth_keys: ClassVar[tuple[str, ...]] = ("num_layers", "num_single_layers")

    def __init__(self, folder: PipelineFolder, **options: Any) -> None:
        super().__init__(folder, **options)
        # The output layer of a single block needs its full name: its suffix also names the double blocks' list.
        singles = range(int(self.transformer_config["num_single_layers"]))
        outputs = (f"single_transformer_blocks.{i}.attn.to_out" for i in singles)
        self.lora_targets = (*ATTENTION_LAYERS, "attn.to_qkv_mlp_proj", *outputs)

    @property
    def guidance_kind(self) -> GuidanceKind:
        """``none`` for a distilled model, else ``cfg``."""
        return "none" if self.folder.setting("is_distilled") else "cfg"

    def _encode(self, prompts: list[str]) -> list[Conditioning]:
        tokenizer = self._component("tokenizer")
        texts = chat(tokenizer, prompts, thinking=False)
        tokens = tokenize(tokenizer, texts, length=self.max_sequence_length, prompts=prompts).to(self.device)
        encoder = self._network("text_encoder").base_model  # without the head: the logits are not needed
        ids, mask = tokens.input_ids, tokens.attention_mask
        states = encoder(input_ids=ids, attention_mask=mask, output_hidden_states=True, use_cache=False)
        return split({"prompt_embeds": torch.cat([states.hidden_states[layer] for layer in _LAYERS], dim=-1)})

    def _shift(self, config: Any, tokens: int, steps: int) -> float:
        few, many = (slope * tokens + intercept for slope, intercept in _FITS)
        if tokens > _MANY_TOKENS:
            return many
        return few + (many - few) * (steps - _STEPS[0]) / (_STEPS[1] - _STEPS[0])

    def _velocity(self, x: Tensor, sigma: Tensor, text: Conditioning, guidance: float, grid: tuple[int, int]) -> Any:
        embeds = text["prompt_embeds"]
        return self.transformer(
            hidden_states=x,
            timestep=sigma,  # the transformer itself multiplies by 1000
            guidance=None,
            encoder_hidden_states=embeds,
            txt_ids=positions(1, 1, 1, embeds.shape[1], device=self.device),  # (unused, row, column, word)
            img_ids=positions(1, *grid, 1, device=self.device),
            return_dict=False,
        )[0]

    def _decode(self, vae: Any, maps: Tensor) -> Tensor:
        mean, deviation = self._statistics(vae, maps)
        gathered = maps * deviation + mean
        pixels: Tensor = vae.decode(torch.pixel_shuffle(gathered, self.patch), return_dict=False)[0]
        return pixels

    def _encode_pixels(self, vae: Any, pixels: Tensor) -> Tensor:
        gathered = torch.pixel_unshuffle(posterior_mode(vae, pixels), self.patch)
        mean, deviation = self._statistics(vae, gathered)
        return (gathered - mean) / deviation

    def _statistics(self, vae: Any, like: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation [C, 1, 1] of the gathered channels."""
        deviation: Tensor = torch.sqrt(vae.bn.running_var + self.vae_config["batch_norm_eps"])
        return vae.bn.running_mean.to(like)[:, None, None], deviation.to(like)[:, None, None]
