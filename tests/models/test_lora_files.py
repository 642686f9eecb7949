"""Adapter files of five tools: written, read back and loaded by the tools' own readers, layer by layer by value."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from gdro_cli.errors import GdroError, PrerequisiteError, StoreError, UserError
from gdro_cli.models.adapters import LORA_FILE, attach_lora, save_lora
from gdro_cli.models.diffusers_flow import load_flow_model
from gdro_cli.models.folder import PipelineFolder
from gdro_cli.models.lora_files import FORMATS, Adapter, Format, adapter_file, read_adapter
from gdro_cli.models.lora_files.original_names import from_original, to_original
from gdro_cli.models.merge import merge_into

FAMILIES = ("flux", "sd3", "qwen-image", "z-image", "flux2-klein")
RANK, ALPHA = 4, 6.0
SCALE = ALPHA / math.sqrt(RANK)
A, B = "lora_A.weight", "lora_B.weight"


@pytest.fixture(scope="module")
def folder_of(guided_folder: Path, family_folder: Callable[[str], Path]) -> Callable[[str], Path]:
    return lambda family: guided_folder if family == "flux" else family_folder(family)


def random_adapter(model: nn.Module, *, blocks_only: bool = False) -> Adapter:
    """An update of every linear layer, with ranks and scales that differ."""
    generator = torch.Generator().manual_seed(3)
    layers = [(name, layer) for name, layer in model.named_modules() if isinstance(layer, nn.Linear)]
    pairs, scales = {}, {}
    for number, (name, layer) in enumerate(layers):
        rank = 2 + number % 3
        down = torch.randn(rank, layer.in_features, generator=generator)
        if not blocks_only or ".0." in name or ".1." in name:
            pairs[name] = (down, torch.randn(layer.out_features, rank, generator=generator))
            scales[name] = 0.5 + number % 4
    return Adapter(pairs, scales)


def product(down: Tensor, up: Tensor, scale: float = 1.0) -> Tensor:
    """s B A; of a wide layer, s B A x for a few inputs x."""
    width = down.shape[1]
    if width <= 1024:
        return scale * (up @ down)
    return scale * (up @ (down @ torch.randn(width, 4, generator=torch.Generator().manual_seed(width))))


def updates(adapter: Adapter) -> dict[str, Tensor]:
    """Layer -> s B A."""
    return {layer: product(*pair, adapter.scales[layer]) for layer, pair in adapter.pairs.items()}


def products(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Layer -> B A of a file by diffusers' keys, as a reader sees it that knows no scale."""
    names = [name.removesuffix(f".{A}") for name in tensors if name.endswith(A)]
    assert len(tensors) == 2 * len(names)
    return {
        name.removeprefix("transformer."): product(tensors[f"{name}.{A}"], tensors[f"{name}.{B}"]) for name in names
    }


