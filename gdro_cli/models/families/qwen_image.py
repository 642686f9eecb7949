"""Qwen-Image (``QwenImagePipeline``).

Text: the last hidden states of Qwen2.5-VL for the prompt inside the pipeline's template, without the template's head;
as long as the prompt, so batches are masked. Latents: the autoencoder's map (of a one-frame video), 2 x 2 pixels packed
into one token. Guidance: classifier-free, away from a single space; each token's guided velocity is scaled to the norm
of its conditional one. Training uses the conditional velocity.
"""

from __future__ import annotations

import functools
from typing import Any, ClassVar

from torch import Tensor

from gdro_cli.core.flow import with_norms_of
from gdro_cli.models.autoencoding import posterior_mode
from gdro_cli.models.base import ATTENTION_LAYERS, Conditioning
from gdro_cli.models.families.packed_latents import PackedFlow
from gdro_cli.models.text import own_tokens, tokenize


class QwenImageFlow(PackedFlow):
    """Qwen-Image as a ``FlowModel``; conditioning: ``prompt_embeds`` [L, D], L the prompt's own length."""

    family: ClassVar[str] = "qwen-image"
    pads_text: ClassVar[bool] = False
    negative_prompt: ClassVar[str] = " "  # what the model's authors sample with
    lora_targets: tuple[str, ...] = ATTENTION_LAYERS
    images_seen: ClassVar[int] = 1
    """Images, all on one grid, whose tokens the transformer takes."""

    def _vae_scale(self) -> int:
        return int(2 ** len(self.vae_config["temperal_downsample"]))

    @functools.cached_property
    def _template(self) -> tuple[str, int]:
        """The pipeline's text around a prompt, and the number of its tokens before the prompt."""
        from diffusers import QwenImagePipeline

        pipeline: Any = QwenImagePipeline(None, None, None, None, None)
        return str(pipeline.prompt_template_encode), int(pipeline.prompt_template_encode_start_idx)

    def _encode(self, prompts: list[str]) -> list[Conditioning]:
        (template, head), tokenizer = self._template, self._component("tokenizer")
        texts, length = [template.format(prompt) for prompt in prompts], self.max_sequence_length + head
        tokens = tokenize(tokenizer, texts, length=length, to_length=False, prompts=prompts).to(self.device)
        encoder = self._network("text_encoder").base_model  # without the head: the logits are not needed
        ids, mask = tokens.input_ids, tokens.attention_mask
        states = encoder(input_ids=ids, attention_mask=mask, output_hidden_states=True).hidden_states[-1]
        return [{"prompt_embeds": one} for one in own_tokens(states, mask, skip=head)]

    def guided(self, conditional: Tensor, unconditional: Tensor, guidance: float) -> Tensor:
        """v_uncond + g (v_cond - v_uncond), each token scaled to the norm of its v_cond; in float32."""
        return with_norms_of(conditional, super().guided(conditional, unconditional, guidance))

    def _pipeline_guidance(self, guidance: float) -> dict[str, Any]:
        return {"true_cfg_scale": guidance, "negative_prompt": self.negative_prompt}

    def _velocity(self, x: Tensor, sigma: Tensor, text: Conditioning, guidance: float, grid: tuple[int, int]) -> Any:
        return self.transformer(
            hidden_states=x,
            timestep=sigma,  # the transformer itself multiplies by 1000
            encoder_hidden_states=text["prompt_embeds"],
            encoder_hidden_states_mask=text.get("prompt_embeds_mask"),
            img_shapes=[[(1, *grid)] * self.images_seen] * len(x),
            return_dict=False,
        )[0]

    def _decode(self, vae: Any, maps: Tensor) -> Tensor:
        mean, deviation = self._statistics(maps)
        pixels: Tensor = vae.decode((maps * deviation + mean)[:, :, None], return_dict=False)[0][:, :, 0]
        return pixels

    def _encode_pixels(self, vae: Any, pixels: Tensor) -> Tensor:
        maps = posterior_mode(vae, pixels[:, :, None])[:, :, 0]
        mean, deviation = self._statistics(maps)
        return (maps - mean) / deviation

    def _statistics(self, like: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation [C, 1, 1] of the autoencoder's channels."""
        mean, deviation = (like.new_tensor(self.vae_config[key]) for key in ("latents_mean", "latents_std"))
        return mean[:, None, None], deviation[:, None, None]
