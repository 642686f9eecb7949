"""FLUX.2 klein, distilled and base (``Flux2KleinPipeline``).

Text: the hidden states after layers 9, 18 and 27 of Qwen3, side by side, for the prompt as a chat turn, padding
included (the transformer has no text mask and was made with the padding). Latents: the autoencoder's map, 2 x 2 pixels
gathered into channels and normalised by the autoencoder's batch statistics; one token per gathered pixel. Guidance: the
distilled models have none; base has classifier-free guidance away from the empty prompt, and is trained on the
conditional velocity. Schedule: a shift that depends on image size and number of steps.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from gdro_cli.models.base import Conditioning, FlowModel, GuidanceKind
from gdro_cli.models.folder import PipelineFolder
from gdro_cli.models.latents import seeded_noise
from gdro_cli.models.text import chat, split, tokenize

_LAYERS = (9, 18, 27)
_STEPS = (10, 200)
"""Step counts at which the shift was fitted; in between and beyond it is linear in the number of steps."""
_FITS = ((8.73809524e-05, 1.89833333), (0.00016927, 0.45666666))
"""Slope and intercept of the shift over the number of image tokens, at each of ``_STEPS``."""
_MANY_TOKENS = 4300
"""Above so many image tokens the shift is that of 200 steps, whatever the number of steps."""


class Flux2KleinFlow(FlowModel):
    """FLUX.2 klein as a ``FlowModel``; conditioning: ``prompt_embeds`` [L, 3 D]."""

    family: ClassVar[str] = "flux2-klein"
    depth_keys: ClassVar[tuple[str, ...]] = ("num_layers", "num_single_layers")

    def __init__(self, folder: PipelineFolder, **options: Any) -> None:
        super().__init__(folder, **options)
        # The layers that diffusers' own training script adapts. The output layer of the single blocks needs its full
        # name, because its end also names the list that holds the double blocks'.
        singles = range(int(self.transformer_config["num_single_layers"]))
        self.lora_targets = (
            "attn.to_q",
            "attn.to_k",
            "attn.to_v",
            "attn.to_out.0",
            "attn.to_qkv_mlp_proj",
            *(f"single_transformer_blocks.{i}.attn.to_out" for i in singles),
        )

    @property
    def guidance_kind(self) -> GuidanceKind:
        """``none`` for a distilled model, else ``cfg``."""
        return "none" if self.folder.setting("is_distilled") else "cfg"

    def _encode(self, prompts: list[str]) -> list[Conditioning]:
        tokenizer = self._component("tokenizer")
        texts = chat(tokenizer, prompts, thinking=False)
        tokens = tokenize(tokenizer, texts, length=self.max_sequence_length, prompts=prompts).to(self.device)
        encoder = self._network("text_encoder").base_model  # without its head: the logits are not needed
        options = {"attention_mask": tokens.attention_mask, "output_hidden_states": True, "use_cache": False}
        states = encoder(input_ids=tokens.input_ids, **options).hidden_states
        return split({"prompt_embeds": torch.cat([states[layer] for layer in _LAYERS], dim=-1)})

    def _shift(self, config: Any, tokens: int, steps: int) -> float:
        few, many = (slope * tokens + intercept for slope, intercept in _FITS)
        if tokens > _MANY_TOKENS:
            return many
        return few + (many - few) * (steps - _STEPS[0]) / (_STEPS[1] - _STEPS[0])

    def latent_shape(self, *, height: int, width: int) -> tuple[int, ...]:
        """Return (S, C): one token per 2 x 2 latent pixels, C = 4 x latent channels."""
        rows, columns = self.grid(height=height, width=width)
        return rows * columns, int(self.transformer_config["in_channels"])

    def noise(self, seeds: Sequence[int], *, height: int, width: int) -> Tensor:
        """Return starting noise [N, S, C]; equal to what the pipeline draws in float32 for one image."""
        tokens, channels = self.latent_shape(height=height, width=width)
        return seeded_noise(seeds, (channels, tokens), device=self.device).transpose(1, 2).contiguous()

    def _velocity(self, x: Tensor, sigma: Tensor, text: Conditioning, guidance: float, grid: tuple[int, int]) -> Any:
        embeds = text["prompt_embeds"]
        return self.transformer(
            hidden_states=x,
            timestep=sigma,  # the transformer itself multiplies by 1000
            guidance=None,
            encoder_hidden_states=embeds,
            txt_ids=self._positions(1, 1, embeds.shape[1]),
            img_ids=self._positions(*grid, 1),
            return_dict=False,
        )[0]

    def _positions(self, rows: int, columns: int, words: int) -> Tensor:
        """Token positions [rows * columns * words, 4] (unused, row, column, word), cached."""
        key = (rows, columns, words)
        if key not in self._ids:
            with torch.inference_mode(False):
                axes = [torch.arange(size, device=self.device) for size in (1, rows, columns, words)]
                self._ids[key] = torch.stack(torch.meshgrid(*axes, indexing="ij"), dim=-1).flatten(0, 3)
        return self._ids[key]

    def _unpack(self, latents: Tensor, *, height: int, width: int) -> Tensor:
        rows, columns = self.grid(height=height, width=width)
        return latents.transpose(1, 2).reshape(len(latents), -1, rows, columns)

    def _decode(self, vae: Any, maps: Tensor) -> Tensor:
        statistics, epsilon = vae.bn, self.vae_config["batch_norm_eps"]
        deviation: Tensor = torch.sqrt(statistics.running_var + epsilon).to(maps)[:, None, None]
        gathered = maps * deviation + statistics.running_mean.to(maps)[:, None, None]
        spread = torch.pixel_shuffle(gathered, self.patch)
        pixels: Tensor = vae.decode(spread, return_dict=False)[0]
        return pixels
