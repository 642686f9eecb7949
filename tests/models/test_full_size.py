"""Published configurations at full size, without weights: built on the meta device, which has only shapes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch

from gdro_cli.core.footprint import Weights
from gdro_cli.models.adapters import attach_lora
from gdro_cli.models.base import FlowModel
from gdro_cli.models.diffusers_flow import load_flow_model
from gdro_cli.models.meta_model import count_weights, meta_model
from gdro_cli.models.published import PublishedFolder, published_configurations
from gdro_cli.models.sampling import sample_latents
from gdro_cli.stages.training.group_gradient import GroupGradient, NoisyGroups

pytestmark = pytest.mark.slow

K, GROUPS = 3, 2


@dataclass(frozen=True)
class Expected:
    """Sizes that are published or worked out by hand."""

    gigabytes: str
    """Size of the weights at two bytes each (position tables included), to the digits given."""
    channels: int
    """Numbers of a latent per 8 x 8 pixels."""
    lora_32: int
    """Numbers of a rank 32 adapter."""
    encoders_gigabytes: str | None = None
    """Size of the text encoders' files in 16 bits, if their configurations are shipped."""


EXPECTED = {
    "FLUX.1-dev": Expected("23.8", 16, 89653248, "9.77"),
    "FLUX.1-Kontext-dev": Expected("23.8", 16, 89653248, "9.77"),
    "Chroma1-HD": Expected("17.8", 16, 89653248, "9.52"),
    "Lumina-Image-2.0": Expected("5.22", 16, 14745600, "5.23"),
    "SANA-1.6B": Expected("3.21", 2, 17203200, "5.23"),
    "SD3.5-medium": Expected("4.94", 16, 18776064, "11.16"),
    "SD3.5-large": Expected("16.292561536", 16, 47161344, "11.16"),
    "Qwen-Image": Expected("40.9", 16, 47185920),
    "Qwen-Image-Edit": Expected("40.9", 16, 47185920),
    "Qwen-Image-Edit-2509": Expected("40.9", 16, 47185920),
    "Qwen-Image-Edit-2511": Expected("40.9", 16, 47185920),
    "Z-Image": Expected("12.3", 16, 33423360),
    "FLUX.2-dev": Expected("64.4", 32, 154140672, "48.02"),
    "FLUX.2-klein-4B": Expected("7.8", 32, 33423360),
    "HiDream-I1-Full": Expected("34.211466368", 16, 31457280, "27.22"),
}
STEPPED = ("FLUX.1-dev", "SD3.5-medium")
"""Models that take a whole sampling and training step at full size."""


def open_on_meta(name: str) -> FlowModel:
    """A family on its published configurations only; the transformer has shapes and no numbers."""
    folder = PublishedFolder(name)
    model = load_flow_model(folder, dtype="bfloat16", device="meta")
    model.transformer = folder.meta_component("transformer", dtype=torch.bfloat16)
    return model


def conditioning(model: FlowModel, count: int, side: int = 512) -> dict[str, torch.Tensor]:
    tokens = model.max_sequence_length if model.pads_text else min(model.max_sequence_length, 60)
    shapes = model.sized_shapes(tokens, height=side, width=side)
    return {key: torch.empty(count, *shape, device="meta", dtype=torch.bfloat16) for key, shape in shapes.items()}


def test_every_published_configuration_is_tested() -> None:
    assert EXPECTED.keys() == published_configurations().keys()


@pytest.mark.parametrize("name", [name for name in EXPECTED if name != "Qwen-Image-Edit-2509"])
def test_published_model_at_full_size(name: str) -> None:
    """Size on disk as published, one velocity at 512 and 1024 pixels, and an adapter of the expected size.

    Qwen-Image-Edit-2509 is -2511 without a switch that has no weights, and is left out for speed.

    The adapter has rank x (inputs + outputs) parameters per layer; with rank 32, in thousands of inputs and outputs:

    - FLUX.1-dev, FLUX.1-Kontext-dev and Chroma: 19 x (8 x 6.144 + 4 x 15.360) + 38 x 3 x 6.144; SD3.5:
      (24 x 8 - 1) x 3.072 and (38 x 8 - 1) x 4.864, for the last block has no text output; Qwen-Image and
      its Edit models: 60 x 4 x 6.144; Z-Image: 34 x 4 x 7.680; Lumina-Image-2.0: 30 x (2 x 4.608 + 2 x 3.072);
      SANA-1.6B: 20 x 6 x 4.480; FLUX.2-klein-4B: 5 x 4 x 6.144 + 20 x (30.720 + 15.360);
      FLUX.2-dev: 8 x 4 x 12.288 + 48 x (61.440 + 30.720); HiDream-I1: 48 x 4 x 5.120.

    The numbers of HiDream-I1's transformer, in millions, with w = 2560: an expert has 3 w 6912 = 53.08, the shared one
    3 w 3584 = 27.53, so the mixture with its gate (4 w) 239.87; attention has 4 (w^2 + w) + 2 w = 26.23, twice that in
    the double blocks. 16 double blocks of 12 (w^2 + w) + 52.46 + 239.87 + 53.08 = 424.09, 32 single blocks of
    6 (w^2 + w) + 26.23 + 239.87 = 305.44, 49 projections of text of 4096 w = 10.49, and 32.46 for time, pooled text,
    patches and output: 17105.73.

    The models in ``STEPPED`` also take an Euler step of the sampler and a checkpointed two-pass gradient of groups:
    reference, errors, loss, and the backward pass.
    """
    expected, model = EXPECTED[name], open_on_meta(name)
    size = 2 * sum(tensor.numel() for tensor in model.transformer.state_dict().values())
    digits = len(expected.gigabytes.split(".")[1])
    assert f"{size / 1e9:.{digits}f}" == expected.gigabytes

    with torch.no_grad():
        for side in (512, 1024):
            pixels = {"height": side, "width": side}
            latents = torch.empty(1, *model.latent_shape(**pixels), device="meta")
            assert latents.numel() == side * side // 64 * expected.channels
            text = conditioning(model, 1, side)
            velocity = model.velocity(latents, torch.empty(1, device="meta"), text, guidance=3.5, **pixels)
            assert velocity.shape == latents.shape and velocity.dtype == torch.bfloat16

    if name in STEPPED:
        sampling_step(model)
    parameters = attach_lora(model, rank=32, alpha=32)
    assert sum(parameter.numel() for parameter in parameters) == expected.lora_32
    assert {parameter.dtype for parameter in parameters} == {torch.float32}
    if name in STEPPED:
        training_step(model, parameters)


