"""LoRA, the reference inside it, its file in diffusers' format, and the average of its weights."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
import torch.distributed
from peft.tuners.lora.layer import Linear
from safetensors import safe_open
from torch import Tensor, nn

from gdro_cli.errors import StoreError, UserError
from gdro_cli.models.adapters import Ema, attach_lora, load_lora_state, lora_state, merged, reference, save_lora
from gdro_cli.models.base import FlowModel
from gdro_cli.models.diffusers_flow import load_flow_model
from gdro_cli.models.lora_linear import LoraLinear

from .conftest import PROMPTS, SIZE


def velocity(model: FlowModel, transformer: nn.Module | None = None) -> Tensor:
    """The velocity at fixed inputs, optionally of another transformer with the same interface."""
    texts = model.encode(PROMPTS)
    own, model.transformer = model.transformer, transformer or model.transformer
    with torch.no_grad():
        noise, sigma = model.noise([1, 2, 3], **SIZE), torch.tensor([0.9, 0.5, 0.1])
        result = model.velocity(noise, sigma, texts, guidance=1.0, **SIZE)
    model.transformer = own
    return result


def train_a_little(parameters: list[nn.Parameter]) -> None:
    """Give every adapter weight a value that matters."""
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in parameters:
            parameter.add_(0.2 * torch.randn(parameter.shape, generator=generator))


@pytest.fixture
def one_process() -> Iterator[None]:
    """A process group of this process alone, which DDP needs."""
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


def test_fresh_adapter_changes_nothing_and_reference_is_the_base_exactly(flux_folder: Path) -> None:
    base = velocity(load_flow_model(flux_folder))
    model = load_flow_model(flux_folder)
    parameters = attach_lora(model, rank=2, alpha=4, targets="all-linear", seed=1)
    assert torch.equal(velocity(model), base)
    train_a_little(parameters)
    trained = velocity(model)
    assert (trained - base).abs().mean() > 0.1 * base.std()
    with reference(model):
        assert torch.equal(velocity(model), base)
    assert torch.equal(velocity(model), trained)


def test_reference_leaves_gradients_and_errors_alone(flux_folder: Path) -> None:
    model = load_flow_model(flux_folder)
    parameters = attach_lora(model, rank=2, alpha=2, seed=1)
    with pytest.raises(KeyError), reference(model):
        assert all(p.requires_grad for p in parameters)
        raise KeyError
    train_a_little(parameters)
    texts = model.encode(PROMPTS[:1])
    model.velocity(model.noise([1], **SIZE), torch.tensor([0.5]), texts, guidance=1.0, **SIZE).square().sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in parameters)
    trainable = [p for p in model.transformer.parameters() if p.requires_grad]
    assert {id(p) for p in trainable} == {id(p) for p in parameters}


def peft_layers(model: FlowModel) -> list[Any]:
    """The adapted layers, which compute in our own way, or in peft's if their class is changed back."""
    return [layer for layer in model.transformer.modules() if isinstance(layer, Linear)]


@pytest.mark.parametrize("rank", [1, 8], ids=["in place", "one weight"])
def test_adapted_layers_compute_what_pefts_do(flux_folder: Path, rank: int) -> None:
    model = load_flow_model(flux_folder)
    parameters = attach_lora(model, rank=rank, alpha=3.0 * rank, targets=["attn.to_q", "ff.net.0.proj"], seed=1)
    train_a_little(parameters)
    texts, noise = model.batch_conditioning(model.encode(PROMPTS)), model.noise([1, 2, 3], **SIZE)

    def velocity_and_gradient() -> list[Tensor]:
        result = model.velocity(noise, torch.tensor([0.9, 0.5, 0.1]), texts, guidance=1.0, **SIZE)
        return [result.detach(), *torch.autograd.grad(result.square().mean(), parameters)]

    ours = velocity_and_gradient()
    for layer in peft_layers(model):
        assert type(layer) is LoraLinear
        assert layer.is_one_weight(rank=rank) is (rank == 8)
        layer.__class__ = Linear
    pefts = velocity_and_gradient()
    for a, b in zip(ours, pefts, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4 * float(b.abs().max()))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_merged_weights_return_unchanged(flux_folder: Path, dtype: Literal["float32", "bfloat16"]) -> None:
    """A thousand times, and after an error; bfloat16 would drift if the adapter were subtracted again."""
    model = load_flow_model(flux_folder, dtype=dtype)
    train_a_little(attach_lora(model, rank=2, alpha=4, seed=1))
    weights = {name: weight.clone() for name, weight in model.transformer.state_dict().items()}
    attached = velocity(model)
    for _ in range(1000):
        with merged(model):
            pass
    with pytest.raises(KeyError), merged(model):
        changed = [name for name, weight in model.transformer.state_dict().items() if not weight.equal(weights[name])]
        assert len(changed) == len(peft_layers(model))
        drawn = velocity(model)
        raise KeyError
    assert all(weight.equal(weights[name]) for name, weight in model.transformer.state_dict().items())
    assert torch.equal(velocity(model), attached)
    torch.testing.assert_close(
        drawn, attached, rtol=0.0, atol=float(attached.std()) * (1e-5 if dtype == "float32" else 0.1)
    )


