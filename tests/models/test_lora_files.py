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

FAMILIES = ("flux", "sd3", "qwen-image", "z-image", "flux2", "flux2-klein", "chroma", "hidream")
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
        rank = 2 + (number + 1) % 3  # FLUX's proj_out and its blocks' proj_out differ
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


@pytest.mark.parametrize("family", [*FAMILIES, "qwen-image-edit-plus"])
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


@pytest.mark.parametrize("family", [*FAMILIES, "flux-kontext"])
def test_diffusers_loads_its_own_format_and_comfyui_s(
    family: str, folder_of: Callable[[str], Path], tmp_path: Path
) -> None:
    formats: tuple[Format, ...] = ("diffusers", "comfyui")
    for format in formats[:1] if family == "chroma" else formats:  # diffusers does not know Chroma's original names
        pipe = pipeline(folder_of(family))
        adapter = random_adapter(pipe.transformer)
        file = written(adapter, tmp_path / format, format, family)
        pipe.load_lora_weights(file.parent, weight_name=file.name)
        expected = updates(adapter)
        if format == "comfyui" and family.startswith("flux2"):  # diffusers does not swap the halves of this layer
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


def published_chroma() -> nn.Module:
    """The same for Chroma."""
    from diffusers import ChromaTransformer2DModel

    with torch.device("meta"):
        return ChromaTransformer2DModel(num_layers=1, num_single_layers=1, approximator_layers=1)


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


@pytest.mark.parametrize("family", ["flux", "sd3", "flux2-klein", "z-image", "chroma", "hidream"])
def test_original_names_are_those_of_the_published_weights(family: str, folder_of: Callable[[str], Path]) -> None:
    """diffusers' converters of whole checkpoints take each B for the weight, and say which rows are whose."""
    from diffusers.loaders import single_file_utils as converters

    tiny = PipelineFolder(folder_of(family)).meta_component("transformer")
    published: Any = {"flux": published_flux, "chroma": published_chroma}
    adapter = random_adapter(published.get(family, lambda: tiny)())
    original = to_original(adapter.folded(), family)
    checkpoint = Checkpoint({f"{name}.weight": up for name, (_, up) in original.items()})
    convert: Any = {
        "flux": converters.convert_flux_transformer_checkpoint_to_diffusers,
        "sd3": converters.convert_sd3_transformer_checkpoint_to_diffusers,
        "flux2-klein": converters.convert_flux2_transformer_checkpoint_to_diffusers,
        "z-image": converters.convert_z_image_transformer_checkpoint_to_diffusers,
        "chroma": converters.convert_chroma_transformer_checkpoint_to_diffusers,
        "hidream": converters.convert_hidream_transformer_to_diffusers,
    }[family]
    ups = convert(checkpoint)
    downs = {
        layer: down
        for name, (down, up) in original.items()
        for layer in from_original(name, (down, torch.ones_like(up)), family) or ()
    }
    found = {layer: product(downs[layer], ups[f"{layer}.weight"]) for layer in adapter.pairs}
    assert_equal(updates(adapter), found)


# -- files of other tools ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rslora", [False, True])
def test_peft_s_own_folder_with_patterns_is_read(
    rslora: bool, folder_of: Callable[[str], Path], tmp_path: Path
) -> None:
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(
        r=4,
        lora_alpha=6,
        use_rslora=rslora,
        target_modules=["attention.to_q", "attention.to_k", "feed_forward.w1"],
        rank_pattern={"to_k": 3},
        alpha_pattern={"layers.1.attention.to_q": 2, "feed_forward.w1": 5},
        init_lora_weights=False,
    )
    wrapped = get_peft_model(pipeline(folder_of("z-image")).transformer, config)
    wrapped.save_pretrained(tmp_path)
    adapter = read_adapter(tmp_path)
    assert_equal(loaded_updates(wrapped.base_model.model), updates(adapter))
    assert len(set(adapter.scales.values())) == 4


