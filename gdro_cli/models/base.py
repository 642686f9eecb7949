"""A model as the stages see it: a pipeline folder as a flow of noise, velocity and images.

A family of models subclasses ``FlowModel`` in a file of its own and adds a row to ``diffusers_flow.FAMILIES``.

Shapes: N images (or prompts), S latent tokens, C numbers per token (some families take maps [C, H, W] instead; nothing
outside them depends on it), L text tokens, D text width. ``sigma`` is in [0, 1], and 1 is pure noise; the 0..1000
timestep of the schedulers exists only inside the families.
"""

from __future__ import annotations

import abc
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from typing import Any, ClassVar, Literal

import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from gdro_cli.core.flow import as_float
from gdro_cli.errors import UserError
from gdro_cli.models.autoencoding import Autoencoding
from gdro_cli.models.backends import ComputeOptions, prepare_transformer
from gdro_cli.models.folder import PipelineFolder
from gdro_cli.models.initial_adapter import InitialAdapter
from gdro_cli.models.latents import seeded_noise
from gdro_cli.models.memory import MemoryOptions, OneAtATime, prepare_quantised, prepare_vae, quantization_config
from gdro_cli.models.scheduling import Scheduling

Conditioning = dict[str, Tensor]
"""The text encoders' output for ONE prompt, without a batch dimension; batched, each tensor has a leading N."""

GuidanceKind = Literal["embedded", "cfg", "none"]
"""What a guidance scale g does.

- ``embedded``: an input of the transformer; one pass, and training uses the same g as sampling.
- ``cfg``: classifier-free guidance in the sampler, v = v_uncond + g (v_cond - v_uncond), for g > 1; at g <= 1 one pass,
  without guidance. Training on stored groups uses the conditional velocity v_cond at any g; online methods train the
  velocity that they sample with.
- ``none``: nothing.
"""

ATTENTION_LAYERS = ("attn.to_q", "attn.to_k", "attn.to_v", "attn.to_out.0")
"""The linear layers of a block's attention, as diffusers names them; its own training scripts adapt them."""
JOINT_ATTENTION_LAYERS = (
    *ATTENTION_LAYERS, "attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj", "attn.to_add_out"
)  # fmt: skip
"""The same where text tokens have projections of their own."""

_ENCODE_BATCH = 8
"""Prompts per pass through the text encoders; they are cheap beside the transformer."""


