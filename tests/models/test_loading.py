"""Opening pipeline folders: identity, refusal of foreign code, and one clear sentence if something is missing."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from gdro_cli import files, model_source
from gdro_cli.errors import PrerequisiteError, UserError
from gdro_cli.models.diffusers_flow import load_flow_model
from gdro_cli.models.folder import PipelineFolder
from gdro_cli.stages.setup.session import Session
from gdro_cli.tiny.autoencoder import PatchAutoencoder


@pytest.fixture
def copy(flux_folder: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(flux_folder, tmp_path / "copy"))


def edit_index(folder: Path, **entries: Any) -> None:
    path = folder / "model_index.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | entries))


def test_identity_is_a_digest_of_the_bytes(flux_folder: Path, copy: Path) -> None:
    original, copied = load_flow_model(flux_folder).identity, load_flow_model(copy).identity
    assert original["pipeline"] == "FluxPipeline" and original["path"] == str(flux_folder)
    assert original["components"]["transformer"] == "FluxTransformer2DModel"
    assert original["digest"] == copied["digest"] and len(original["digest"]) == 64
    weights = copy / "transformer" / "diffusion_pytorch_model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    assert load_flow_model(copy).identity["digest"] != original["digest"]


def test_a_large_file_is_read_again_only_when_it_has_changed(
    copy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read: list[str] = []

    def sha256_file(path: Path) -> str:
        read.append(path.name)
        return files.sha256_file(path)

    def digest() -> object:
        read.clear()
        return PipelineFolder(copy).identity["digest"]

    monkeypatch.setattr(model_source, "sha256_file", sha256_file)
    expected = digest()
    assert len(read) == len(PipelineFolder(copy).files())  # small files are always read
    monkeypatch.setattr(model_source, "_REMEMBERED_FROM", 1)
    monkeypatch.setenv("GDRO_CACHE", str(tmp_path / "cache"))
    assert (digest(), digest()) == (expected, expected) and read  # the files are newer than a clock tick
    monkeypatch.setattr(model_source, "_CLOCK_TICK", -(10**9))
    assert digest() == expected and read
    assert digest() == expected and not read

    weights = copy / "vae" / "diffusion_pytorch_model.safetensors"
    before, data = weights.stat(), bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    os.utime(weights, ns=(before.st_atime_ns, before.st_mtime_ns))
    changed = digest()
    assert changed != expected and read == [weights.name]

    for note in (tmp_path / "cache" / "digests").iterdir():
        note.write_text('{"stamp": 1}')
    assert digest() == changed and read
    (tmp_path / "file").touch()
    monkeypatch.setenv("GDRO_CACHE", str(tmp_path / "file"))  # nothing can be written below it
    assert digest() == changed and read


@pytest.mark.parametrize("name", ["transformer", "text_encoder", "text_encoder_2", "vae"])
def test_weights_stay_in_their_files_until_they_move_to_a_gpu(name: str, flux_folder: Path) -> None:
    """So the processes of a machine share them. A weight has one copy in memory if its file has another dtype."""
    module = PipelineFolder(flux_folder).load(name, dtype=torch.float32)
    lines = [line.split(maxsplit=5) for line in Path("/proc/self/maps").read_text().splitlines()]
    files = [fields[0].split("-") for fields in lines if fields[-1].endswith(".safetensors")]
    inside = [
        any(int(start, 16) <= parameter.data_ptr() < int(end, 16) for start, end in files)
        for parameter in module.parameters()
    ]
    assert inside and all(inside)


def test_default_size_is_the_autoencoders(flux_folder: Path) -> None:
    assert load_flow_model(flux_folder).default_size == (64, 64)


def test_own_modules_are_loaded_and_foreign_ones_refused(copy: Path) -> None:
    edit_index(copy, vae=["gdro_cli.tiny.autoencoder", "PatchAutoencoder"])
    assert PipelineFolder(copy).component_class("vae") is PatchAutoencoder
    edit_index(copy, vae=["gdro_cli.errors", "GdroError"])
    with pytest.raises(UserError, match=r"GdroError for vae, which is not a ModelMixin"):
        PipelineFolder(copy).component_class("vae")
    edit_index(copy, vae=["os", "system"])
    with pytest.raises(UserError, match=r"names os\.system for vae"):
        PipelineFolder(copy).component_class("vae")
    edit_index(copy, vae=["diffusers", "NoSuchAutoencoder"])
    with pytest.raises(PrerequisiteError, match="NoSuchAutoencoder for vae, which the installed diffusers lacks"):
        PipelineFolder(copy).component_class("vae")


def test_unknown_pipeline_is_refused_with_the_known_ones(copy: Path) -> None:
    edit_index(copy, _class_name="StableDiffusionPipeline")
    with pytest.raises(UserError, match="which is not supported: choose one of ChromaPipeline, FluxPipeline"):
        load_flow_model(copy)


def test_missing_folder_and_missing_index(tmp_path: Path) -> None:
    with pytest.raises(PrerequisiteError, match=r"nowhere does not exist: set model\.path"):
        load_flow_model(tmp_path / "nowhere")
    with pytest.raises(PrerequisiteError, match=r"model_index\.json of model .* is missing"):
        load_flow_model(tmp_path)


def test_model_of_the_hub_without_a_network(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(PrerequisiteError, match=r"owner/missing is neither .*`hf download owner/missing --local-dir"):
        load_flow_model("owner/missing")


@pytest.mark.parametrize(
    ("repo", "licence"),
    [
        ("black-forest-labs/FLUX.1-dev", True),
        ("stabilityai/stable-diffusion-3.5-medium", True),
        ("Qwen/Qwen-Image", False),
    ],
)
def test_missing_weights_say_what_to_fetch_and_where_a_licence_comes_first(
    repo: str, licence: bool, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Through the sample stage, as a user would see it."""
    from huggingface_hub import constants

    from gdro_cli.config.load import load_recipe
    from gdro_cli.runtime.progress import Reporter
    from gdro_cli.stages.sampling import sample

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    recipe = load_recipe("smoke", overrides=[f"model.path={repo}"])
    with pytest.raises(PrerequisiteError) as caught:
        sample.run(Session(recipe, tmp_path, Reporter(quiet=True)))
    message = str(caught.value)
    assert f"`hf download {repo}`" in message and f"`hf download {repo} --local-dir FOLDER`" in message
    assert "set model.path=FOLDER" in message and "\n" not in message
    assert (f"accept its licence at https://huggingface.co/{repo}" in message) == licence


def test_broken_components_are_named(copy: Path) -> None:
    weights = copy / "transformer" / "diffusion_pytorch_model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[:-100])
    with pytest.raises(PrerequisiteError, match="component transformer of model .* cannot be loaded"):
        _ = load_flow_model(copy).transformer
    weights.unlink()
    with pytest.raises(PrerequisiteError, match="component transformer of model .* cannot be loaded"):
        _ = load_flow_model(copy).transformer
    weights.write_bytes(whole)
    edit_index(copy, text_encoder=[None, None])
    with pytest.raises(PrerequisiteError, match="has no component text_encoder: fetch the whole folder again"):
        load_flow_model(copy).encode(["a"])
    (copy / "vae" / "config.json").unlink()
    with pytest.raises(PrerequisiteError, match=r"vae/config\.json of model .* is missing: fetch the whole folder"):
        load_flow_model(copy)