def test_diffusers_own_file_is_read(folder_of: Callable[[str], Path], tmp_path: Path) -> None:
    from diffusers import StableDiffusion3Pipeline
    from diffusers.training_utils import _collate_lora_metadata
    from peft import LoraConfig
    from peft.utils import get_peft_model_state_dict

    transformer = pipeline(folder_of("sd3")).transformer
    transformer.add_adapter(
        LoraConfig(r=4, lora_alpha=10, target_modules=["attn.to_q", "attn2.to_v"], init_lora_weights=False)
    )
    StableDiffusion3Pipeline.save_lora_weights(
        tmp_path, get_peft_model_state_dict(transformer), **_collate_lora_metadata({"transformer": transformer})
    )
    adapter = read_adapter(tmp_path)
    assert_equal(loaded_updates(transformer), updates(adapter))
    assert set(adapter.scales.values()) == {2.5}


def saved(path: Path, tensors: Mapping[str, Tensor], metadata: dict[str, str] | None = None) -> Path:
    save_file({name: tensor.clone() for name, tensor in tensors.items()}, path, metadata=metadata)
    return path


def random(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))


def test_a_joined_layer_of_a_foreign_file_is_split_by_rows(tmp_path: Path) -> None:
    """A dense B with one A for q, k and v; alpha over the joined rank, and no alpha for the other layer."""
    down, up, wide = random(3, 8), random(24, 3), random(56, 3)
    name = "lora_unet_double_blocks_7_txt_attn_qkv"
    kohya = {f"{name}.lora_down.weight": down, f"{name}.lora_up.weight": up, f"{name}.alpha": torch.tensor(1.5)}
    original = {
        "diffusion_model.double_blocks.7.txt_attn.qkv.lora_A.weight": down,
        "diffusion_model.double_blocks.7.txt_attn.qkv.lora_B.weight": up,
        "diffusion_model.single_blocks.3.linear1.lora_A.weight": down,
        "diffusion_model.single_blocks.3.linear1.lora_B.weight": wide,
    }
    block, single = "transformer_blocks.7.attn", "single_transformer_blocks.3"
    attention = {f"{block}.add_{part}_proj": up[8 * n : 8 * n + 8] @ down for n, part in enumerate("qkv")}
    found = read_adapter(saved(tmp_path / "kohya.safetensors", kohya))
    assert set(found.scales.values()) == {0.5}
    assert_equal({layer: 0.5 * update for layer, update in attention.items()}, updates(found))
    parts = {f"{single}.attn.to_{part}": wide[8 * n : 8 * n + 8] @ down for n, part in enumerate("qkv")}
    found = read_adapter(saved(tmp_path / "original.safetensors", original))
    assert set(found.scales.values()) == {1.0}
    assert_equal(attention | parts | {f"{single}.proj_mlp": wide[24:] @ down}, updates(found))


def test_a_joined_layer_before_its_first_step_keeps_all_parts_and_can_be_written(tmp_path: Path) -> None:
    """B is zero, so nothing says which parts are adapted."""
    name = "diffusion_model.double_blocks.0.img_attn.qkv"
    tensors = {f"{name}.{A}": random(3, 8), f"{name}.{B}": torch.zeros(24, 3)}
    adapter = read_adapter(saved(tmp_path / "original.safetensors", tensors))
    assert [len(down) for down, _ in adapter.pairs.values()] == [3, 3, 3]
    assert_equal(updates(adapter), updates(read_adapter(written(adapter, tmp_path / "out", "diffusers", "flux"))))


def test_one_file_of_a_folder_and_names_without_a_prefix_are_read(tmp_path: Path) -> None:
    """As of Qwen-Image's published distillations."""
    layer = "transformer_blocks.0.img_mod.1"
    tensors = {f"{layer}.lora_down.weight": random(2, 4), f"{layer}.lora_up.weight": random(24, 2)}
    saved(tmp_path / "lightning.safetensors", tensors | {f"{layer}.alpha": torch.tensor(1.0)})
    adapter = read_adapter(tmp_path)
    assert adapter.scales == {layer: 0.5} and adapter.pairs[layer][1].shape == (24, 2)