class FlowModel(Autoencoding, Scheduling):
    """A pipeline folder seen as a flow: noise, velocity, images.

    A component is loaded at its first use: the transformer by ``velocity``, the text encoders by ``encode``, the
    autoencoder by ``decode`` or ``encode_images``. So training, which only calls ``velocity``, never loads the other
    two.

    Args:
        folder: the opened pipeline folder.
        device: where the components run.
        dtype: dtype of the frozen weights and of the transformer's inputs.
        max_sequence_length: text tokens per prompt; None takes the model's own.
        memory: how to save memory.
        compute: how the transformer is computed.
    """

    family: ClassVar[str]
    """Short name of the model family, e.g. ``"flux"``."""
    lora_targets: tuple[str, ...]
    """Names (suffixes) of the linear layers that diffusers' own training script for the family adapts."""
    longest_text: ClassVar[int] = 512
    """Text tokens per prompt unless the recipe sets them."""
    depth_keys: ClassVar[tuple[str, ...]] = ("num_layers",)
    """Keys of the transformer's configuration for the number of repeated blocks of each kind."""
    negative_prompt: ClassVar[str] = ""
    """The prompt of the unconditional pass."""
    pads_text: ClassVar[bool] = True
    """Whether the model sees padding as text, so that each conditioning has ``max_sequence_length`` tokens."""
    autocast: ClassVar[bool] = True
    """Whether the transformer may run under autocast, which also rounds what the model computes in float32."""
    pipeline_setup: ClassVar[str] = ""
    """Python that diffusers' pipeline ``pipe`` needs to draw the same image, of ``$height`` x ``$width`` pixels."""
    edits: ClassVar[bool] = False
    """Whether the model draws an edited version of a source image, which is part of each conditioning."""

    place_transformer: Callable[[nn.Module], nn.Module]
    """Moves the frozen transformer, just loaded, to its device; assign another one (FSDP) before its first use."""
    initial: InitialAdapter | None = None
    """A frozen adapter that belongs to the model; assign it before the transformer's first use."""

    def __init__(
        self,
        folder: PipelineFolder,
        *,
        device: torch.device,
        dtype: torch.dtype,
        max_sequence_length: int | None,
        memory: MemoryOptions | None = None,
        compute: ComputeOptions | None = None,
    ) -> None:
        self.folder = folder
        self.device = device
        self.dtype = dtype
        self.place_transformer = lambda module: module.to(device)
        self.memory = memory or MemoryOptions()
        self.compute = compute or ComputeOptions()
        self._max_sequence_length = max_sequence_length
        self._offload = OneAtATime(device)
        self._movable = True
        self._away = False
        """Whether the transformer has left the device until its next use."""
        self._transformer: nn.Module | None = None
        self._loaded: dict[str, Any] = {}
        self._unconditional: Conditioning | None = None
        self.transformer_config = folder.config("transformer")
        self.vae_config = folder.config("vae")
        self.vae_scale = self._vae_scale()

    def depths(self) -> dict[str, int]:
        """Kind of repeated block -> how many the transformer has."""
        return {key: int(self.transformer_config[key]) for key in self.depth_keys}

    def at_depths(self, depths: Mapping[str, int]) -> dict[str, Any]:
        """The transformer's configuration of a model with other ``depths``: the entries that change."""
        return dict(depths)

    # -- components ---------------------------------------------------------------------------------------------

    @property
    def transformer(self) -> nn.Module:
        """The network to train, frozen as loaded; assign the wrapped module (DDP, FSDP) to use it."""
        if self._transformer is None:
            self._transformer = self._load_network("transformer")
        if self._away:
            self._transformer.to(self.device)
            self._away = False
        if self.memory.offload and self._movable:
            self._offload.use("transformer", "transformer", self._transformer)
        return self._transformer

    @transformer.setter
    def transformer(self, module: nn.Module) -> None:
        self._offload.forget("transformer")  # the assigned module stays on its device
        self._transformer, self._movable = module, False

    @property
    def loaded_transformer(self) -> nn.Module | None:
        """The transformer, wherever it is at present; None before its first use."""
        return self._transformer

    @property
    def autocasts(self) -> bool:
        """Whether the transformer runs under autocast: on CUDA in bfloat16 if it may, in sampling as in training.

        So both round alike, and compiled blocks serve both.
        """
        return self.autocast and self.device.type == "cuda" and self.dtype == torch.bfloat16

    @property
    def identity(self) -> dict[str, str | dict[str, str]]:
        """Identity of the weights: that of the folder (``PipelineFolder.identity``), and ``adapter``, a digest."""
        return self.folder.identity | ({} if self.initial is None else {"adapter": self.initial.digest})

    def release_encoders(self) -> None:
        """Free the text encoders; the next ``encode`` loads them again."""
        self._release([name for name in self._loaded if name.startswith("text_encoder")])

    def release_decoder(self) -> None:
        """Free the autoencoder; its next use loads it again."""
        self._release(["vae"])

    def leave_device(self, *, whole: bool) -> None:
        """Make room for another program on the device: free the text encoders and the autoencoder.

        With ``whole``, which a sharded transformer forbids, the transformer also waits on the CPU. All return at their
        next use.
        """
        if self._transformer is not None and self._movable and whole and self.device.type != "cpu":
            self._offload.clear()
            self._transformer.to("cpu")
            self._away = True
        self.release_encoders()
        self.release_decoder()

    def _release(self, names: Sequence[str]) -> None:
        for name in names:
            self._loaded.pop(name, None)
            self._offload.forget(name)
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    def _component(self, name: str) -> Any:
        """A component without weights (tokenizer, scheduler), loaded once."""
        if name not in self._loaded:
            self._loaded[name] = self.folder.load(name)
        return self._loaded[name]

    def _network(self, name: str) -> Any:
        """A component with weights other than the transformer, loaded once."""
        if name not in self._loaded:
            self._loaded[name] = self._load_network(name)
        if self.memory.offload:
            self._offload.use("vae" if name == "vae" else "text", name, self._loaded[name])
        return self._loaded[name]

    def _load_network(self, name: str) -> nn.Module:
        quantized = None
        if name == "transformer":
            quantized = quantization_config(self.memory.quantization, dtype=self.dtype, device=self.device)
        # A first use inside inference mode must not create inference tensors, which autograd refuses for good.
        with torch.inference_mode(False):
            module: nn.Module = self.folder.load(name, dtype=self.dtype, quantization=quantized)
            module.eval().requires_grad_(False)
            if name == "vae":
                prepare_vae(module, self.memory)
            if name == "transformer":
                prepare_transformer(module, self.compute)
                prepare_quantised(module, self.dtype)
            if not self.memory.offload:
                module = self.place_transformer(module) if name == "transformer" else module.to(self.device)
            if name == "transformer" and self.initial is not None:
                self.initial.attach(module)
            return module

    # -- text ---------------------------------------------------------------------------------------------------

    @property
    def max_sequence_length(self) -> int:
        """Text tokens per prompt: as the recipe sets, or the family's own."""
        return self.longest_text if self._max_sequence_length is None else self._max_sequence_length

    def encode(self, prompts: Sequence[str], sources: Sequence[Image.Image] = ()) -> list[Conditioning]:
        """Encode prompts; the results are on the CPU and do not depend on the batch, up to rounding.

        If the family pads no text, each conditioning is as long as its prompt. With ``cfg`` guidance the negative
        prompt is also encoded, so that sampling need not load the encoders again for it.

        Args:
            prompts: the texts.
            sources: the image that each prompt edits, RGB and of the size of the images to draw, if the model edits.

        Raises:
            ValueError: there are fewer or more sources than the model needs.
        """
        if len(sources) != (len(prompts) if self.edits else 0):
            raise ValueError(f"{self.family}: {len(prompts)} prompts and {len(sources)} images to edit")
        conditionings = self._encode_all(prompts, sources)
        if self.guidance_kind == "cfg":
            self.unconditional()
        return conditionings

    def unconditional(self) -> Conditioning:
        """Return the encoded negative prompt, away from which ``cfg`` guidance leads; encoded once."""
        if self._unconditional is None:
            with torch.no_grad(), torch.inference_mode(False):
                self._unconditional = _on_cpu(self._encode_negative())[0]
        return self._unconditional

    def away(self, conditioning: Conditioning) -> Conditioning:
        """Return the conditioning of the unconditional pass beside a batched one: the negative prompt's, for each."""
        count = len(next(iter(conditioning.values())))
        one = self.batch_conditioning([self.unconditional()])
        return {name: value.expand(count, *value.shape[1:]) for name, value in one.items()}

    def _encode_negative(self) -> list[Conditioning]:
        """Encode the negative prompt, as any prompt unless overridden."""
        return self._encode([self.negative_prompt])

    def _encode_all(self, prompts: Sequence[str], sources: Sequence[Image.Image]) -> list[Conditioning]:
        batches = (slice(i, i + _ENCODE_BATCH) for i in range(0, len(prompts), _ENCODE_BATCH))
        with torch.no_grad(), torch.inference_mode(False):
            return [one for part in batches for one in _on_cpu(self._encode_with(list(prompts[part]), sources[part]))]

    def batch_conditioning(self, conditioning: Conditioning | Sequence[Conditioning]) -> Conditioning:
        """Return N conditionings, stacked unless they are already, on the model's device, floats in its dtype."""
        batch = conditioning if isinstance(conditioning, Mapping) else stack_conditioning(conditioning)
        return {key: v.to(self.device, self.dtype if v.is_floating_point() else v.dtype) for key, v in batch.items()}

    def conditioning_shapes(self, tokens: int) -> dict[str, tuple[int, ...]]:
        """Shapes of one prompt's conditioning of ``tokens`` text tokens: token embeddings unless overridden."""
        return {"prompt_embeds": (tokens, int(self.transformer_config["joint_attention_dim"]))}

    def sized_shapes(self, tokens: int, *, height: int, width: int) -> dict[str, tuple[int, ...]]:
        """Shapes of one prompt's whole conditioning: ``conditioning_shapes``, and what depends on the image size."""
        return self.conditioning_shapes(tokens)

    @abc.abstractmethod
    def _encode(self, prompts: list[str]) -> list[Conditioning]:
        """Encode a few prompts, one conditioning each."""

    def _encode_with(self, prompts: list[str], sources: Sequence[Image.Image]) -> list[Conditioning]:
        """Encode a few prompts, each with the image that it edits if the model edits."""
        return self._encode(prompts)

    # -- flow ---------------------------------------------------------------------------------------------------

    @property
    def guidance_kind(self) -> GuidanceKind:
        """What the guidance scale does: classifier-free guidance unless overridden."""
        return "cfg"

    def guided(self, conditional: Tensor, unconditional: Tensor, guidance: float) -> Tensor:
        """Combine the velocities [N, ...] of the two passes, in float32: v_uncond + g (v_cond - v_uncond)."""
        start = as_float(unconditional)
        return start + guidance * (as_float(conditional) - start)

    def pipeline_call(self, *, steps: int, guidance: float, height: int, width: int) -> dict[str, Any]:
        """Return the arguments, prompt aside, with which diffusers' pipeline draws the same image."""
        call = {"height": height, "width": width, "num_inference_steps": steps}
        return {**call, "max_sequence_length": self.max_sequence_length, **self._pipeline_guidance(guidance)}

    def _pipeline_guidance(self, guidance: float) -> dict[str, Any]:
        """The scale as the pipeline takes it."""
        return {} if self.guidance_kind == "none" else {"guidance_scale": guidance}

    def grid(self, *, height: int, width: int) -> tuple[int, int]:
        """Return the token grid (rows, columns) of an image.

        Raises:
            UserError: the size is not a multiple of a token's side.
        """
        side = self.vae_scale * self.patch
        if height <= 0 or width <= 0 or height % side or width % side:
            raise UserError(
                f"image size {height} x {width} does not fit this model: height and width must be multiples of {side}"
            )
        return height // side, width // side

    def latent_shape(self, *, height: int, width: int) -> tuple[int, ...]:
        """Shape of one image's latents as the transformer takes them: a map (C, H, W) unless overridden."""
        rows, columns = self.grid(height=height, width=width)
        return int(self.transformer_config["in_channels"]), rows * self.patch, columns * self.patch

    def noise(self, seeds: Sequence[int], *, height: int, width: int) -> Tensor:
        """Return starting noise [N, ...], float32, image i from ``seeds[i]`` alone, as the pipeline draws it."""
        return seeded_noise(seeds, self.latent_shape(height=height, width=width), device=self.device)

    def velocity(
        self,
        latents: Tensor,
        sigma: Tensor,
        conditioning: Conditioning | Sequence[Conditioning],
        *,
        guidance: float,
        height: int,
        width: int,
    ) -> Tensor:
        """Return the model's velocity [N, ...], in its dtype, at noisy ``latents`` [N, ...] and ``sigma`` [N].

        It takes one pass, so ``guidance`` has an effect only if it is ``embedded``.
        """
        text, grid = self.batch_conditioning(conditioning), self.grid(height=height, width=width)
        with torch.autocast(self.device.type, self.dtype) if self.autocasts else nullcontext():
            velocity: Tensor = self._velocity(latents.to(self.dtype), sigma, text, guidance, grid)
        return velocity

    @abc.abstractmethod
    def _velocity(self, x: Tensor, sigma: Tensor, text: Conditioning, guidance: float, grid: tuple[int, int]) -> Any:
        """The velocity [N, ...] of batched arguments, ``x`` in the model's dtype, on the token grid (rows, columns)."""


def _on_cpu(conditionings: list[Conditioning]) -> list[Conditioning]:
    return [{key: value.to("cpu", copy=True) for key, value in one.items()} for one in conditionings]


def takes_two_passes(model: FlowModel, guidance: float) -> bool:
    """Whether a sampling step at this guidance scale also needs the unconditional velocity."""
    return model.guidance_kind == "cfg" and guidance > 1.0


def stack_conditioning(conditionings: Sequence[Conditioning]) -> Conditioning:
    """Stack the conditionings of N prompts: the same keys, each tensor with a leading N.

    An entry whose first dimension differs between prompts is padded with zeros and gets a ``<key>_mask`` [N, L], bool,
    True for the prompt's own values.
    """
    batch: Conditioning = {}
    for key in conditionings[0]:
        tensors = [one[key] for one in conditionings]
        batch[key] = pad_sequence(tensors, batch_first=True)
        lengths = torch.tensor([len(tensor) for tensor in tensors])
        if (lengths != lengths[0]).any():
            batch[f"{key}_mask"] = torch.arange(int(lengths.max())) < lengths[:, None]
    return batch
