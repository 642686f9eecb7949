"""Ways to save memory: a quantised base, one part on the device at a time, a decoder that works in pieces."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from gdro_cli.embedded import tiny_model_path
from gdro_cli.errors import PrerequisiteError, UserError
from gdro_cli.models.adapters import attach_lora, reference
from gdro_cli.models.base import FlowModel
from gdro_cli.models.diffusers_flow import load_flow_model
from gdro_cli.models.memory import MemoryOptions, OneAtATime, checkpoint_blocks, quantization_config
from gdro_cli.models.sampling import sample_latents

from .conftest import PROMPTS, SIZE

CPU = torch.device("cpu")


def draw(model: FlowModel) -> list[Any]:
    """Two images, for which all three parts run."""
    noise, texts = model.noise([1, 2], **SIZE), model.encode(PROMPTS[:2])
    latents = sample_latents(model, noise, texts, steps=2, guidance=1.0, batch_size=2, **SIZE)
    return [np.asarray(image, dtype=int) for image in model.decode(latents, **SIZE)]


@pytest.mark.parametrize("family", ["flux", "sd3"])
def test_offload_and_slicing_draw_the_same_images(
    family: str, flux_folder: Path, family_folder: Callable[[str], Path]
) -> None:
    folder = flux_folder if family == "flux" else family_folder(family)
    plain = draw(load_flow_model(folder))
    model: Any = load_flow_model(folder, memory=MemoryOptions(offload=True, vae_slicing=True))
    saved = draw(model)
    # One level of 255: convolutions of one image and of two may round differently.
    assert all(abs(a - b).max() <= 1 for a, b in zip(plain, saved, strict=True))
    assert model._network("vae").use_slicing
    assert not any(p.requires_grad for p in model.transformer.parameters())


def test_tiles_are_used_for_images_larger_than_the_autoencoder_was_made_for(flux_folder: Path) -> None:
    size = {"height": 128, "width": 64}
    images = []
    for tiling in (False, True):
        model = load_flow_model(flux_folder, memory=MemoryOptions(vae_tiling=tiling))
        images.append(np.asarray(model.decode(model.noise([1], **size), **size)[0], dtype=int))
    assert images[0].shape == images[1].shape and not np.array_equal(*images)


def test_an_autoencoder_that_cannot_work_in_pieces_says_so() -> None:
    model = load_flow_model(tiny_model_path(), memory=MemoryOptions(vae_slicing=True))
    with pytest.raises(UserError, match=r"model\.vae_slicing has no effect on .*PatchAutoencoder"):
        model.decode(model.noise([1], height=64, width=64), height=64, width=64)


class Traveller(nn.Linear):
    """A layer that remembers where it was sent."""

    def __init__(self, name: str, log: list[str]) -> None:
        super().__init__(1, 1)
        self.name, self.log = name, log

    def to(self, *args: Any, **kwargs: Any) -> Any:
        self.log.append(f"{self.name} to {args[0]}")
        return self


def test_one_part_is_on_the_device_at_a_time() -> None:
    log: list[str] = []
    clip, t5, transformer, vae = (Traveller(name, log) for name in ("clip", "t5", "transformer", "vae"))
    parts = OneAtATime(torch.device("meta"))  # in place of a GPU
    parts.use("text", "text_encoder", clip)
    parts.use("text", "text_encoder_2", t5)
    parts.use("text", "text_encoder", clip)
    assert log == ["clip to meta", "t5 to meta"]
    log.clear()
    for _ in range(3):
        parts.use("transformer", "transformer", transformer)
    assert log == ["clip to cpu", "t5 to cpu", "transformer to meta"]
    log.clear()
    parts.use("vae", "vae", vae)
    parts.forget("vae")
    parts.use("text", "text_encoder", clip)
    assert log == ["transformer to cpu", "vae to meta", "clip to meta"]


def test_a_wrapped_transformer_stays_on_its_device(flux_folder: Path) -> None:
    model: Any = load_flow_model(flux_folder, memory=MemoryOptions(offload=True))
    log: list[str] = []
    _ = model.transformer
    model.transformer = Traveller("wrapped", log)
    _ = model.transformer
    model.encode(PROMPTS[:1])
    assert log == []


@pytest.mark.parametrize(("kind", "package"), [("int8", "torchao"), ("fp8", "torchao"), ("nf4", "bitsandbytes")])
def test_a_missing_package_is_one_sentence_that_names_the_extra(
    kind: Any, package: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("gdro_cli.models.memory.find_spec", lambda name: None)
    with pytest.raises(PrerequisiteError) as caught:
        quantization_config(kind, dtype=torch.bfloat16, device=CPU)
    message = str(caught.value)
    assert f"pip install 'gdro_cli[{package}]'" in message and "\n" not in message
    assert quantization_config("none", dtype=torch.bfloat16, device=CPU) is None


@pytest.mark.parametrize(("kind", "error"), [("int8", 0.05), ("fp8", 0.15)])
def test_an_8_bit_base_is_close_and_trains_its_adapter_exactly(kind: Any, error: float, flux_folder: Path) -> None:
    """Its velocity is the float model's, up to the rounding of the weights. The adapter's gradient is that of a float
    model with the rounded weights. With the adapter off it is the base again.
    """
    pytest.importorskip("torchao")
    exact, small, rounded = (
        load_flow_model(flux_folder, memory=MemoryOptions(quantization=q)) for q in ("none", kind, "none")
    )
    texts, noise, sigma = exact.encode(PROMPTS), exact.noise([1, 2, 3], **SIZE), torch.tensor([0.9, 0.5, 0.1])

    def velocity(model: FlowModel) -> torch.Tensor:
        return model.velocity(noise, sigma, texts, guidance=1.0, **SIZE)

    with torch.no_grad():
        base, coarse = velocity(exact), velocity(small)
    assert 0 < (coarse - base).norm() < error * base.norm()
    stored: Any = dict(small.transformer.named_modules())
    linear = [n for n, layer in rounded.transformer.named_modules() if isinstance(layer, nn.Linear)]
    for name in linear:
        weight = stored[name].weight
        assert weight.qdata.element_size() == 1
        rounded.transformer.get_submodule(name).weight = nn.Parameter(weight.dequantize(), requires_grad=False)
    gradients = []
    for model in (small, rounded):
        parameters = attach_lora(model, rank=2, alpha=2, seed=1)
        assert {p.dtype for p in parameters} == {torch.float32}
        with torch.no_grad():
            for parameter in parameters:
                parameter.add_(0.1)
        velocity(model).square().mean().backward()
        gradients.append([p.grad for p in parameters])
    for ours, theirs in zip(*gradients, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-4)
    with torch.no_grad(), reference(small):
        assert torch.equal(velocity(small), coarse)


def test_4_bit_settings_and_where_they_run() -> None:
    """The next test runs the layers; loading them through diffusers needs a GPU."""
    pytest.importorskip("bitsandbytes")
    with pytest.raises(PrerequisiteError, match="needs a CUDA GPU"):
        quantization_config("nf4", dtype=torch.bfloat16, device=CPU)
    config = quantization_config("nf4", dtype=torch.bfloat16, device=torch.device("cuda"))
    assert (config.load_in_4bit, config.bnb_4bit_quant_type) == (True, "nf4")
    assert config.bnb_4bit_compute_dtype == torch.bfloat16


def test_an_adapter_on_4_bit_layers_learns(flux_folder: Path) -> None:
    """The test replaces the layers itself, because diffusers quantises to 4 bits only on a GPU."""
    bnb = pytest.importorskip("bitsandbytes")
    model = load_flow_model(flux_folder)
    texts, noise, sigma = model.encode(PROMPTS), model.noise([1, 2, 3], **SIZE), torch.tensor([0.9, 0.5, 0.1])
    with torch.no_grad():
        base = model.velocity(noise, sigma, texts, guidance=1.0, **SIZE)
    for name, layer in list(model.transformer.named_modules()):
        if isinstance(layer, nn.Linear) and layer.in_features % 64 == 0:
            bits = bnb.nn.Linear4bit(
                layer.in_features, layer.out_features, layer.bias is not None, torch.float32, quant_type="nf4"
            )
            bits.load_state_dict(layer.state_dict())
            model.transformer.set_submodule(name, bits.to("cpu").requires_grad_(False))
    parameters = attach_lora(model, rank=2, alpha=2, targets="all-linear")
    with torch.no_grad():
        coarse = model.velocity(noise, sigma, texts, guidance=1.0, **SIZE)
    assert 0 < (coarse - base).norm() < 0.4 * base.norm()
    model.velocity(noise, sigma, texts, guidance=1.0, **SIZE).square().mean().backward()
    assert all(p.grad is not None for p in parameters)


class SavedTensors:
    """What autograd keeps for the backward pass."""

    def __init__(self) -> None:
        self.count = 0
        self.matrices: set[tuple[int, ...]] = set()
        """Shapes of those without a batch that are not quantised."""

    def pack(self, tensor: torch.Tensor) -> torch.Tensor:
        self.count += 1
        if tensor.ndim == 2 and type(tensor) is torch.Tensor:
            self.matrices.add(tuple(tensor.shape))
        return tensor


@pytest.mark.parametrize("kind", ["int8", "fp8"])
def test_quantised_layers_answer_in_the_model_s_dtype_and_keep_no_unpacked_weights(
    kind: Any, flux_folder: Path
) -> None:
    """Behind a norm autocast's inputs are float32, and the answer would be as wide."""
    model = load_flow_model(flux_folder, dtype="bfloat16", memory=MemoryOptions(quantization=kind))
    layer = next(m for m in model.transformer.modules() if isinstance(m, nn.Linear) and "Tensor" in repr(m.weight))
    x = torch.randn(2, 3, layer.in_features, generator=torch.Generator().manual_seed(0)).requires_grad_(True)
    saved = SavedTensors()
    hooks = torch.autograd.graph.saved_tensors_hooks(saved.pack, lambda tensor: tensor)
    with hooks, torch.autocast("cpu", dtype=torch.bfloat16):
        answer = layer(x)
    assert answer.dtype == torch.bfloat16
    sides = layer.out_features, layer.in_features
    assert saved.count and not saved.matrices & {sides, sides[::-1]}
    answer.float().sum().backward()
    assert x.grad is not None
    expected = layer.weight.dequantize().float().sum(dim=0).expand_as(x.grad)
    torch.testing.assert_close(x.grad, expected, rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize("name", ["sd3", "qwen-image", "z-image"])
def test_a_share_of_the_blocks_is_checkpointed(name: str, family_folder: Callable[[str], Path]) -> None:
    """The gradient is the same, and the bytes kept for the backward pass lie between those of all blocks and none."""
    kept, gradients = [], []
    for share in (0.0, 0.5, 1.0):
        model = load_flow_model(family_folder(name))
        parameters = attach_lora(model, rank=2, alpha=2)
        with torch.no_grad():
            for number, parameter in enumerate(parameters):
                parameter.copy_(0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(number)))
        checkpoint_blocks(model.transformer, share)
        noise, text = model.noise([1, 2], height=64, width=64), model.encode(PROMPTS[:2])
        saved = SavedTensors()
        with torch.autograd.graph.saved_tensors_hooks(saved.pack, lambda tensor: tensor):
            velocity = model.velocity(
                noise, torch.tensor([0.9, 0.3]), model.batch_conditioning(text), guidance=1.0, height=64, width=64
            )
        kept.append(saved.count)
        velocity.square().mean().backward()
        gradients.append(torch.cat([p.grad.flatten() for p in parameters if p.grad is not None]))
    assert kept[0] > kept[1] > kept[2]
    torch.testing.assert_close(gradients[1], gradients[0])
    torch.testing.assert_close(gradients[2], gradients[0])