def test_nothing_is_merged_without_the_adapter(flux_folder: Path) -> None:
    model = load_flow_model(flux_folder)
    with merged(model):
        assert model.loaded_transformer is None
    base = velocity(model)
    train_a_little(attach_lora(model, rank=2, alpha=4, seed=1))
    with reference(model), merged(model):
        assert torch.equal(velocity(model), base)


def test_nested_references_stay_off_until_the_outer_one_ends(flux_folder: Path) -> None:
    model = load_flow_model(flux_folder)
    train_a_little(attach_lora(model, rank=2, alpha=2, seed=1))
    with reference(model):
        off = velocity(model)
        with reference(model):
            pass
        assert torch.equal(velocity(model), off)


@pytest.mark.slow
@pytest.mark.parametrize(("rank", "alpha", "rslora"), [(4, 4, False), (4, 10, False), (4, 6, True)])
@pytest.mark.parametrize("targets", ["auto", "all-linear"])
def test_diffusers_loads_the_file_and_gives_the_same_velocity(
    flux_folder: Path, tmp_path: Path, rank: int, alpha: float, rslora: bool, targets: Any
) -> None:
    from diffusers import FluxPipeline

    model = load_flow_model(flux_folder)
    train_a_little(attach_lora(model, rank=rank, alpha=alpha, targets=targets, rslora=rslora, seed=1))
    save_lora(model, tmp_path / "lora")
    pipe = FluxPipeline.from_pretrained(flux_folder, local_files_only=True)
    base = velocity(model, pipe.transformer)
    pipe.load_lora_weights(tmp_path / "lora")
    theirs = velocity(model, pipe.transformer)
    torch.testing.assert_close(theirs, velocity(model), rtol=0.0, atol=1e-5 * float(theirs.abs().max()))
    assert (theirs - base).abs().mean() > 0.05 * base.std()


def test_equal_adapters_are_equal_files(flux_folder: Path, tmp_path: Path) -> None:
    model = load_flow_model(flux_folder)
    attach_lora(model, rank=2, alpha=4.0, seed=3)
    # The library writes two entries of metadata in a random order.
    assert len({save_lora(model, tmp_path / str(i)).read_bytes() for i in range(12)}) == 1
    with safe_open(tmp_path / "0" / "pytorch_lora_weights.safetensors", "pt") as file:
        assert list(file.metadata()) and file.metadata()["format"] == "pt"
        assert len(file.keys()) == len(lora_state(model))


def test_all_linear_reaches_every_linear_layer(flux_folder: Path) -> None:
    model = load_flow_model(flux_folder)
    linear = {name for name, layer in model.transformer.named_modules() if isinstance(layer, nn.Linear)}
    assert {"x_embedder", "norm_out.linear", "proj_out", "transformer_blocks.0.norm1.linear"} <= linear
    parameters = attach_lora(model, rank=2, alpha=2, targets="all-linear", seed=1)
    assert len(parameters) == 2 * len(linear)
    assert {name.split(".lora_")[0] for name in lora_state(model)} == linear


def test_adapter_is_seeded_without_the_global_random_state(flux_folder: Path) -> None:
    def fresh(seed: int) -> dict[str, Tensor]:
        model = load_flow_model(flux_folder)
        _ = model.transformer
        before = torch.get_rng_state()
        attach_lora(model, rank=3, alpha=3, seed=seed)
        assert torch.equal(torch.get_rng_state(), before)
        return lora_state(model)

    torch.manual_seed(11)
    one = fresh(1)
    torch.manual_seed(12)
    again, other = fresh(1), fresh(2)
    assert all(torch.equal(one[name], again[name]) for name in one)
    down = [name for name in one if ".lora_A." in name]
    assert all(not torch.equal(one[name], other[name]) for name in down)
    assert all(not one[name].any() for name in one if ".lora_B." in name)
    # Deviation 1 / rank over some thousand draws.
    assert abs(torch.cat([one[name].flatten() for name in down]).std().item() - 1 / 3) < 0.03


