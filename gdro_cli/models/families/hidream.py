"""HiDream-I1 Full, Dev and Fast (``HiDreamImagePipeline``): a transformer with a mixture of experts in each block.

Text: T5 token embeddings; the hidden states of Llama after each of its layers, one layer per block; the pooled
embeddings of two CLIP encoders. The model has no text mask, so padding is stored. Latents: the autoencoder's map. An
image that is not square is padded to the tokens of the largest size; the padding's keys are zeros, but attention sees
it, as in the model's original code. The model predicts x0 - eps, so the velocity is its negative. Guidance:
classifier-free, away from the empty prompt; Dev and Fast are distilled and published without (g = 1). Training uses the
conditional velocity. Schedule: Euler steps on the shifted schedule, in place of the published solvers (Full: UniPC; Dev
and Fast: one that draws new noise in each step). ``pipeline_setup`` replaces them, and lets the pipeline draw any size.

Each token goes to a shared expert and to the two that a gate chooses. diffusers 0.42 computes the latter two without a
gradient outside of its training mode, whose output has another form; here they have one (``mixed_experts``).
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MethodType
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn.functional import pad

from gdro_cli.errors import PrerequisiteError, UserError
from gdro_cli.models.base import Conditioning, FlowModel
from gdro_cli.models.folder import PipelineFolder
from gdro_cli.models.latents import pack, positions
from gdro_cli.models.text import clip_ids, split, tokenize

_TRAIN_TIMESTEPS = 1000
_LONGEST_CLIP = 218
"""Tokens that the pipeline gives to its CLIP encoders at most."""
_LLAMA = "meta-llama/Llama-3.1-8B-Instruct"


class HiDreamFlow(FlowModel):
    """HiDream-I1 as a ``FlowModel``.

    Conditioning: ``prompt_embeds_t5`` [L, D], ``prompt_embeds_llama3`` [layers, L, D] and ``pooled_prompt_embeds`` [P].

    Raises:
        PrerequisiteError: the folder lacks Llama, as the published ones do.
    """

    family: ClassVar[str] = "hidream"
    depth_keys: ClassVar[tuple[str, ...]] = ("num_layers", "num_single_layers")
    longest_text: ClassVar[int] = 128
    pipeline_setup: ClassVar[str] = (
        "from diffusers import FlowMatchEulerDiscreteScheduler\n\n"
        "old = pipe.scheduler.config\n"
        "shift = old.get('flow_shift', old.get('shift', 1.0))\n"
        "pipe.scheduler = FlowMatchEulerDiscreteScheduler.from_config(old, shift=shift)\n"
        "pipe.default_sample_size = 1.00001 * ($height * $width) ** 0.5 / pipe.vae_scale_factor  # or it scales"
    )
    lora_targets: tuple[str, ...] = ("attn1.to_q", "attn1.to_k", "attn1.to_v", "attn1.to_out")

    def __init__(self, folder: PipelineFolder, **options: Any) -> None:
        super().__init__(folder, **options)
        try:
            folder.component_class("text_encoder_4")
            folder.config("text_encoder_4")
        except PrerequisiteError as error:
            llama = f"LlamaForCausalLM.from_pretrained('{_LLAMA}', dtype='bfloat16')"
            raise PrerequisiteError(
                f"model {folder.path} has no text_encoder_4, since HiDream-I1 is published without its Llama: accept "
                f"the licence at https://huggingface.co/{_LLAMA}, save the pipeline with it once "
                f"(HiDreamImagePipeline.from_pretrained('{folder.path}', text_encoder_4={llama}, tokenizer_4="
                f"AutoTokenizer.from_pretrained('{_LLAMA}'), dtype=torch.bfloat16).save_pretrained(FOLDER)), and set "
                "model.path=FOLDER"
            ) from error

    def at_depths(self, depths: Mapping[str, int]) -> dict[str, Any]:
        """Each block has a layer of Llama; the last ones stay, so the number of stored layers is the same."""
        return {**depths, "llama_layers": self.transformer_config["llama_layers"][-sum(depths.values()) :]}

    def _load_network(self, name: str) -> Any:
        module = super()._load_network(name)
        if name == "transformer":
            mix_experts_with_gradient(module)
        return module

    # -- text ---------------------------------------------------------------------------------------------------

    @property
    def _llama_layers(self) -> int:
        """Layers of Llama whose hidden states are stored: the first ones, up to the last that a block takes."""
        return 1 + int(max(self.transformer_config["llama_layers"]))

    def _encode(self, prompts: list[str]) -> list[Conditioning]:
        pooled = []
        for suffix in ("", "_2"):
            tokenizer, length = self._component(f"tokenizer{suffix}"), min(self.max_sequence_length, _LONGEST_CLIP)
            ids = clip_ids(tokenizer, prompts, length=length).to(self.device)
            pooled.append(self._network(f"text_encoder{suffix}")(ids)[0])
        t5 = self._network("text_encoder_3")(**self._tokens("tokenizer_3", prompts))[0]
        tokenizer = self._component("tokenizer_4")
        tokenizer.pad_token = tokenizer.eos_token  # Llama has none
        llama = self._network("text_encoder_4").base_model  # without the head: the logits are not needed
        states = llama(**self._tokens("tokenizer_4", prompts), output_hidden_states=True).hidden_states
        return split(
            {
                "prompt_embeds_t5": t5,
                "prompt_embeds_llama3": torch.stack(states[1 : 1 + self._llama_layers], dim=1),  # 0: the embeddings
                "pooled_prompt_embeds": torch.cat(pooled, dim=-1),
            }
        )

    def _tokens(self, tokenizer: str, prompts: list[str]) -> dict[str, Tensor]:
        """Padded ids and their mask, [N, L] each."""
        component = self._component(tokenizer)
        length = min(self.max_sequence_length, component.model_max_length)
        tokens = tokenize(component, prompts, length=length).to(self.device)
        return {key: tokens[key] for key in ("input_ids", "attention_mask")}

    def conditioning_shapes(self, tokens: int) -> dict[str, tuple[int, ...]]:
        """T5's token embeddings, Llama's of each layer, and CLIP's pooled embeddings."""
        config = self.transformer_config
        t5, llama = config["caption_channels"]
        return {
            "prompt_embeds_t5": (tokens, int(t5)),
            "prompt_embeds_llama3": (self._llama_layers, tokens, int(llama)),
            "pooled_prompt_embeds": (int(config["text_emb_dim"]),),
        }

    # -- flow ---------------------------------------------------------------------------------------------------

    def _component(self, name: str) -> Any:
        if name == "scheduler" and name not in self._loaded:
            from diffusers import FlowMatchEulerDiscreteScheduler

            old = self.folder.config(name, file="scheduler_config.json")
            shift = old.get("flow_shift", old.get("shift", 1.0))
            self._loaded[name] = FlowMatchEulerDiscreteScheduler.from_config(old, shift=shift)
        return super()._component(name)

    def _unshifted(self, steps: int) -> None:
        return None

    def _shift(self, config: Any, tokens: int, steps: int) -> float:
        # The pipeline shifts every size as the largest one. The published schedules have a fixed shift.
        return super()._shift({}, self._most_tokens, steps)

    @property
    def _most_tokens(self) -> int:
        """Tokens of the largest image."""
        height, width = self.transformer_config["max_resolution"]
        return int(height * width) // self.patch**2

    def grid(self, *, height: int, width: int) -> tuple[int, int]:
        """Return the token grid (rows, columns) of an image.

        Raises:
            UserError: the size is not a multiple of a token's side, or the image has more pixels than the largest one.
        """
        rows, columns = super().grid(height=height, width=width)
        if rows * columns > self._most_tokens:
            most = self._most_tokens * (self.vae_scale * self.patch) ** 2
            raise UserError(
                f"image size {height} x {width} is too large for this model: an image may have {most} pixels"
            )
        return rows, columns

    def _velocity(self, x: Tensor, sigma: Tensor, text: Conditioning, guidance: float, grid: tuple[int, int]) -> Any:
        if x.is_meta:
            mix_experts_with_gradient(self.transformer)  # which was not loaded
        count, tokens = len(x), grid[0] * grid[1]
        padding = 0 if grid[0] == grid[1] else self._most_tokens - tokens
        places = pad(positions(1, *grid, device=self.device).float(), (0, 0, 0, padding))  # (unused, row, column)
        numbers = pack(x, patch=self.patch).unflatten(2, (-1, self.patch**2)).transpose(2, 3)  # channel last
        return -self.transformer(
            hidden_states=pad(numbers.flatten(2), (0, 0, 0, padding)),
            hidden_states_masks=pad(x.new_ones(count, tokens), (0, padding)),
            img_ids=places.expand(count, -1, -1),
            img_sizes=[grid] * count,
            timesteps=sigma * _TRAIN_TIMESTEPS,
            encoder_hidden_states_t5=text["prompt_embeds_t5"],
            encoder_hidden_states_llama3=text["prompt_embeds_llama3"].transpose(0, 1),
            pooled_embeds=text["pooled_prompt_embeds"],
            return_dict=False,
        )[0]


