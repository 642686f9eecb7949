"""Stable Diffusion 3 and 3.5, medium and large (``StableDiffusion3Pipeline``).

Text: token embeddings of two CLIP encoders side by side, filled up with zeros to T5's width, then T5's; no text mask;
and both pooled embeddings. Without T5 (``text_encoder_3`` null) its part is zeros, as in the pipeline. Latents: the
autoencoder's map, which the transformer cuts into tokens itself. Guidance: classifier-free, away from the empty prompt.
Training uses the conditional velocity. Schedule: the scheduler's own spacing, then its shift.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn.functional import pad

from gdro_cli.errors import UserError
from gdro_cli.models.base import JOINT_ATTENTION_LAYERS, Conditioning, FlowModel
from gdro_cli.models.text import clip_ids, split, tokenize

_TRAIN_TIMESTEPS = 1000


class StableDiffusion3Flow(FlowModel):
    """SD3 as a ``FlowModel``; conditioning: ``prompt_embeds`` [L, D] and ``pooled_prompt_embeds`` [P]."""

    family: ClassVar[str] = "sd3"
    longest_text: ClassVar[int] = 256  # T5 tokens; the number of CLIP tokens comes from its tokenizer
    lora_targets: tuple[str, ...] = JOINT_ATTENTION_LAYERS

    def _encode(self, prompts: list[str]) -> list[Conditioning]:
        length = int(self._component("tokenizer").model_max_length)
        tokens, pooled = [], []
        for suffix in ("", "_2"):
            ids = clip_ids(self._component(f"tokenizer{suffix}"), prompts, length=length)
            states = self._network(f"text_encoder{suffix}")(ids.to(self.device), output_hidden_states=True)
            tokens.append(states.hidden_states[-2])
            pooled.append(states[0])
        clip, t5 = torch.cat(tokens, dim=-1), self._t5(prompts)
        clip = pad(clip, (0, t5.shape[-1] - clip.shape[-1]))
        return split({"prompt_embeds": torch.cat([clip, t5], dim=1), "pooled_prompt_embeds": torch.cat(pooled, dim=-1)})

    def _t5(self, prompts: list[str]) -> Tensor:
        """Token embeddings [N, L, D] of T5, or zeros if the pipeline has no T5."""
        length = self.max_sequence_length
        if "text_encoder_3" not in self.folder.components:
            width = int(self.transformer_config["joint_attention_dim"])
            return torch.zeros(len(prompts), length, width, dtype=self.dtype, device=self.device)
        ids = tokenize(self._component("tokenizer_3"), prompts, length=length).input_ids
        states: Tensor = self._network("text_encoder_3")(ids.to(self.device))[0]
        return states

    def depths(self) -> dict[str, int]:
        """Blocks with a second attention over the image (SD3.5 medium's first ones), and those without."""
        dual = len(self.transformer_config.get("dual_attention_layers") or ())
        return {"dual": dual, "plain": int(self.transformer_config["num_layers"]) - dual}

    def at_depths(self, depths: Mapping[str, int]) -> dict[str, Any]:
        """The dual blocks come first."""
        return {"num_layers": sum(depths.values()), "dual_attention_layers": list(range(depths["dual"]))}

    def conditioning_shapes(self, tokens: int) -> dict[str, tuple[int, ...]]:
        """CLIP's tokens, then T5's, and both pooled embeddings."""
        config = self.transformer_config
        clip = int(self.folder.config("tokenizer", file="tokenizer_config.json")["model_max_length"])
        return {
            "prompt_embeds": (clip + tokens, int(config["joint_attention_dim"])),
            "pooled_prompt_embeds": (int(config["pooled_projection_dim"]),),
        }

    def _unshifted(self, steps: int) -> None:
        return None

    def _shift(self, config: Any, tokens: int, steps: int) -> float:
        return super()._shift({"max_shift": 1.16, **config}, tokens, steps)

    def grid(self, *, height: int, width: int) -> tuple[int, int]:
        """Return the token grid (rows, columns) of an image.

        Raises:
            UserError: the size is not a multiple of a token's side, or larger than the position table.
        """
        rows, columns = super().grid(height=height, width=width)
        largest = int(self.transformer_config["pos_embed_max_size"])
        if max(rows, columns) > largest:
            side = largest * self.vae_scale * self.patch
            raise UserError(f"image size {height} x {width} is too large for this model: no side may exceed {side}")
        return rows, columns

    def _velocity(self, x: Tensor, sigma: Tensor, text: Conditioning, guidance: float, grid: tuple[int, int]) -> Any:
        return self.transformer(
            hidden_states=x,
            timestep=sigma * _TRAIN_TIMESTEPS,
            encoder_hidden_states=text["prompt_embeds"],
            pooled_projections=text["pooled_prompt_embeds"],
            return_dict=False,
        )[0]
