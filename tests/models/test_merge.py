"""Merging an adapter into a copy of its pipeline: which files change, by how much, and which are refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from gdro_cli.errors import Interrupted, PrerequisiteError, UserError
from gdro_cli.files import new_folder
from gdro_cli.models.adapters import attach_lora, save_lora
from gdro_cli.models.diffusers_flow import load_flow_model
from gdro_cli.models.folder import PipelineFolder
from gdro_cli.models.lora_files import read_adapter
from gdro_cli.models.merge import merge_into

WEIGHTS = "diffusion_pytorch_model.safetensors"
LAYERS = ("transformer_blocks.0.attn.to_q", "x_embedder")


@pytest.fixture(scope="module")
def adapter_file(flux_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    model = load_flow_model(flux_folder)
    generator = torch.Generator().manual_seed(5)
    for parameter in attach_lora(model, rank=2, alpha=6, targets=LAYERS, rslora=True, seed=1):
        parameter.data = torch.randn(parameter.shape, generator=generator)
    return save_lora(model, tmp_path_factory.mktemp("adapter"))


def expected(weight: torch.Tensor, adapter_file: Path, layer: str) -> torch.Tensor:
    tensors = load_file(adapter_file)
    down, up = (tensors[f"transformer.{layer}.lora_{side}.weight"] for side in "AB")
    return (weight.float() + 6 / 2**0.5 * (up @ down)).to(weight.dtype)


def sharded(source: Path, folder: Path, dtype: torch.dtype) -> Path:
    """A copy whose transformer is in two files of another dtype, with a variant and a licence beside."""
    shutil.copytree(source, folder)
    tensors = {name: value.to(dtype) for name, value in load_file(folder / "transformer" / WEIGHTS).items()}
    (folder / "transformer" / WEIGHTS).rename(folder / "transformer" / "diffusion_pytorch_model.fp16.safetensors")
    names = sorted(tensors)
    weight_map = {}
    for number, part in enumerate((names[::2], names[1::2]), start=1):
        file = f"diffusion_pytorch_model-0000{number}-of-00002.safetensors"
        save_file({name: tensors[name] for name in part}, folder / "transformer" / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(part, file)
    index = {"metadata": {}, "weight_map": weight_map}
    (folder / "transformer" / f"{WEIGHTS}.index.json").write_text(json.dumps(index))
    (folder / "LICENSE.md").write_text("terms")
    (folder / "README.md").write_text("the base's own card")
    return folder


def test_only_the_adapted_matrices_change_and_nothing_else(
    flux_folder: Path, adapter_file: Path, tmp_path: Path
) -> None:
    adapter = read_adapter(adapter_file)
    assert adapter.scales == dict.fromkeys(LAYERS, pytest.approx(6 / 2**0.5)) and adapter.pairs.keys() == set(LAYERS)
    merged = merge_into(PipelineFolder(flux_folder), adapter, tmp_path)
    assert merged.layers == 2 and merged.rounding < 1e-6
    names = {path.relative_to(flux_folder).as_posix() for path in flux_folder.rglob("*") if path.is_file()}
    assert {path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*") if path.is_file()} == names
    for name in names - {f"transformer/{WEIGHTS}"}:
        assert (tmp_path / name).read_bytes() == (flux_folder / name).read_bytes()
    base, after = (load_file(folder / "transformer" / WEIGHTS) for folder in (flux_folder, tmp_path))
    for name, weight in base.items():
        layer = name.removesuffix(".weight")
        merged_weight = expected(weight, adapter_file, layer) if layer in LAYERS and name != layer else weight
        assert torch.equal(after[name], merged_weight)
    with safe_open(tmp_path / "transformer" / WEIGHTS, "pt") as file:
        assert file.metadata() == {"format": "pt"}


def test_files_in_parts_keep_their_parts_and_their_dtype(flux_folder: Path, adapter_file: Path, tmp_path: Path) -> None:
    base = sharded(flux_folder, tmp_path / "base", torch.bfloat16)
    (tmp_path / "merged").mkdir()
    merged = merge_into(PipelineFolder(base), read_adapter(adapter_file), tmp_path / "merged")
    assert merged.layers == 2 and 1e-4 < merged.rounding < 0.01  # bfloat16 has 8 bits
    after = {path.name for path in (tmp_path / "merged" / "transformer").iterdir()}
    parts = {f"diffusion_pytorch_model-0000{number}-of-00002.safetensors" for number in (1, 2)}
    assert after == parts | {"config.json", f"{WEIGHTS}.index.json"}
    assert (tmp_path / "merged" / "LICENSE.md").read_text() == "terms"
    assert not (tmp_path / "merged" / "README.md").exists()
    before = {name: value for part in parts for name, value in load_file(base / "transformer" / part).items()}
    saved = {name: v for part in parts for name, v in load_file(tmp_path / "merged" / "transformer" / part).items()}
    for layer in LAYERS:
        assert torch.equal(saved[f"{layer}.weight"], expected(before[f"{layer}.weight"], adapter_file, layer))


def rewritten(source: Path, folder: Path, layer: str, change: str) -> PipelineFolder:
    shutil.copytree(source, folder)
    path = folder / "transformer" / WEIGHTS
    tensors = load_file(path)
    weight = tensors.pop(f"{layer}.weight")
    if change == "quantised":
        tensors[f"{layer}.weight"] = weight.to(torch.float8_e4m3fn)
    elif change == "shape":
        tensors[f"{layer}.weight"] = weight[:1].contiguous()
    path.unlink()
    if change != "no file":
        save_file(tensors, path)
    return PipelineFolder(folder)


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ("quantised", UserError, r"quantised weights \(float8_e4m3fn\)"),
        ("shape", PrerequisiteError, "another shape"),
        ("missing", PrerequisiteError, "lacks 1 layers of the adapter, such as x_embedder"),
        ("no file", PrerequisiteError, "fetch the whole pipeline folder"),
    ],
)
def test_another_base_is_refused(
    flux_folder: Path, adapter_file: Path, tmp_path: Path, change: str, error: type[Exception], words: str
) -> None:
    base = rewritten(flux_folder, tmp_path / "base", "x_embedder", change)
    (tmp_path / "merged").mkdir()
    with pytest.raises(error, match=words):
        merge_into(base, read_adapter(adapter_file), tmp_path / "merged")


def test_a_merge_can_be_stopped(flux_folder: Path, adapter_file: Path, tmp_path: Path) -> None:
    """It stops between two files or two matrices, and removes the unfinished copy."""
    base, adapter = PipelineFolder(flux_folder), read_adapter(adapter_file)
    calls: list[int] = []
    (tmp_path / "whole").mkdir()
    merge_into(base, adapter, tmp_path / "whole", check=lambda: calls.append(0))
    tensors = load_file(flux_folder / "transformer" / WEIGHTS)
    assert len(calls) == len(base.own_files()) + len(tensors)

    def stop() -> None:
        calls.pop()
        if len(calls) < 5:
            raise Interrupted("stopped")

    with pytest.raises(Interrupted), new_folder(tmp_path / "merged") as unfinished:
        merge_into(base, adapter, unfinished, check=stop)
    assert [path.name for path in tmp_path.iterdir()] == ["whole"]


def test_ctrl_c_inside_the_library_is_not_damage(flux_folder: Path, adapter_file: Path, tmp_path: Path) -> None:
    """The library raises an error of its own, as it does for a file without weights."""
    shutil.copytree(flux_folder, tmp_path / "base")
    (tmp_path / "base" / "transformer" / WEIGHTS).write_text("no weights")
    base, calls = PipelineFolder(tmp_path / "base"), iter(range(1000))
    before = list(base.own_files()).index(f"transformer/{WEIGHTS}")

    def stop() -> None:
        if next(calls) > before:
            raise Interrupted("stopped")

    with pytest.raises(Interrupted, match="stopped"):
        merge_into(base, read_adapter(adapter_file), tmp_path / "merged", check=stop)