@pytest.mark.parametrize(("layer", "rows"), [("double_blocks.0.img_mlp.2", 8), ("single_blocks.0.linear1", 56)])
def test_original_names_with_peft_s_prefix_need_no_configuration(layer: str, rows: int, tmp_path: Path) -> None:
    """As hosted trainers write FLUX's; a configuration that lies beside the file counts."""
    name = f"base_model.model.{layer}"
    file = saved(tmp_path / "trained.safetensors", {f"{name}.{A}": random(2, 8), f"{name}.{B}": random(rows, 2)})
    assert set(read_adapter(file).scales.values()) == {1.0}
    (tmp_path / "adapter_config.json").write_text('{"lora_alpha": 6}')
    assert set(read_adapter(file).scales.values()) == {3.0}


def test_z_image_s_joined_attention_is_read(tmp_path: Path) -> None:
    down, up = random(2, 4), random(12, 2)
    for block, dot in (("lora_unet_layers_1", "_"), ("diffusion_model.layers.1", ".")):
        name, out = (f"{block}{dot}attention{dot}{part}" for part in ("qkv", "out"))
        tensors = {f"{name}.lora_down.weight": down, f"{name}.lora_up.weight": up}
        tensors |= {f"{out}.lora_down.weight": down, f"{out}.lora_up.weight": up[:4]}
        expected = {f"layers.1.attention.to_{part}": up[4 * n : 4 * n + 4] @ down for n, part in enumerate("qkv")}
        expected["layers.1.attention.to_out.0"] = up[:4] @ down
        assert_equal(expected, updates(read_adapter(saved(tmp_path / "one.safetensors", tensors))))


# -- what a format cannot hold ----------------------------------------------------------------------------------------


def test_the_rows_of_parts_that_are_not_adapted_are_zero(tmp_path: Path) -> None:
    layer = "transformer_blocks.0.attn.to_k"
    adapter = Adapter({layer: (random(2, 4), random(4, 2))}, {layer: 3.0})
    for family, name in (("flux", "double_blocks_0_img_attn"), ("sd3", "joint_blocks_0_x_block_attn")):
        file = written(adapter, tmp_path / family, "kohya", family)
        tensors = load_file(file)
        up = tensors[f"lora_unet_{name}_qkv.lora_up.weight"]
        assert up.shape == (12, 2) and not up[:4].any() and not up[8:].any()
        assert tensors[f"lora_unet_{name}_qkv.alpha"] == 2
        assert_equal(updates(adapter), updates(read_adapter(file)))


@pytest.mark.parametrize("family", ["lumina2", "sana"])
def test_formats_with_original_names_are_refused_where_those_are_not_known(family: str) -> None:
    layer = "layers.0.attn.to_q"
    adapter = Adapter({layer: (random(2, 4), random(4, 2))}, {layer: 1.0})
    for format in ("comfyui", "kohya"):
        with pytest.raises(
            UserError, match="no place for 1 of the adapter's 1 layers, such as layers.0.attn.to_q: exp"
        ):
            adapter_file(adapter, format, family=family, stem="mine")


def test_layers_that_kohya_s_tools_do_not_adapt_are_named() -> None:
    layers = ("x_embedder", "transformer_blocks.0.attn.to_q", "proj_out")
    adapter = Adapter({layer: (random(2, 4), random(4, 2)) for layer in layers}, dict.fromkeys(layers, 1.0))
    with pytest.raises(UserError, match="no place for 2 of the adapter's 3 layers, such as x_embedder: export with"):
        adapter_file(adapter, "kohya", family="flux", stem="mine")
    assert len(adapter_file(adapter, "comfyui", family="flux", stem="mine").tensors) == 6
    odd = Adapter({layers[1]: (random(2, 4), random(6, 2))}, {layers[1]: 1.0})
    with pytest.raises(UserError, match="which have other shapes in this model: export with"):
        adapter_file(odd, "kohya", family="flux", stem="mine")


