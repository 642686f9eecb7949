"""A frozen adapter under the trained one: base and reference contain it, and the saved file joins both."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from gdro_cli.errors import UserError
from gdro_cli.models.adapters import (
    LORA_FILE,
    attach_lora,
    load_lora_state,
    lora_state,
    merged,
    reference,
    save_lora,
    trained_part,
)
from gdro_cli.models.base import FlowModel
from gdro_cli.models.diffusers_flow import load_flow_model
from gdro_cli.models.folder import PipelineFolder
from gdro_cli.models.initial_adapter import InitialAdapter
from gdro_cli.models.lora_files import read_adapter
from gdro_cli.models.lora_linear import LoraLinear
from gdro_cli.models.memory import MemoryOptions, checkpoint_blocks

from .conftest import PROMPTS, SIZE
from .test_adapters import train_a_little, velocity

FAMILY_OF = {"flux": ["attn.to_q", "x_embedder", "proj_out"], "sd3": ["attn.to_q", "ff.net.2", "proj_out"]}
"""Layers of the initial adapter; of these the trained one has only the attention's."""
LORA = {"rank": 3, "alpha": 7.0, "rslora": True}
"""The initial adapter's form; the trained one has another rank and scale."""


def with_lora(folder: Path, targets: Sequence[str], **options: Any) -> FlowModel:
    """A model with a trained adapter in the usual way."""
    model = load_flow_model(folder, **options)
    train_a_little(attach_lora(model, targets=targets, **LORA, seed=2))
    return model


def adapter(folder: Path, target: Path, name: str = "flux") -> Path:
    """The file of that adapter."""
    return save_lora(with_lora(folder, FAMILY_OF[name]), target)


def opened(path: Path) -> InitialAdapter:
    return InitialAdapter(path, read_adapter(path).folded())


def starting_from(file: Path, folder: Path, **options: Any) -> FlowModel:
    model = load_flow_model(folder, **options)
    model.initial = opened(file)
    return model


@pytest.fixture(scope="module")
def folders(flux_folder: Path, family_folder: Callable[[str], Path]) -> dict[str, Path]:
    return {"flux": flux_folder, "sd3": family_folder("sd3")}


def close(a: Tensor, b: Tensor, share: float = 1e-5) -> None:
    torch.testing.assert_close(a, b, rtol=0.0, atol=share * float(b.float().abs().max()))