def test_adapter_of_a_bfloat16_base_is_float32(flux_folder: Path) -> None:
    model = load_flow_model(flux_folder, dtype="bfloat16")
    parameters = attach_lora(model, rank=2, alpha=2, seed=1)
    assert {p.dtype for p in parameters} == {torch.float32}
    train_a_little(parameters)
    assert velocity(model).dtype == torch.bfloat16


def test_state_round_trip_and_names_are_pefts(flux_folder: Path) -> None:
    from peft import get_peft_model_state_dict

    model = load_flow_model(flux_folder)
    parameters = attach_lora(model, rank=2, alpha=2, targets="all-linear", seed=1)
    train_a_little(parameters)
    state, trained = lora_state(model), velocity(model)
    official = get_peft_model_state_dict(model.transformer, adapter_name="default")
    assert official.keys() == state.keys() and all(torch.equal(official[k], state[k]) for k in state)
    train_a_little(parameters)
    assert not torch.equal(velocity(model), trained)
    load_lora_state(model, state)
    assert torch.equal(velocity(model), trained)


def test_wrong_state_targets_and_order_are_refused(flux_folder: Path) -> None:
    model = load_flow_model(flux_folder)
    with pytest.raises(UserError, match="no adapter"):
        lora_state(model)
    with pytest.raises(UserError, match=r"names attn\.to_qq, but .* did you mean `attn\.to_q`\?"):
        attach_lora(model, rank=2, alpha=2, targets=["attn.to_qq"])
    attach_lora(model, rank=2, alpha=2, targets=["attn.to_q"])
    with pytest.raises(UserError, match="has an adapter already"):
        attach_lora(model, rank=2, alpha=2)
    state = lora_state(model)
    name = next(iter(state))
    with pytest.raises(StoreError, match="1 layers differ"):
        load_lora_state(model, {key: value for key, value in state.items() if key != name})
    with pytest.raises(StoreError, match="1 layers differ"):
        load_lora_state(model, {**state, name: state[name][:1]})


def test_wrapped_transformer_keeps_its_adapter_names(flux_folder: Path, one_process: None) -> None:
    model = load_flow_model(flux_folder)
    attach_lora(model, rank=2, alpha=2, targets=["attn.to_q"], seed=1)
    plain = lora_state(model)
    model.transformer = nn.parallel.DistributedDataParallel(model.transformer)
    assert lora_state(model).keys() == plain.keys()


@pytest.mark.parametrize(("rate", "ceiling", "update", "decay"), [(0.001, 0.5, 1, 0.001), (0.2, 0.5, 4, 0.5)])
def test_decay_of_the_average(rate: float, ceiling: float, update: int, decay: float) -> None:
    assert math.isclose(Ema([], rate, ceiling).decay(update), decay)


def test_average_by_hand() -> None:
    """rate 0.2, ceiling 0.5: start 0; 1 at eta 0.2 -> 0.8; 2 at 0.4 -> 0.32 + 1.2 = 1.52; 3 at 0.5 -> 0.76 + 1.5."""
    parameter = nn.Parameter(torch.zeros(2))
    ema = Ema([parameter], 0.2, 0.5)
    for value, expected in [(1.0, 0.8), (2.0, 1.52), (3.0, 2.26)]:
        with torch.no_grad():
            parameter.fill_(value)
        ema.update()
        with ema.applied():
            torch.testing.assert_close(parameter.detach(), torch.full((2,), expected))
        assert parameter.tolist() == [value, value]


def test_average_is_restored_from_its_state_and_after_errors() -> None:
    def walk(ema: Ema, parameter: nn.Parameter, values: list[float]) -> None:
        for value in values:
            with torch.no_grad():
                parameter.fill_(value)
            ema.update()

    make: Callable[[], nn.Parameter] = lambda: nn.Parameter(torch.ones(3))  # noqa: E731
    one, two = make(), make()
    straight, resumed = Ema([one], 0.1, 0.5), Ema([two], 0.1, 0.5)
    walk(straight, one, [1.0, 5.0])
    resumed.load(straight.state())
    walk(straight, one, [7.0, 2.0])
    walk(resumed, two, [7.0, 2.0])
    assert all(torch.equal(a, b) for a, b in zip(straight.state().values(), resumed.state().values(), strict=True))
    with pytest.raises(KeyError), resumed.applied():
        raise KeyError
    assert two.tolist() == [2.0] * 3
    with pytest.raises(StoreError, match="stored average does not fit"):
        Ema([nn.Parameter(torch.ones(4))], 0.1, 0.5).load(straight.state())
