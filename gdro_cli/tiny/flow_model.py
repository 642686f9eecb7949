"""The embedded flow model: real FLUX components of tiny size, with auxiliary heads for pretraining."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import torch
from diffusers import FlowMatchEulerDiscreteScheduler, FluxPipeline, FluxTransformer2DModel
from torch import Tensor, nn
from torch.nn import functional
from transformers import CLIPTextConfig, CLIPTextModel, T5Config, T5EncoderModel

from gdro_cli.tiny.autoencoder import PatchAutoencoder
from gdro_cli.tiny.pretraining_set import LETTERS_PER_TOKEN, NO_LABEL
from gdro_cli.tiny.tokenizers import CLIP_LENGTH, build_clip_tokenizer, build_t5_tokenizer
from gdro_cli.tiny.world import ALPHABET, COLOURS, GRID, MAX_LETTERS, MAX_LINES, SHAPES

WIDTH, TEXT_WIDTH, POOLED_WIDTH = 192, 128, 64
# Weights of the auxiliary losses: without them letters bind to the prompt an order of magnitude later.
PLACE_WEIGHT, LETTER_WEIGHT, THING_WEIGHT = 0.1, 0.05, 0.05
THING_TOKEN_WEIGHT = 3.0  # extra weight of the velocity error in tokens that hold a shape


class TinyFlux(nn.Module):
    """Transformer, both text encoders, and the auxiliary heads, which only pretraining needs.

    FLUX gives text tokens no positions, so T5 must write each letter's position into its token (``place_head``). The
    image tokens just before ``norm_out`` must know the letters, shapes and colours that they draw (the other heads).
    """

    transformer: Any
    t5: Any
    clip: Any
    text_ids: Tensor
    image_ids: Tensor

    def __init__(self) -> None:
        super().__init__()
        t5, clip = build_t5_tokenizer(), build_clip_tokenizer()
        self.transformer = FluxTransformer2DModel(
            in_channels=128,
            num_layers=2,
            num_single_layers=5,
            attention_head_dim=32,
            num_attention_heads=6,
            joint_attention_dim=TEXT_WIDTH,
            pooled_projection_dim=POOLED_WIDTH,
            guidance_embeds=False,
            axes_dims_rope=(8, 12, 12),
        )
        self.t5 = T5EncoderModel(
            T5Config(
                vocab_size=len(t5),
                d_model=TEXT_WIDTH,
                d_kv=16,
                d_ff=256,
                num_layers=3,
                num_heads=8,
                feed_forward_proj="gated-gelu",
                dropout_rate=0.0,
            )
        )
        self.clip = CLIPTextModel(
            CLIPTextConfig(
                vocab_size=len(clip),
                hidden_size=POOLED_WIDTH,
                intermediate_size=2 * POOLED_WIDTH,
                num_hidden_layers=1,
                num_attention_heads=4,
                max_position_embeddings=CLIP_LENGTH,
                projection_dim=POOLED_WIDTH,
                bos_token_id=clip.bos_token_id,
                eos_token_id=clip.eos_token_id,
                pad_token_id=clip.pad_token_id,
            )
        )
        self.place_head = nn.Linear(TEXT_WIDTH, MAX_LINES * MAX_LETTERS)
        self.letter_head = nn.Linear(WIDTH, LETTERS_PER_TOKEN * len(ALPHABET))
        self.thing_head = nn.Linear(WIDTH, len(SHAPES) + len(COLOURS))
        self._hidden: Tensor | None = None
        self.transformer.norm_out.register_forward_pre_hook(self._keep_hidden)
        text_ids, image_ids = torch.zeros(1, 3), torch.zeros(GRID, GRID, 3)
        image_ids[..., 1] += torch.arange(GRID)[:, None]
        image_ids[..., 2] += torch.arange(GRID)[None, :]
        self.register_buffer("text_ids", text_ids, persistent=False)
        self.register_buffer("image_ids", image_ids.reshape(-1, 3), persistent=False)

    def _keep_hidden(self, module: nn.Module, arguments: tuple[Tensor, ...]) -> None:
        self._hidden = arguments[0]

    def encode(self, t5_ids: Tensor, clip_ids: Tensor) -> tuple[Tensor, Tensor]:
        """Token ids [N, L] -> text tokens [N, L, D] and pooled vector [N, D'], as FluxPipeline computes them."""
        return self.t5(t5_ids)[0], self.clip(clip_ids).pooler_output

    def velocity(self, latents: Tensor, sigma: Tensor, text: Tensor, pooled: Tensor) -> Tensor:
        """Velocity [N, 16, 128] at sigma [N]."""
        output: Tensor = self.transformer(
            hidden_states=latents,
            encoder_hidden_states=text,
            pooled_projections=pooled,
            timestep=sigma,
            img_ids=self.image_ids,
            txt_ids=self.text_ids.expand(text.shape[1], 3),
            return_dict=False,
        )[0]
        return output

    def losses(self, batch: dict[str, Tensor], noise: Tensor, sigma: Tensor) -> dict[str, Tensor]:
        """Velocity MSE and the auxiliary cross-entropies of one batch; ``total`` is the training loss."""
        latents = batch["latents"].float()
        text, pooled = self.encode(batch["t5_ids"].long(), batch["clip_ids"].long())
        mix = sigma[:, None, None]
        predicted = self.velocity((1 - mix) * latents + mix * noise, sigma, text, pooled)
        letters = self.letter_head(self._hidden).unflatten(-1, (LETTERS_PER_TOKEN, len(ALPHABET)))
        shapes, colours = self.thing_head(self._hidden).split([len(SHAPES), len(COLOURS)], dim=-1)
        # A shape fills one of 16 tokens: without a weight its colour binds to the prompt very late.
        weight = 1 + THING_TOKEN_WEIGHT * (batch["shapes"] != NO_LABEL)
        parts = {
            "velocity": ((predicted - (noise - latents)).square().mean(-1) * weight).mean(),
            "place": _cross_entropy(self.place_head(text), batch["places"]),
            "letter": _cross_entropy(letters, batch["letters"]),
            "thing": _cross_entropy(shapes, batch["shapes"]) + _cross_entropy(colours, batch["colours"]),
        }
        total = parts["velocity"] + PLACE_WEIGHT * parts["place"] + LETTER_WEIGHT * parts["letter"]
        return {"total": total + THING_WEIGHT * parts["thing"], **parts}


def _cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """Mean over the labelled tokens; 0 if the batch has none."""
    labels = labels.long().flatten()
    total = functional.cross_entropy(logits.flatten(0, -2), labels, ignore_index=NO_LABEL, reduction="sum")
    return total / (labels != NO_LABEL).sum().clamp_min(1)


def build_pipeline(model: TinyFlux, autoencoder: PatchAutoencoder) -> Any:
    """A genuine FluxPipeline of the trained parts."""
    pipeline: Any = FluxPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(shift=1.0),
        vae=autoencoder,
        text_encoder=model.clip,
        tokenizer=build_clip_tokenizer(),
        text_encoder_2=model.t5,
        tokenizer_2=build_t5_tokenizer(),
        transformer=model.transformer,
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def save_pipeline(model: TinyFlux, autoencoder: PatchAutoencoder, folder: Path) -> None:
    """Write the pipeline folder in fp16 safetensors; the parts keep their dtype in memory."""
    half: Any = copy.deepcopy(autoencoder)
    build_pipeline(copy.deepcopy(model).half(), half.half()).save_pretrained(folder, safe_serialization=True)
    for path in folder.rglob("*.json"):
        content = json.loads(path.read_text())
        content.pop("_name_or_path", None)  # a path on the machine that made the parts
        if path.parent.name.startswith("text_encoder"):
            # transformers loads in the dtype named here, diffusers in float32: they must agree
            content["dtype"] = "float32"
        path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n")