@pytest.mark.parametrize(
    ("family", "layer", "key"),
    [
        ("flux", "single_transformer_blocks.12.proj_out", "lora_unet_single_blocks_12_linear2"),
        ("flux", "transformer_blocks.3.ff.net.0.proj", "lora_unet_double_blocks_3_img_mlp_0"),
        ("sd3", "transformer_blocks.3.attn2.to_out.0", "lora_unet_joint_blocks_3_x_block_attn2_proj"),
        ("qwen-image", "transformer_blocks.3.attn.to_q", "lora_unet_transformer_blocks_3_attn_to_q"),
        ("z-image", "layers.3.attention.to_out.0", "lora_unet_layers_3_attention_to_out_0"),
        ("flux2-klein", "single_transformer_blocks.3.attn.to_out", "lora_unet_single_blocks_3_linear2"),
    ],
)
def test_kohya_s_keys(family: str, layer: str, key: str) -> None:
    adapter = Adapter({layer: (random(2, 4), random(4, 2))}, {layer: 1.0})
    file = adapter_file(adapter, "kohya", family=family, stem="mine")
    assert file.name == "mine.safetensors"
    assert set(file.tensors) == {f"{key}.{end}" for end in ("lora_down.weight", "lora_up.weight", "alpha")}


# -- merging ----------------------------------------------------------------------------------------------------------


def test_a_merge_takes_each_layer_s_own_scale(folder_of: Callable[[str], Path], tmp_path: Path) -> None:
    base = PipelineFolder(folder_of("z-image"))
    adapter = random_adapter(base.meta_component("transformer"))
    assert merge_into(base, adapter, tmp_path).layers == len(adapter.pairs)
    weights = "transformer/diffusion_pytorch_model.safetensors"
    before, after = (load_file(folder / weights) for folder in (folder_of("z-image"), tmp_path))
    for layer, update in updates(adapter).items():
        torch.testing.assert_close(after[f"{layer}.weight"], before[f"{layer}.weight"] + update)


# -- bad files --------------------------------------------------------------------------------------------------------

GOOD = {f"transformer.x.{A}": torch.ones(2, 4), f"transformer.x.{B}": torch.ones(3, 2)}
PEFT = {name.replace("transformer.", "base_model.model."): tensor for name, tensor in GOOD.items()}
TWICE = {name.removeprefix("transformer."): tensor for name, tensor in GOOD.items()}
UNKNOWN = {"lora_unet_double_blocks_0_x.lora_down.weight": GOOD[f"transformer.x.{A}"]}
UNKNOWN |= {"lora_unet_double_blocks_0_x.lora_up.weight": GOOD[f"transformer.x.{B}"]}
JOINED = {"lora_unet_joint_blocks_0_x_block_attn_qkv.lora_down.weight": torch.ones(2, 4)}
JOINED |= {"lora_unet_joint_blocks_0_x_block_attn_qkv.lora_up.weight": torch.ones(11, 2)}