def sampling_step(model: FlowModel) -> None:
    """Two images, one Euler step, with both passes where guidance is classifier-free."""
    text = conditioning(model, 2)
    model._unconditional = {key: value[0] for key, value in text.items()}
    noise = torch.empty(2, *model.latent_shape(height=512, width=512), device="meta")
    model._loaded["scheduler"] = scheduler(model)
    options: dict[str, Any] = {"steps": 1, "guidance": 4.5, "height": 512, "width": 512, "batch_size": 2}
    texts = [{key: value[i] for key, value in text.items()} for i in range(2)]
    latents = sample_latents(model, noise, texts, **options)
    assert latents.shape == noise.shape and latents.dtype == torch.float32


def scheduler(model: FlowModel) -> Any:
    from diffusers import FlowMatchEulerDiscreteScheduler

    return FlowMatchEulerDiscreteScheduler.from_config(model.folder.config("scheduler"))


class Landed(torch.autograd.Function):
    """Zeros on the CPU in place of a velocity without numbers; the gradient returns to the meta device."""

    @staticmethod
    def forward(ctx: Any, velocity: torch.Tensor) -> torch.Tensor:
        ctx.dtype = velocity.dtype
        return torch.zeros(velocity.shape)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> torch.Tensor:
        return torch.empty(gradient.shape, dtype=ctx.dtype, device="meta")


class Grounded:
    """A model whose transformer has no numbers, for a loss that needs some: it sorts and checks rewards."""

    def __init__(self, model: FlowModel) -> None:
        self.model, self.transformer, self.sizes = model, model.transformer, list[int]()

    def velocity(self, latents: torch.Tensor, sigma: torch.Tensor, text: Any, **options: Any) -> torch.Tensor:
        self.sizes.append(len(latents))
        velocity = self.model.velocity(latents.to("meta"), sigma.to("meta"), text, **options)
        return Landed.apply(velocity)  # type: ignore[no-any-return]


def training_step(model: FlowModel, parameters: list[torch.nn.Parameter]) -> None:
    """The two-pass gradient of two groups of three at 512 pixels, checkpointed; in one micro-batch, for speed."""
    images = GROUPS * K
    clean = torch.zeros(images, *model.latent_shape(height=512, width=512))
    groups = NoisyGroups(
        clean=clean,
        noise=torch.ones_like(clean),
        sigma=torch.full((images,), 0.5),
        conditioning={key: torch.zeros(value.shape) for key, value in conditioning(model, GROUPS).items()},
        group=torch.arange(GROUPS).repeat_interleave(K),
        rewards=torch.tensor([[0.1, 0.5, 0.9], [0.3, 0.2, 0.1]]),
        mask=torch.ones(GROUPS, K, dtype=torch.bool),
        weights=torch.ones(GROUPS),
    )
    model.transformer.enable_gradient_checkpointing()  # type: ignore[operator]
    grounded = Grounded(model)
    gradient = GroupGradient(
        model=grounded,  # type: ignore[arg-type]
        loss={"method": "gdro", "beta": 12.0, "gamma": 0.5, "tau": 0.05},
        reduction="mean",
        guidance=3.5,
        size=(512, 512),
        micro_batch=images,
        one_pass=False,
        backward=torch.autograd.backward,
    )
    assert torch.isfinite(gradient(groups).loss)
    assert grounded.sizes == 3 * [images]  # reference, errors, backward pass
    assert all(p.grad is not None and p.grad.shape == p.shape for p in parameters)


@pytest.mark.parametrize("name", list(EXPECTED))
def test_shallow_models_have_the_numbers_of_the_published_one(name: str) -> None:
    """``--dry-run`` counts two or three blocks of a kind for all of them, and the text encoders' files."""
    model, expected = meta_model(PublishedFolder(name), dtype="bfloat16"), EXPECTED[name]
    digits = len(expected.gigabytes.split(".")[1])
    assert f"{2 * model.transformer.values / 1e9:.{digits}f}" == expected.gigabytes
    if expected.encoders_gigabytes is None:
        assert model.text is None
    else:
        assert model.text is not None and model.vae == count_weights(PublishedFolder(name).meta_component("vae"))
        assert f"{2 * model.text.values / 1e9:.2f}" == expected.encoders_gigabytes
    assert sum((part.weights.times(part.times) for part in model.parts), Weights(0)).linear <= model.transformer.values
