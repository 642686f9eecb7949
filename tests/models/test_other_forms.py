"""What people have instead of a pipeline folder: variants are read, everything else is named for what it is."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from gdro_cli.embedded import tiny_model_path
from gdro_cli.errors import PrerequisiteError, UserError
from gdro_cli.model_source import ModelSource
from gdro_cli.models.adapters import LORA_FILE, write_lora
from gdro_cli.models.diffusers_flow import load_flow_model
from gdro_cli.models.folder import PipelineFolder
from tests.support.faulty import check, command

NETWORKS = ("text_encoder", "text_encoder_2", "transformer", "vae")


def tensors(path: Path, *names: str) -> Path:
    save_file({name: torch.ones(2) for name in names}, path)
    return path


def folder(path: Path) -> Path:
    path.mkdir(parents=True)
    return path


def single_file(path: Path) -> Path:
    return tensors(path / "flux1-dev.safetensors", "double_blocks.0.img_attn.qkv.weight")


def only_a_checkpoint(path: Path) -> Path:
    return single_file(folder(path / "download")).parent


def adapter_file(path: Path) -> Path:
    return tensors(path / "style.safetensors", "transformer.blocks.0.to_q.lora_A.weight")


def adapter_folder(path: Path) -> Path:
    write_lora(path / "adapter" / LORA_FILE, {"transformer.to_q.lora_A.weight": torch.ones(2, 2)}, {"r": 2})
    return path / "adapter"


def peft_folder(path: Path) -> Path:
    adapter = folder(path / "peft")
    (adapter / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": "owner/base"}))
    tensors(adapter / "adapter_model.safetensors", "base_model.model.to_q.lora_A.weight")
    return adapter


def own_run(path: Path) -> Path:
    run = folder(path / "runs" / "ocr-0123456789ab")
    for name in ("manifest.json", "recipe.json"):
        (run / name).write_text("{}")
    return run


def component(path: Path) -> Path:
    return Path(shutil.copytree(tiny_model_path(), path / "pipeline")) / "transformer"


def another_model(path: Path) -> Path:
    (folder(path / "bert") / "config.json").write_text("{}")
    return path / "bert"


def cache_entry(path: Path) -> Path:
    return folder(path / "models--owner--name" / "snapshots").parent


def text_file(path: Path) -> Path:
    (path / "model.txt").write_text("FLUX")
    return path / "model.txt"


FORMS = {
    single_file: "which is a single file of weights: open it with diffusers",
    only_a_checkpoint: "which is a folder with flux1-dev.safetensors alone, a single file of weights: open it",
    adapter_file: "which is an adapter: load it into its base with diffusers",
    adapter_folder: "which is a folder with pytorch_lora_weights.safetensors alone, an adapter: load it into its base",
    peft_folder: "which is an adapter of peft for owner/base: load it into its base",
    own_run: "which is a run of gdro, which has no base: make a pipeline folder with `gdro export ",
    component: "which is one component of the pipeline ",
    another_model: "which is one component or a model of another kind: name the folder",
    cache_entry: "which is the Hub's cache of owner/name: name owner/name, or one of the folders in ",
    text_file: "which is a file, not a folder: name a pipeline folder",
}


@pytest.mark.parametrize("make", FORMS, ids=lambda make: make.__name__)
def test_a_model_path_that_is_something_else(make: type, tmp_path: Path) -> None:
    path = make(tmp_path)
    with pytest.raises(UserError) as caught:
        PipelineFolder(path)
    assert f"model.path names {path}, {FORMS[make]}" in str(caught.value) and "\n" not in str(caught.value)


def test_the_command_line_names_it(tmp_path: Path) -> None:
    done = command("train", "--recipe=smoke", f"--set=model.path={single_file(tmp_path)}", f"--out={tmp_path / 'out'}")
    check(done, 2, "which is a single file of weights")


def test_a_model_of_a_reward_that_is_a_file(tmp_path: Path) -> None:
    with pytest.raises(PrerequisiteError, match=r"reward\.clip\.model names the file .*: set it to the model's folder"):
        ModelSource(single_file(tmp_path), key="reward.clip.model")


# -- variants ---------------------------------------------------------------------------------------------------------


def make_variant(path: Path, *, parts: bool = False) -> Path:
    """The embedded model with half-precision weights alone, named as ``save_pretrained`` names a variant."""
    copy = Path(shutil.copytree(tiny_model_path(), path / "fp16"))
    for name in NETWORKS:
        (file,) = (copy / name).glob("*.safetensors")
        weights, base = load_file(file), file.stem
        file.unlink()
        if not parts:
            save_file(weights, file.with_name(f"{base}.fp16.safetensors"), metadata={"format": "pt"})
            continue
        names = sorted(weights)
        where = {n: f"{base}.fp16-0000{1 + (n in names[9:])}-of-00002.safetensors" for n in names}
        for part in sorted(set(where.values())):
            held = {n: weights[n] for n in names if where[n] == part}
            save_file(held, file.with_name(part), metadata={"format": "pt"})
        index = {"metadata": {}, "weight_map": where}
        file.with_name(f"{base}.safetensors.index.fp16.json").write_text(json.dumps(index))
    return copy


@pytest.mark.parametrize("parts", [False, True])
def test_a_variant_is_read_where_it_is_alone(parts: bool, tmp_path: Path) -> None:
    copy = make_variant(tmp_path, parts=parts)
    PipelineFolder(copy).check()
    model, expected = load_flow_model(copy), load_flow_model(tiny_model_path())
    for name in NETWORKS:
        loaded = model.folder.load(name, dtype=torch.float32).state_dict()
        own = expected.folder.load(name, dtype=torch.float32).state_dict()
        assert loaded.keys() == own.keys() and all(torch.equal(loaded[key], own[key]) for key in own)
    assert all((copy / file).is_file() for file in model.folder.weight_files("transformer"))


def test_weights_without_a_variant_come_first(tmp_path: Path) -> None:
    copy = Path(shutil.copytree(tiny_model_path(), tmp_path / "both"))
    tensors(copy / "transformer" / "diffusion_pytorch_model.fp16.safetensors", "nothing")
    assert PipelineFolder(copy).weight_files("transformer") == ["transformer/diffusion_pytorch_model.safetensors"]
    PipelineFolder(copy).check()