def assert_equal(one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> None:
    assert one.keys() == other.keys()
    for layer, update in one.items():
        torch.testing.assert_close(other[layer], update, rtol=1e-5, atol=1e-5 * float(update.abs().max()))


def loaded_updates(transformer: nn.Module) -> dict[str, Tensor]:
    """What peft's layers add to the weights, as peft computes it."""
    from peft.tuners.lora import Linear

    found = {name: layer for name, layer in transformer.named_modules() if isinstance(layer, Linear)}
    (adapter,) = {name for layer in found.values() for name in layer.active_adapters}
    return {name: layer.get_delta_weight(adapter).detach() for name, layer in found.items()}


def pipeline(folder: Path) -> Any:
    from diffusers import DiffusionPipeline

    return DiffusionPipeline.from_pretrained(folder, dtype=torch.float32, local_files_only=True)


def written(adapter: Adapter, folder: Path, format: Format, family: str) -> Path:
    file = adapter_file(adapter, format, family=family, stem="mine")
    folder.mkdir(exist_ok=True)
    file.write(folder)
    assert file.size == sum(tensor.nbytes for tensor in load_file(folder / file.name).values())
    return folder / file.name


# -- every format, every family ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("format", FORMATS)
def test_each_format_holds_the_same_updates(
    format: Format, family: str, folder_of: Callable[[str], Path], tmp_path: Path
) -> None:
    model = PipelineFolder(folder_of(family)).meta_component("transformer")
    adapter = random_adapter(model, blocks_only=format == "kohya")
    file = written(adapter, tmp_path / "out", format, family)
    assert_equal(updates(adapter), updates(read_adapter(file)))
    assert_equal(updates(adapter), updates(read_adapter(file.parent)))


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("rslora", [False, True])
def test_a_reader_that_ignores_the_scale_gets_the_trained_strength(
    family: str, rslora: bool, folder_of: Callable[[str], Path], tmp_path: Path
) -> None:
    """From a run's own file, whose scale is not 1, to a file whose B A are the updates."""
    model = load_flow_model(folder_of(family))
    generator = torch.Generator().manual_seed(5)
    for parameter in attach_lora(model, rank=RANK, alpha=ALPHA, rslora=rslora, seed=1):
        parameter.data = torch.randn(parameter.shape, generator=generator)
    adapter = read_adapter(save_lora(model, tmp_path / "run"))
    scale = SCALE if rslora else ALPHA / RANK
    own = products(load_file(tmp_path / "run" / LORA_FILE))
    expected = {layer: scale * update for layer, update in own.items()}
    assert_equal(expected, updates(adapter))
    tensors = load_file(written(adapter, tmp_path / "diffusers", "diffusers", family))
    assert_equal(expected, products(tensors))
    pipe = pipeline(folder_of(family))
    pipe.load_lora_weights(tensors)  # without the metadata
    assert_equal(expected, loaded_updates(pipe.transformer))


@pytest.mark.parametrize("family", FAMILIES)
def test_diffusers_loads_its_own_format_and_comfyui_s(
    family: str, folder_of: Callable[[str], Path], tmp_path: Path
) -> None:
    for format in ("diffusers", "comfyui"):
        pipe = pipeline(folder_of(family))
        adapter = random_adapter(pipe.transformer)
        file = written(adapter, tmp_path / format, format, family)
        pipe.load_lora_weights(file.parent, weight_name=file.name)
        expected = updates(adapter)
        if format == "comfyui" and family == "flux2-klein":  # diffusers does not swap the halves of this layer
            expected["norm_out.linear"] = expected["norm_out.linear"].roll(32, 0)
        assert_equal(expected, loaded_updates(pipe.transformer))


@pytest.mark.parametrize("family", ["flux", "z-image"])
def test_peft_and_diffusers_load_peft_s_format(family: str, folder_of: Callable[[str], Path], tmp_path: Path) -> None:
    from peft import PeftModel

    adapter = random_adapter(PipelineFolder(folder_of(family)).meta_component("transformer"))
    file = written(adapter, tmp_path / "peft", "peft", family)
    wrapped = PeftModel.from_pretrained(pipeline(folder_of(family)).transformer, file.parent)
    assert_equal(updates(adapter), loaded_updates(wrapped.base_model.model))
    transformer = pipeline(folder_of(family)).transformer
    transformer.load_lora_adapter(file.parent, weight_name=file.name, prefix="base_model.model")
    assert_equal(updates(adapter), loaded_updates(transformer))


@pytest.mark.parametrize("family", ["qwen-image", "z-image", "flux2-klein"])
def test_diffusers_loads_kohya_s_format(family: str, folder_of: Callable[[str], Path], tmp_path: Path) -> None:
    pipe = pipeline(folder_of(family))
    adapter = random_adapter(pipe.transformer, blocks_only=True)
    file = written(adapter, tmp_path / "kohya", "kohya", family)
    pipe.load_lora_weights(file.parent, weight_name=file.name)
    assert_equal(updates(adapter), loaded_updates(pipe.transformer))


def published_flux() -> nn.Module:
    """FLUX.1's own width, which diffusers' converters take for granted; shapes without numbers."""
    from diffusers import FluxTransformer2DModel

    with torch.device("meta"):
        return FluxTransformer2DModel(num_layers=1, num_single_layers=1, guidance_embeds=True)


def test_diffusers_converts_kohya_s_flux(tmp_path: Path) -> None:
    from diffusers import FluxPipeline

    adapter = random_adapter(published_flux(), blocks_only=True)
    tensors = load_file(written(adapter, tmp_path / "kohya", "kohya", "flux"))
    assert_equal(updates(adapter), products(FluxPipeline.lora_state_dict(tensors)))


class Checkpoint(dict[str, Tensor]):
    """A checkpoint that has the tensors which an adapter does not touch, such as biases and norms."""

    def pop(self, key: str, default: Any = None) -> Tensor:
        size = 7 * 3072 if "linear1" in key else 6
        return super().pop(key) if key in self else torch.zeros(size)


@pytest.mark.parametrize("family", ["flux", "sd3", "flux2-klein", "z-image"])
def test_original_names_are_those_of_the_published_weights(family: str, folder_of: Callable[[str], Path]) -> None:
    """diffusers' converters of whole checkpoints take each B for the weight, and say which rows are whose."""
    from diffusers.loaders import single_file_utils as converters

    tiny = PipelineFolder(folder_of(family)).meta_component("transformer")
    adapter = random_adapter(published_flux() if family == "flux" else tiny)
    original = to_original(adapter.folded(), family)
    checkpoint = Checkpoint({f"{name}.weight": up for name, (_, up) in original.items()})
    convert: Any = {
        "flux": converters.convert_flux_transformer_checkpoint_to_diffusers,
        "sd3": converters.convert_sd3_transformer_checkpoint_to_diffusers,
        "flux2-klein": converters.convert_flux2_transformer_checkpoint_to_diffusers,
        "z-image": converters.convert_z_image_transformer_checkpoint_to_diffusers,
    }[family]
    ups = convert(checkpoint)
    downs = {
        layer: down
        for name, (down, up) in original.items()
        for layer in from_original(name, (down, torch.ones_like(up)), family) or ()
    }
    found = {layer: product(downs[layer], ups[f"{layer}.weight"]) for layer in adapter.pairs}
    assert_equal(updates(adapter), found)