@pytest.mark.parametrize(
    ("tensors", "error", "words"),
    [
        ({}, UserError, "is not an adapter (it is empty)"),
        ({"img_in.weight": torch.ones(2, 2)}, UserError, "is not an adapter (it has img_in.weight)"),
        (GOOD | {"transformer.y.lokr_w1": torch.ones(2, 2)}, UserError, "is a LoKr adapter: only LoRA"),
        (GOOD | {"transformer.x.dora_scale": torch.ones(3)}, UserError, "is a DoRA adapter"),
        (GOOD | {"lora_te1_text_model_x.alpha": torch.ones(())}, UserError, "text encoders, with 1 of its 3 tensors"),
        (GOOD | {f"text_encoder.x.{A}": torch.ones(2, 2)}, UserError, "of its 3 tensors, such as text_"),
        (GOOD | {"transformer.x.diff_b": torch.ones(3)}, UserError, "has 1 tensors beside the LoRA's, such as"),
        (UNKNOWN, UserError, "names a layer that gdro_cli does not know, lora_unet_double_blocks_0_x"),
        (JOINED, StoreError, "joint_blocks_0_x_block_attn_qkv has 11 rows"),
        (GOOD | {f"transformer.x.{A}": torch.ones(2, 4, 1, 1)}, UserError, "adapts the convolution transformer.x"),
        ({f"transformer.x.{A}": torch.ones(2, 4)}, StoreError, "transformer.x lacks A or B"),
        (GOOD | {f"transformer.x.{B}": torch.ones(3, 3)}, StoreError, "A and B of transformer.x do not fit"),
        (GOOD | {"transformer.x.alpha": torch.tensor(math.inf)}, StoreError, "transformer.x has the scale inf"),
        (GOOD | {"transformer.x.alpha": torch.ones(2)}, StoreError, "transformer.x.alpha is not a number"),
        (GOOD | TWICE, StoreError, "x is in it twice"),
        (GOOD | {f"transformer.x.{A}": torch.full((2, 4), math.nan)}, StoreError, "x has numbers that are not finite"),
        (GOOD | {f"transformer.x.{B}": torch.full((3, 2), math.inf)}, StoreError, "x has numbers that are not finite"),
        (PEFT, PrerequisiteError, "has no adapter_config.json beside it"),
    ],
)  # fmt: skip
def test_what_is_not_a_lora_of_a_transformer_is_one_sentence(
    tensors: dict[str, Tensor], error: type[GdroError], words: str, tmp_path: Path
) -> None:
    file = saved(tmp_path / "file.safetensors", tensors)
    with pytest.raises(error) as refused:
        read_adapter(file)
    assert str(refused.value).startswith(str(file)) and words in str(refused.value)


@pytest.mark.parametrize(
    ("config", "error", "words"),
    [
        ({"peft_type": "LOHA"}, UserError, "is a LOHA adapter"),
        ({"lora_alpha": 4, "use_dora": True}, UserError, "is a DoRA adapter"),
        ({"lora_alpha": 4, "init_lora_weights": "pissa_niter_4"}, UserError, "began from pissa_niter_4"),
        ({"r": 2}, StoreError, "base_model.model.x: 'lora_alpha'"),
        ({"lora_alpha": "four"}, StoreError, "could not convert"),
        ({"lora_alpha": 4, "alpha_pattern": ["x"]}, StoreError, "has no attribute 'get'"),
        ({"lora_alpha": 4, "alpha_pattern": {"(": 1}}, StoreError, "unterminated"),
    ],
)
def test_configurations_without_a_plain_scale_are_one_sentence(
    config: dict[str, Any], error: type[GdroError], words: str, tmp_path: Path
) -> None:
    """The same in peft's file and in diffusers' metadata."""
    file = saved(tmp_path / "peft.safetensors", PEFT)
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    stored = json.dumps({f"transformer.{key}": value for key, value in config.items()})
    metadata = saved(tmp_path / "diffusers.safetensors", GOOD, {"lora_adapter_metadata": stored})
    for one, same in ((file, words), (metadata, words.replace("base_model.model", "transformer"))):
        with pytest.raises(error) as refused:
            read_adapter(one)
        assert str(refused.value).startswith(str(one)) and same in str(refused.value)


def test_a_folder_without_one_adapter_and_an_absent_file_are_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(PrerequisiteError, match="contains no adapter file: name the file"):
        read_adapter(tmp_path)
    for name in ("one", "two"):
        saved(tmp_path / f"{name}.safetensors", GOOD)
    with pytest.raises(PrerequisiteError, match="contains 2 adapter files: name the file"):
        read_adapter(tmp_path)
    with pytest.raises(PrerequisiteError, match="there is no adapter .*absent"):
        read_adapter(tmp_path / "absent")
    (tmp_path / "text").write_text("no")
    with pytest.raises(StoreError, match="text is not an adapter that can be used"):
        read_adapter(tmp_path / "text")
    (tmp_path / "adapter_config.json").write_text("{")
    with pytest.raises(StoreError, match="adapter_config.json is damaged"):
        read_adapter(saved(tmp_path / "one.safetensors", PEFT))
    damaged = saved(tmp_path / "two.safetensors", GOOD, {"lora_adapter_metadata": "["})
    with pytest.raises(StoreError, match="its lora_adapter_metadata cannot be read"):
        read_adapter(damaged)
