"""SANA (``SanaPipeline``).

Text: the last hidden states of Gemma 2 for the pipeline's instruction and the prompt in lower case; of the instruction,
only the first and the last token stay. As long as the prompt, so batches are masked. Latents: the deep-compression
autoencoder's map, one token per latent pixel. Guidance: classifier-free, away from the empty prompt without the
instruction. Training uses the conditional velocity. Schedule: Euler steps on a shifted schedule. The published pipeline
has a second-order solver (DPM-Solver++) with the same shift, which ``pipeline_setup`` replaces.
"""

from __future__ import annotations

import functools
import inspect
from typing import Any, ClassVar

import torch
from torch import Tensor

from gdro_cli.models.base import Conditioning, FlowModel
from gdro_cli.models.text import own_tokens, tokenize

_TRAIN_TIMESTEPS = 1000


class SanaFlow(FlowModel):
    """SANA as a ``FlowModel``; conditioning: ``prompt_embeds`` [L, D], L the prompt's own length."""

    family: ClassVar[str] = "sana"
    patch: ClassVar[int] = 1
    pads_text: ClassVar[bool] = False
    autocast: ClassVar[bool] = False  # the sums of linear attention are float32
    longest_text: ClassVar[int] = 300
    pipeline_setup: ClassVar[str] = (
        "from diffusers import FlowMatchEulerDiscreteScheduler\n\n"
        "pipe.scheduler = FlowMatchEulerDiscreteScheduler(shift=pipe.scheduler.config.flow_shift)"
    )
    lora_targets: tuple[str, ...] = ("to_q", "to_k", "to_v")

    @property
    def default_size(self) -> tuple[int, int]:
        """Native height and width of the model in pixels."""
        side = int(self.transformer_config["sample_size"]) * self.vae_scale
        return side, side

    def _vae_scale(self) -> int:
        return int(2 ** (len(self.vae_config["encoder_block_out_channels"]) - 1))

    def _component(self, name: str) -> Any:
        if name == "scheduler" and name not in self._loaded:
            from diffusers import FlowMatchEulerDiscreteScheduler

            config = self.folder.config(name, file="scheduler_config.json")
            self._loaded[name] = FlowMatchEulerDiscreteScheduler(shift=config["flow_shift"])
        return super()._component(name)

    def _unshifted(self, steps: int) -> None:
        return None

    @functools.cached_property
    def _instruction(self) -> str:
        from diffusers import SanaPipeline

        default = inspect.signature(SanaPipeline.__call__).parameters["complex_human_instruction"].default
        return "\n".join(default)

    def _encode(self, prompts: list[str]) -> list[Conditioning]:
        tokenizer = self._component("tokenizer")
        head = len(tokenizer.encode(self._instruction)) - 1
        texts = [self._instruction + prompt.lower().strip() for prompt in prompts]
        whole = self._states(texts, prompts, length=head + self.max_sequence_length - 1)
        return [{"prompt_embeds": torch.cat([one[:1], one[head:]])} for one in whole]

    def _encode_negative(self) -> list[Conditioning]:
        texts = [self.negative_prompt]
        return [{"prompt_embeds": one} for one in self._states(texts, texts, length=self.max_sequence_length)]

    def _states(self, texts: list[str], prompts: list[str], *, length: int) -> list[Tensor]:
        tokenizer = self._component("tokenizer")
        tokenizer.padding_side = "right"
        tokens = tokenize(tokenizer, texts, length=length, to_length=False, prompts=prompts).to(self.device)
        ids, mask = tokens.input_ids, tokens.attention_mask
        return own_tokens(self._network("text_encoder")(input_ids=ids, attention_mask=mask)[0], mask)

    def conditioning_shapes(self, tokens: int) -> dict[str, tuple[int, ...]]:
        """Gemma's token embeddings."""
        return {"prompt_embeds": (tokens, int(self.transformer_config["caption_channels"]))}

    def _pipeline_guidance(self, guidance: float) -> dict[str, Any]:
        # By default, the pipeline draws the nearest of its own sizes and crops it to the size that was asked for.
        return {**super()._pipeline_guidance(guidance), "use_resolution_binning": False}

    def _velocity(self, x: Tensor, sigma: Tensor, text: Conditioning, guidance: float, grid: tuple[int, int]) -> Any:
        return self.transformer(
            hidden_states=x,
            encoder_hidden_states=text["prompt_embeds"],
            encoder_attention_mask=text.get("prompt_embeds_mask"),
            timestep=sigma * _TRAIN_TIMESTEPS * self.transformer_config.get("timestep_scale", 1.0),
            return_dict=False,
        )[0]

    def _encode_pixels(self, vae: Any, pixels: Tensor) -> Tensor:
        latents: Tensor = vae.encode(pixels, return_dict=False)[0]  # no posterior: the autoencoder has one answer
        return latents.float() * self._scale_and_shift()[0]
