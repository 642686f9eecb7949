"""The interface that the stages see: a text-to-image model trained with rectified flow.

Shapes: N images (or prompts), S latent tokens, C numbers per token (some families take maps [C, H, W] in their place;
nothing outside them minds), L text tokens, D text width. ``sigma`` is in
[0, 1] and 1 is pure noise; the 0..1000 timestep of the schedulers exists only inside the families.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, Protocol

import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

Conditioning = dict[str, Tensor]
"""What the text encoders make of ONE prompt, without a batch dimension; batched, each tensor gains a leading N."""

GuidanceKind = Literal["embedded", "cfg", "none"]
"""What a guidance scale g does.

- ``embedded``: an input of the transformer; one pass, and training uses the same g as sampling.
- ``cfg``: classifier-free guidance in the sampler, v = v_uncond + g (v_cond - v_uncond), for g > 1; at g <= 1 there is
  one pass, without guidance. Training on stored groups uses the conditional velocity v_cond, whatever g is; online
  methods train the velocity that they sample with.
- ``none``: nothing.
"""


class FlowModel(Protocol):
    """A pipeline folder seen as a flow: noise, velocity, pictures.

    Components are loaded when they are first used: the transformer by ``velocity``, the text encoders by ``encode``,
    the autoencoder by ``decode``. So training, which only calls ``velocity``, never loads the other two.
    """

    transformer: nn.Module
    """The network that is trained; assign the wrapped module (DDP, FSDP, compiled) here to use it."""

    place_transformer: Callable[[nn.Module], nn.Module]
    """Brings the frozen transformer, just loaded, to where it runs; assign another one (FSDP) before its first use."""

    @property
    def family(self) -> str:
        """Short name of the model family, e.g. ``"flux"``."""

    @property
    def device(self) -> torch.device:
        """Where the components run."""

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the frozen weights and of the transformer's inputs."""

    @property
    def default_size(self) -> tuple[int, int]:
        """Height and width, in pixels, that the model was made for."""

    @property
    def identity(self) -> dict[str, str | dict[str, str]]:
        """What the weights are: path as given, pipeline class, component classes, and ``digest`` or ``commit``.

        ``digest`` is a SHA-256 over the bytes of every component file of a local folder (computed on first use, which
        reads all of them); a model of the Hub has ``commit`` instead.
        """

    @property
    def lora_targets(self) -> tuple[str, ...]:
        """Names (suffixes) of the linear layers that the family's published recipes adapt."""

    @property
    def guidance_kind(self) -> GuidanceKind:
        """What the guidance scale does to this model."""

    def encode(self, prompts: Sequence[str]) -> list[Conditioning]:
        """Encode prompts; the results are on the CPU and do not depend on the batch, up to rounding.

        Where the text has no fixed length, each conditioning is as long as its prompt.
        """

    def unconditional(self) -> Conditioning:
        """Encode what ``cfg`` guidance leads away from: the family's negative prompt; kept once encoded."""

    def guided(self, conditional: Tensor, unconditional: Tensor, guidance: float) -> Tensor:
        """Join the velocities [N, ...] of the two passes of ``cfg`` guidance, in float32."""

    def batch_conditioning(self, conditioning: Conditioning | Sequence[Conditioning]) -> Conditioning:
        """Stack N conditionings (or take batched ones as they are), on the model's device and in its dtype."""

    def sigmas(self, steps: int, *, height: int, width: int) -> Tensor:
        """Return the sampling schedule [steps + 1], float32, descending, ending in 0."""

    def latent_shape(self, *, height: int, width: int) -> tuple[int, ...]:
        """Return the shape of one image's latents as the transformer takes them, e.g. (S, C)."""

    def pipeline_call(self, *, steps: int, guidance: float, height: int, width: int) -> dict[str, Any]:
        """Return the arguments with which the pipeline of diffusers draws what is sampled here, beside the prompt."""

    def noise(self, seeds: Sequence[int], *, height: int, width: int) -> Tensor:
        """Return starting noise [N, S, C], float32: image i depends on ``seeds[i]`` only."""

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
        """Return the model's velocity [N, S, C], in its dtype, at noisy ``latents`` [N, S, C] and ``sigma`` [N].

        One pass: ``guidance`` counts only where it is ``embedded``.
        """

    def decode(self, latents: Tensor, *, height: int, width: int) -> list[Image.Image | None]:
        """Turn clean latents [N, S, C] into N RGB pictures; None stands for one that is not finite."""

    def release_encoders(self) -> None:
        """Free the text encoders; the next ``encode`` loads them again."""

    def release_decoder(self) -> None:
        """Free the autoencoder; the next ``decode`` loads it again."""


def takes_two_passes(model: FlowModel, guidance: float) -> bool:
    """Whether a sampling step at this guidance scale needs the unconditional velocity, too."""
    return model.guidance_kind == "cfg" and guidance > 1.0


def stack_conditioning(
    conditioning: Conditioning | Sequence[Conditioning], *, device: torch.device, dtype: torch.dtype
) -> Conditioning:
    """Stack per-prompt conditionings into a batch, floating-point tensors in ``dtype``.

    Args:
        conditioning: N conditionings of one prompt each, or one that is batched already.
        device: where the batch goes.
        dtype: of floating-point entries; integer entries and masks keep theirs.

    Returns:
        The same keys with a leading N. An entry whose first dimension differs between prompts is filled up with zeros
        and accompanied by ``<key>_mask`` [N, L], bool, True where it is the prompt's own. Tensors that are in place
        already are not copied.
    """
    if isinstance(conditioning, Mapping):
        batched: Conditioning = conditioning
    else:
        batched = {}
        for key in conditioning[0]:
            batched |= _stack(key, [one[key] for one in conditioning])
    return {
        key: value.to(device=device, dtype=dtype if value.is_floating_point() else value.dtype)
        for key, value in batched.items()
    }


def _stack(key: str, tensors: list[Tensor]) -> Conditioning:
    if len({tensor.shape for tensor in tensors}) == 1:
        return {key: torch.stack(tensors)}
    lengths = torch.tensor([len(tensor) for tensor in tensors])
    mask = torch.arange(int(lengths.max()))[None, :] < lengths[:, None]
    return {key: pad_sequence(tensors, batch_first=True), f"{key}_mask": mask}
