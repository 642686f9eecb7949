"""FLUX.2 dev (``Flux2Pipeline``), and what it shares with FLUX.2 klein.

Text: the hidden states after layers 10, 20 and 30 of Mistral Small 3, side by side, for the pipeline's system message
and the prompt as a chat turn, padding included (the transformer has no text mask and was trained with the padding).
Latents: the autoencoder's map, 2 x 2 pixels gathered into channels and normalised by the autoencoder's batch
statistics; one token per gathered pixel. Of the pipeline's processor of texts and images only the tokenizer is loaded,
as the rest needs torchvision. Guidance: an input of the transformer. Schedule: a shift that depends on image
size and number of steps.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor

from gdro_cli.models.autoencoding import posterior_mode
from gdro_cli.models.base import ATTENTION_LAYERS, Conditioning, GuidanceKind
from gdro_cli.models.families.packed_latents import PackedFlow
from gdro_cli.models.folder import PipelineFolder
from gdro_cli.models.latents import positions
from gdro_cli.models.text import split, warn_of_cuts

_STEPS = (10, 200)
"""Step counts at which the shift was fitted; elsewhere it is linear in the number of steps."""
_FITS = ((8.73809524e-05, 1.89833333), (0.00016927, 0.45666666))
"""Slope and intercept of the shift over the number of image tokens, at each of ``_STEPS``."""
_MANY_TOKENS = 4300
"""Above this many image tokens the shift is that of 200 steps at any number of steps."""


class Flux2Flow(PackedFlow):
    """FLUX.2 as a ``FlowModel``; conditioning: ``prompt_embeds`` [L, 3 D]."""

    family: ClassVar[str] = "flux2"
    packed: ClassVar[int] = 1  # the pipeline draws noise after gathering
    depth_keys: ClassVar[tuple[str, ...]] = ("num_layers", "num_single_layers")
    text_layers: ClassVar[tuple[int, int, int]] = (10, 20, 30)
    """Layers of the text encoder whose outputs are the text."""

    def __init__(self, folder: PipelineFolder, **options: Any) -> None:
        super().__init__(folder, **options)
        # The output layer of a single block needs its full name: its suffix also names the double blocks' list.
        singles = range(int(self.transformer_config["num_single_layers"]))
        outputs = (f"single_transformer_blocks.{i}.attn.to_out" for i in singles)
        self.lora_targets = (*ATTENTION_LAYERS, "attn.to_qkv_mlp_proj", *outputs)

    @property
    def guidance_kind(self) -> GuidanceKind:
        """``embedded`` unless the transformer lacks the input."""
        return "embedded" if self.transformer_config.get("guidance_embeds", True) else "none"

    def _tokens(self, prompts: list[str]) -> Any:
        """Token ids and attention mask [N, L] of prompts, padded to ``max_sequence_length``."""
        from diffusers.pipelines.flux2.pipeline_flux2 import format_input
        from diffusers.pipelines.flux2.system_messages import SYSTEM_MESSAGE

        tokenizer, length = self._component("tokenizer"), self.max_sequence_length
        chats = format_input(prompts, SYSTEM_MESSAGE)
        whole = tokenizer.apply_chat_template(chats, return_dict=True)["input_ids"]
        warn_of_cuts([len(ids) for ids in whole], prompts, length)
        options = {"padding": "max_length", "truncation": True, "max_length": length, "return_tensors": "pt"}
        return tokenizer.apply_chat_template(chats, return_dict=True, **options)

    def _encode(self, prompts: list[str]) -> list[Conditioning]:
        tokens = self._tokens(prompts)
        ids, mask = tokens["input_ids"].to(self.device), tokens["attention_mask"].to(self.device)
        encoder = self._network("text_encoder").base_model  # without the head: the logits are not needed
        states = encoder(input_ids=ids, attention_mask=mask, output_hidden_states=True, use_cache=False)
        return split({"prompt_embeds": torch.cat([states.hidden_states[layer] for layer in self.text_layers], dim=-1)})

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
            guidance=torch.full_like(sigma, guidance) if self.guidance_kind == "embedded" else None,
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