def mix_experts_with_gradient(transformer: Any) -> None:
    """Compute each mixture of experts of a transformer by ``mixed_experts``."""
    from diffusers.models.transformers.transformer_hidream_image import MOEFeedForwardSwiGLU

    for module in transformer.modules():
        if isinstance(module, MOEFeedForwardSwiGLU):
            module.forward = MethodType(mixed_experts, module)  # type: ignore[method-assign]


def mixed_experts(layer: Any, x: Tensor) -> Tensor:
    """The shared expert's answer and the weighted answers of the experts that the gate chooses for each token.

    The choice has no gradient; the weights have. Without numbers (meta device) all experts get as many tokens.

    Args:
        layer: diffusers' ``MOEFeedForwardSwiGLU``.
        x: tokens [N, S, D].

    Returns:
        [N, S, D].
    """
    chosen, weights, _ = layer.gate(x)  # [N S, experts per token] each
    tokens, chosen, weights = x.flatten(0, 1), chosen.flatten(), weights.flatten()
    order = chosen.argsort(stable=True)  # all of expert 0, then all of expert 1, ...
    if x.is_meta:
        shares = order.tensor_split(len(layer.experts))
    else:
        shares = order.split(chosen.bincount(minlength=len(layer.experts)).cpu().tolist())
    mixed = torch.zeros_like(tokens)
    for expert, share in zip(layer.experts, shares, strict=True):
        rows = share // layer.num_activated_experts
        answer = expert(tokens[rows]) * weights[share, None]
        mixed.index_add_(0, rows, answer.to(mixed.dtype))
    result: Tensor = mixed.view_as(x) + layer.shared_experts(x)
    return result
