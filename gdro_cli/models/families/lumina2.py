"""Lumina-Image 2.0 (``Lumina2Pipeline``).

Text: the second-to-last hidden states of Gemma 2 for the pipeline's system prompt and the prompt, which share the
number of tokens; as long as they are, so batches are masked. Latents: the autoencoder's map, which the transformer cuts
into tokens itself. Time: the transformer counts from noise to image, so it takes 1 - sigma; it predicts x0 - eps, so
the velocity is its negative. Guidance: classifier-free, away from the empty prompt without the system prompt; each row
of the guided velocity's map is scaled to the norm of its conditional one. Training uses the conditional velocity.
"""

from __future__ import annotations

import functools
from typing import Any, ClassVar

import torch
from torch import Tensor

from gdro_cli.core.flow import with_norms_of
from gdro_cli.errors import UserError
from gdro_cli.models.base import ATTENTION_LAYERS, Conditioning, FlowModel
from gdro_cli.models.folder import PipelineFolder
from gdro_cli.models.text import own_tokens, tokenize


class Lumina2Flow(FlowModel):
    """Lumina-Image 2.0 as a ``FlowModel``; conditioning: ``prompt_embeds`` [L, D], L the text's own length.

    Raises:
        UserError: more text tokens are asked for than the model has positions.
    """

    family: ClassVar[str] = "lumina2"
    depth_keys: ClassVar[tuple[str, ...]] = ("num_layers", "num_refiner_layers")
    pads_text: ClassVar[bool] = False
    longest_text: ClassVar[int] = 256
    lora_targets: tuple[str, ...] = ATTENTION_LAYERS

    def __init__(self, folder: PipelineFolder, **options: Any) -> None:
        super().__init__(folder, **options)
        most = int(self.transformer_config["axes_lens"][0]) - 1  # the image has the position after the last token
        if self.max_sequence_length > most:
            raise UserError(
                f"model.max_sequence_length is {self.max_sequence_length}, but this model has positions for {most} text"
                f" tokens: set it to {most} or less"
            )

    @functools.cached_property
    def _system_prompt(self) -> str:
        from diffusers import Lumina2Pipeline

        pipeline: Any = Lumina2Pipeline(None, None, None, None, None)
        return str(pipeline.system_prompt) + " <Prompt Start> "

    def _encode(self, prompts: list[str]) -> list[Conditioning]:
        return self._states([self._system_prompt + prompt for prompt in prompts], prompts)

    def _encode_negative(self) -> list[Conditioning]:
        return self._states([self.negative_prompt], [self.negative_prompt])

    def _states(self, texts: list[str], prompts: list[str]) -> list[Conditioning]:
        tokenizer, length = self._component("tokenizer"), self.max_sequence_length
        tokenizer.padding_side = "right"
        tokens = tokenize(tokenizer, texts, length=length, to_length=False, prompts=prompts).to(self.device)
        ids, mask = tokens.input_ids, tokens.attention_mask
        states = self._network("text_encoder")(input_ids=ids, attention_mask=mask, output_hidden_states=True)
        return [{"prompt_embeds": one} for one in own_tokens(states.hidden_states[-2], mask)]

    def conditioning_shapes(self, tokens: int) -> dict[str, tuple[int, ...]]:
        """Gemma's token embeddings."""
        return {"prompt_embeds": (tokens, int(self.transformer_config["cap_feat_dim"]))}

    def guided(self, conditional: Tensor, unconditional: Tensor, guidance: float) -> Tensor:
        """v_uncond + g (v_cond - v_uncond), each row of the map scaled to the norm of its v_cond; in float32."""
        return with_norms_of(conditional, super().guided(conditional, unconditional, guidance))

    def _shift(self, config: Any, tokens: int, steps: int) -> float:
        # The pipeline takes the number of channels for the number of tokens. The published schedule depends on neither.
        return super()._shift(config, int(self.transformer_config["in_channels"]), steps)

    def _velocity(self, x: Tensor, sigma: Tensor, text: Conditioning, guidance: float, grid: tuple[int, int]) -> Any:
        embeds, mask = text["prompt_embeds"], text.get("prompt_embeds_mask")
        if mask is None:
            mask = torch.ones(embeds.shape[:2], dtype=torch.bool, device=self.device)
        return -self.transformer(
            hidden_states=x,
            timestep=1.0 - sigma,
            encoder_hidden_states=embeds,
            encoder_attention_mask=mask.as_subclass(_MetaMask) if mask.is_meta else mask,
            return_dict=False,
        )[0]


class _MetaMask(Tensor):
    """A mask without numbers that hides nothing: the transformer asks for its sums, the texts' lengths."""

    def sum(self, dim: int) -> Tensor:  # type: ignore[override]
        return torch.full(self.shape[:dim], self.shape[dim])