@pytest.mark.parametrize("name", ["flux", "sd3"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_base_reference_and_fresh_policy_are_the_model_with_the_adapter(
    name: str, dtype: Literal["float32", "bfloat16"], folders: dict[str, Path], tmp_path: Path
) -> None:
    folder = folders[name]
    expected = velocity(with_lora(folder, FAMILY_OF[name], dtype=dtype))
    model = starting_from(adapter(folder, tmp_path, name), folder, dtype=dtype)
    share = 1e-5 if dtype == "float32" else 0.02
    close(velocity(model), expected, share)
    assert (expected - velocity(load_flow_model(folder, dtype=dtype))).abs().mean() > 0.05 * expected.std()
    parameters = attach_lora(model, rank=2, alpha=5, seed=1)
    start = velocity(model)
    close(start, expected, share)
    with reference(model):
        base = velocity(model)
    assert torch.equal(base, start) or dtype == "bfloat16"  # there rows are rounded in another order
    close(base, expected, share)
    train_a_little(parameters)
    trained = velocity(model)
    assert (trained - start).abs().mean() > 0.05 * start.std()
    with reference(model), reference(model):
        assert torch.equal(velocity(model), base)
    assert torch.equal(velocity(model), trained)


def by_hand(folder: Path, file: Path, model: FlowModel) -> Tensor:
    """The velocity of the base with W + s_init B A + s_new B A in place of W."""
    plain, new = load_flow_model(folder), lora_state(model)
    weights = dict(plain.transformer.named_parameters())
    old = load_file(file)
    for name in [name for name in old if ".lora_A." in name]:
        layer = name.removeprefix("transformer.").removesuffix(".lora_A.weight")
        weights[f"{layer}.weight"].data += 7 / 3**0.5 * old[name.replace("lora_A", "lora_B")] @ old[name]
    for name in [name for name in new if ".lora_A." in name]:
        weights[name.replace("lora_A.", "")].data += 5 / 2 * new[name.replace("lora_A", "lora_B")] @ new[name]
    return velocity(plain)


@pytest.mark.parametrize("targets", ["auto", "all-linear", ["norm_out.linear"]])
@pytest.mark.parametrize("rank", [2, 40], ids=["in place", "one weight"])
def test_policy_is_the_sum_of_both_also_merged(flux_folder: Path, tmp_path: Path, targets: Any, rank: int) -> None:
    file = adapter(flux_folder, tmp_path)
    model = starting_from(file, flux_folder)
    train_a_little(attach_lora(model, rank=rank, alpha=5 / 2 * rank, targets=targets, seed=1))
    expected, trained = by_hand(flux_folder, file, model), velocity(model)
    close(trained, expected)
    weights = {name: weight.clone() for name, weight in model.transformer.state_dict().items()}
    with merged(model):
        close(velocity(model), expected)
    with reference(model):
        base = velocity(model)
        with merged(model):
            close(velocity(model), base)
    assert all(weight.equal(weights[name]) for name, weight in model.transformer.state_dict().items())
    assert torch.equal(velocity(model), trained)


def test_only_the_new_adapter_is_trained_and_in_the_state(flux_folder: Path, tmp_path: Path) -> None:
    model = starting_from(adapter(flux_folder, tmp_path), flux_folder)
    parameters = attach_lora(model, rank=2, alpha=5, targets="all-linear", seed=1)
    plain = load_flow_model(flux_folder)
    attach_lora(plain, rank=2, alpha=5, targets="all-linear", seed=1)
    state, expected = lora_state(model), lora_state(plain)
    assert state.keys() == expected.keys() and all(torch.equal(state[name], expected[name]) for name in state)
    assert {id(p) for p in model.transformer.parameters() if p.requires_grad} == {id(p) for p in parameters}
    train_a_little(parameters)
    moved = velocity(model)
    load_lora_state(model, state)
    assert not torch.equal(velocity(model), moved)
    assert all(torch.equal(value, state[name]) for name, value in lora_state(model).items())


def test_gradients_are_those_of_the_sum_also_with_checkpointed_blocks(flux_folder: Path, tmp_path: Path) -> None:
    file = adapter(flux_folder, tmp_path)

    def gradients(model: FlowModel) -> list[Tensor]:
        texts, noise = model.batch_conditioning(model.encode(PROMPTS)), model.noise([1, 2, 3], **SIZE)
        result = model.velocity(noise, torch.tensor([0.9, 0.5, 0.1]), texts, guidance=1.0, **SIZE)
        parameters = [p for p in model.transformer.parameters() if p.requires_grad]
        return list(torch.autograd.grad(result.square().mean(), parameters))

    def trained(checkpointing: float) -> FlowModel:
        model = starting_from(file, flux_folder)
        train_a_little(attach_lora(model, rank=2, alpha=5, seed=1))
        checkpoint_blocks(model.transformer, checkpointing)
        model.transformer.train()
        return model

    ours, again, pefts = trained(0), trained(1), trained(0)
    for layer in pefts.transformer.modules():
        if isinstance(layer, LoraLinear):
            layer.__class__ = LoraLinear.__base__  # type: ignore[assignment]
    for one, two, three in zip(gradients(ours), gradients(again), gradients(pefts), strict=True):
        torch.testing.assert_close(one, two)
        torch.testing.assert_close(one, three, rtol=1e-4, atol=1e-4 * float(three.abs().max()))


@pytest.mark.parametrize("kind", ["int8", "fp8"])
def test_it_lies_beside_quantised_weights(flux_folder: Path, tmp_path: Path, kind: Literal["int8", "fp8"]) -> None:
    pytest.importorskip("torchao")
    memory = MemoryOptions(quantization=kind)
    expected = velocity(with_lora(flux_folder, FAMILY_OF["flux"], memory=memory))
    model = starting_from(adapter(flux_folder, tmp_path), flux_folder, memory=memory)
    close(velocity(model), expected)
    parameters = attach_lora(model, rank=2, alpha=5, seed=1)
    close(velocity(model), expected)
    train_a_little(parameters)
    with reference(model), merged(model):
        close(velocity(model), expected)
    assert (velocity(model) - expected).abs().mean() > 0.05 * expected.std()


@pytest.mark.slow
@pytest.mark.parametrize("name", ["flux", "sd3"])
@pytest.mark.parametrize("rslora", [False, True])
def test_diffusers_loads_both_as_one_adapter(name: str, rslora: bool, folders: dict[str, Path], tmp_path: Path) -> None:
    from diffusers import DiffusionPipeline

    file = adapter(folders[name], tmp_path / "initial", name)
    model = starting_from(file, folders[name])
    train_a_little(attach_lora(model, rank=2, alpha=5, rslora=rslora, seed=1))
    save_lora(model, tmp_path / "both")
    tensors = load_file(tmp_path / "both" / LORA_FILE)
    assert {len(tensor) for key, tensor in tensors.items() if ".lora_A." in key} == {5}
    pipe = DiffusionPipeline.from_pretrained(folders[name], local_files_only=True)
    pipe.load_lora_weights(tmp_path / "both")
    close(velocity(model, pipe.transformer), velocity(model))


@pytest.mark.parametrize("rslora", [False, True])
def test_a_model_that_starts_from_the_file_of_both_is_the_trained_one(
    flux_folder: Path, tmp_path: Path, rslora: bool
) -> None:
    model = starting_from(adapter(flux_folder, tmp_path / "initial"), flux_folder)
    train_a_little(attach_lora(model, rank=2, alpha=5, rslora=rslora, seed=1))
    file = save_lora(model, tmp_path / "both")
    close(velocity(starting_from(file, flux_folder)), velocity(model))
    weights = {name.removeprefix("transformer."): value for name, value in load_file(file).items()}
    part, state = trained_part(model, weights), lora_state(model)
    assert part.keys() == state.keys()
    for name, value in part.items():
        torch.testing.assert_close(value, state[name], rtol=1e-6, atol=0.0)


def test_the_digest_is_that_of_layers_and_numbers(flux_folder: Path, tmp_path: Path) -> None:
    file = adapter(flux_folder, tmp_path)
    one = opened(file)
    assert opened(tmp_path).digest == one.digest
    halves = {layer: (2 * down, up / 2) for layer, (down, up) in one.pairs.items()}
    renamed = {layer + "x": pair for layer, pair in one.pairs.items()}
    digests = {InitialAdapter(file, pairs).digest for pairs in (one.pairs, halves, renamed)}
    assert len(digests) == 3


@pytest.mark.parametrize("change", ["layer", "shape", "no linear layer"])
def test_an_adapter_of_another_model_is_refused(flux_folder: Path, tmp_path: Path, change: str) -> None:
    from safetensors import safe_open

    file = adapter(flux_folder, tmp_path)
    with safe_open(file, "pt") as before:
        metadata = before.metadata()
    tensors, layer = load_file(file), "transformer.proj_out.lora_"
    down, up = tensors.pop(f"{layer}A.weight"), tensors.pop(f"{layer}B.weight")
    other = {"layer": "transformer.proj_in.lora_", "no linear layer": "transformer.transformer_blocks.0.lora_"}
    tensors[f"{other.get(change, layer)}A.weight"] = down
    tensors[f"{other.get(change, layer)}B.weight"] = up[:-1].contiguous() if change == "shape" else up
    save_file(tensors, file, metadata=metadata)
    words = {
        "layer": "changes proj_in, but the transformer has no such linear layer",
        "no linear layer": "changes transformer_blocks.0, but the transformer has no such linear layer",
        "shape": "numbers for proj_out, but the transformer has",
    }[change]
    transformer = PipelineFolder(flux_folder).meta_component("transformer")
    with pytest.raises(UserError, match=words):
        opened(file).check(transformer)
