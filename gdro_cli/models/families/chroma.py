"""Chroma (``ChromaPipeline``): FLUX.1-schnell without modulation layers of its own in each block, trained with a mask.

Text: T5 token embeddings of the prompt, its end, and one token of padding; no pooled embedding. Batches are masked, as
in the model's original code. The pipeline of diffusers 0.42 passes the mask as numbers, which attention adds to its
scores, so it sees all of the padding; ``pipeline_setup`` makes it mask. Latents: the autoencoder's map, 2 x 2 pixels
packed into one token. Guidance: classifier-free, away from the empty prompt; no guidance input. Training uses the
conditional velocity.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor

from gdro_cli.models.base import Conditioning
from gdro_cli.models.families.flux import FluxFlow
from gdro_cli.models.families.packed_latents import PackedFlow
from gdro_cli.models.latents import positions
from gdro_cli.models.text import tokenize


class ChromaFlow(PackedFlow):
    """Chroma as a ``FlowModel``; conditioning: ``prompt_embeds`` [L, D], L the prompt's own length and one more."""

    family: ClassVar[str] = "chroma"
    depth_keys: ClassVar[tuple[str, ...]] = FluxFlow.depth_keys
    pads_text: ClassVar[bool] = False
    pipeline_setup: ClassVar[str] = (
        "pipe.transformer.register_forward_pre_hook(  # as trained: padding is masked\n"
        "    lambda _, args, inputs: (args, {**inputs, 'attention_mask': inputs['attention_mask'].bool()}),\n"
        "    with_kwargs=True,\n"
        ")"
    )
    lora_targets: tuple[str, ...] = FluxFlow.lora_targets  # diffusers has no script for Chroma; its blocks are FLUX.1's

    def _load_network(self, name: str) -> Any:
        module = super()._load_network(name)
        if name == "transformer":
            mask_checkpointed_blocks(module)
        return module

    def _encode(self, prompts: list[str]) -> list[Conditioning]:
        tokens = tokenize(self._component("tokenizer"), prompts, length=self.max_sequence_length).to(self.device)
        ids, mask = tokens.input_ids, tokens.attention_mask
        states = self._network("text_encoder")(input_ids=ids, attention_mask=mask)[0]
        return [{"prompt_embeds": one[: int(own.sum()) + 1]} for one, own in zip(states, mask, strict=True)]

    def _velocity(self, x: Tensor, sigma: Tensor, text: Conditioning, guidance: float, grid: tuple[int, int]) -> Any:
        embeds, mask = text["prompt_embeds"], text.get("prompt_embeds_mask")
        return self.transformer(
            hidden_states=x,
            timestep=sigma,  # the transformer itself multiplies by 1000
            encoder_hidden_states=embeds,
            txt_ids=torch.zeros(embeds.shape[1], 3, dtype=self.dtype, device=self.device),
            img_ids=positions(1, *grid, device=self.device).to(self.dtype),  # (unused, row, column)
            attention_mask=None if mask is None else torch.cat([mask, mask.new_ones(x.shape[:2])], dim=1),
            return_dict=False,
        )[0]


def mask_checkpointed_blocks(transformer: Any) -> None:
    """Make gradient checkpointing mask the single blocks as well.

    diffusers 0.42 passes the mask to the checkpointed double blocks, but not to the single ones that follow them.
    """
    enable = transformer.enable_gradient_checkpointing

    def enable_with_mask(gradient_checkpointing_func: Any = None) -> None:
        enable(gradient_checkpointing_func)
        checkpoint, last = transformer._gradient_checkpointing_func, [None]

        def checkpoint_with_mask(block: Any, *inputs: Any) -> Any:
            if len(inputs) == 3:  # a single block: states, modulation, positions
                inputs = (*inputs, last[0])
            last[0] = inputs[-1]
            return checkpoint(block, *inputs)

        transformer._gradient_checkpointing_func = checkpoint_with_mask

    transformer.enable_gradient_checkpointing = enable_with_mask
