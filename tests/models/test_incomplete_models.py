"""Weights and vocabularies that files lack, name otherwise or hold in another shape are found before any sampling."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from gdro_cli.embedded import tiny_model_path
from gdro_cli.errors import PrerequisiteError
from gdro_cli.models.diffusers_flow import load_flow_model
from gdro_cli.models.folder import PipelineFolder
from tests.support.faulty import check, command

Family = Callable[[str], Path]

EMBEDDED = ("text_encoder", "text_encoder_2", "transformer", "vae")
SD3 = (*EMBEDDED, "text_encoder_3")
KINDS = {
    "missing": r"lacks the weight {key}",
    "prefixed": r"lacks the weight \S+ and \d+ more",
    "reshaped": r"holds the weight {key} in the shape \[\d+, \d+\] instead of \[\d+, \d+\]",
}
"""How a file is changed, and what is said of it."""


def weights_of(folder: Path, component: str) -> Path:
    (file,) = (folder / component).glob("*.safetensors")
    return file


def matrix(tensors: dict[str, torch.Tensor]) -> str:
    return next(key for key, value in sorted(tensors.items()) if value.ndim == 2 and min(value.shape) > 1)


def damage(folder: Path, component: str, kind: str) -> str:
    """Change the weights of a component; returns the name of the matrix concerned."""
    file = weights_of(folder, component)
    tensors = load_file(file)
    key = matrix(tensors)
    if kind == "missing":
        del tensors[key]
    elif kind == "prefixed":
        tensors = {f"ema.{name}": value for name, value in tensors.items()}
    else:
        tensors[key] = tensors[key][1:].contiguous()
    save_file(tensors, file, metadata={"format": "pt"})
    return key


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_model_path(), tmp_path / "copy"))


def refused(folder: Path, words: str) -> None:
    """Whichever component is asked for: the first load looks at all of them."""
    with pytest.raises(PrerequisiteError, match=words) as caught:
        PipelineFolder(folder).load("scheduler")
    assert "\n" not in str(caught.value) and str(caught.value).endswith(": fetch the whole folder again")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("component", EMBEDDED)
def test_weights_of_the_embedded_model(component: str, kind: str, copy: Path) -> None:
    key = damage(copy, component, kind)
    refused(copy, f"component {component} of model .* {KINDS[kind].format(key=key)}")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("component", SD3)
def test_weights_of_a_larger_pipeline(component: str, kind: str, family_folder: Family, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(family_folder("sd3"), tmp_path / "copy"))
    key = damage(folder, component, kind)
    refused(folder, f"component {component} of model .* {KINDS[kind].format(key=key)}")


@pytest.mark.parametrize("kind", KINDS)
def test_the_command_line_ends_before_it_samples(kind: str, copy: Path, tmp_path: Path) -> None:
    """The autoencoder, which is used last of all."""
    key = damage(copy, "vae", kind)
    settings = [f"--set=model.path={copy}", "--set=judge.kind=none"]
    outcome = command("sample", "--recipe=smoke", f"--out={tmp_path / 'out'}", *settings)
    check(outcome, 3, "component vae of model")
    assert kind == "prefixed" or key in outcome.message
    assert not list((tmp_path / "out").rglob("*.safetensors"))


def test_weights_that_the_class_does_not_have(copy: Path) -> None:
    """In a transformer they belong to another model; a text encoder may come with the head of its language model."""
    for component in ("text_encoder_2", "transformer"):
        file = weights_of(copy, component)
        save_file({**load_file(file), "lm_head.weight": torch.ones(2, 2)}, file, metadata={"format": "pt"})
    refused(copy, r"component transformer of model .* holds the weight lm_head\.weight, which its class does not have")
    shutil.copytree(tiny_model_path() / "transformer", copy / "transformer", dirs_exist_ok=True)
    assert PipelineFolder(copy).load("text_encoder_2", dtype=torch.float32).dtype == torch.float32


def test_names_that_the_library_has_changed_since_are_read(copy: Path) -> None:
    """As FLUX.1 is published: CLIP's weights with the name of their module in front."""
    model = load_flow_model(copy)
    expected = model.encode(["a red sign"])[0]["pooled_prompt_embeds"]
    file = weights_of(copy, "text_encoder")
    old_names = {f"text_model.{name}": value for name, value in load_file(file).items()}
    save_file(old_names, file, metadata={"format": "pt"})
    assert torch.equal(load_flow_model(copy).encode(["a red sign"])[0]["pooled_prompt_embeds"], expected)


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        ("whole", ""),
        ("missing", r"lacks the weight context_embedder\.weight"),
        ("no part", r"cannot be loaded \(transformer/part-2\.safetensors: "),
        ("no list", r"transformer/\S+\.index\.json of model \S+ names no files"),
    ],
)
def test_weights_in_parts(kind: str, words: str, copy: Path) -> None:
    file = weights_of(copy, "transformer")
    tensors = load_file(file)
    file.unlink()
    names = sorted(tensors)
    weight_map = {name: f"part-{1 + (name in names[80:])}.safetensors" for name in names}
    index = {"metadata": {}, "weight_map": weight_map} if kind != "no list" else {}
    (copy / "transformer" / f"{file.name}.index.json").write_text(json.dumps(index))
    if kind == "missing":
        del tensors["context_embedder.weight"]
    for part in sorted(set(weight_map.values())):
        held = {name: value for name, value in tensors.items() if weight_map[name] == part}
        save_file(held, copy / "transformer" / part, metadata={"format": "pt"})
    if kind == "no part":
        (copy / "transformer" / "part-2.safetensors").unlink()
    if words:
        refused(copy, words)
    else:
        parameters = load_flow_model(copy).transformer.state_dict()
        assert all(torch.equal(parameters[name], value) for name, value in tensors.items())


@pytest.mark.parametrize("component", EMBEDDED)
def test_weights_from_the_hub_are_compared_when_they_are_loaded(
    component: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No other component has to be fetched for it."""
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    repository, commit = tmp_path / "models--owner--name", "0" * 40
    shutil.copytree(tiny_model_path(), repository / "snapshots" / commit)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(commit)
    folder = PipelineFolder("owner/name")
    assert folder.load(component, dtype=torch.float32) is not None
    key = damage(repository / "snapshots" / commit, component, "missing")
    words = rf"component {component} of model owner/name lacks the weight {key}: run `hf download owner/name` again"
    with pytest.raises(PrerequisiteError, match=words):
        folder.load(component, dtype=torch.float32)
    assert folder.load("scheduler") is not None


def test_quantised_files_are_left_to_their_quantiser(copy: Path) -> None:
    """It knows their names and shapes, which are not the class's."""
    damage(copy, "transformer", "reshaped")
    path = copy / "transformer" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"quantization_config": {"quant_method": "torchao"}}))
    PipelineFolder(copy).check()


def cut(file: Path) -> None:
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


@pytest.mark.parametrize("component", ["tokenizer", "tokenizer_2"])
@pytest.mark.parametrize("file", ["tokenizer.json", "tokenizer_config.json"])
def test_tokenizers(file: str, component: str, copy: Path) -> None:
    """Without its vocabulary a tokenizer would load with two words in it."""
    path = copy / component / file
    cut(path)
    with pytest.raises(PrerequisiteError, match=rf"component {component} of model .* cannot be loaded"):
        load_flow_model(copy).encode(["a red sign"])
    if file == "tokenizer.json":
        path.write_text("{}")
        with pytest.raises(PrerequisiteError, match=rf"component {component} of model .* cannot be loaded"):
            load_flow_model(copy).encode(["a red sign"])
    path.unlink()
    missing = "vocab.json" if (component, file) == ("tokenizer", "tokenizer.json") else file
    missing = "spiece.model" if (component, file) == ("tokenizer_2", "tokenizer.json") else missing
    refused(copy, rf"component {component} of model .* has no {missing}")


def test_a_vocabulary_in_two_files_is_one_too(copy: Path) -> None:
    """As FLUX.1 has it: words and merges."""
    import transformers

    words: Any = transformers.CLIPTokenizer.from_pretrained(copy / "tokenizer")
    model = json.loads((copy / "tokenizer" / "tokenizer.json").read_text())["model"]
    (copy / "tokenizer" / "vocab.json").write_text(json.dumps(model["vocab"]))
    (copy / "tokenizer" / "tokenizer.json").unlink()
    refused(copy, r"component tokenizer of model .* has no merges\.txt")
    pairs = [pair if isinstance(pair, str) else " ".join(pair) for pair in model["merges"]]
    (copy / "tokenizer" / "merges.txt").write_text("\n".join(["#version: 0.2", *pairs, ""]))
    loaded = PipelineFolder(copy).load("tokenizer")
    assert loaded("a red sign").input_ids == words("a red sign").input_ids


def test_a_chat_template(family_folder: Family, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(family_folder("z-image"), tmp_path / "copy"))
    (folder / "tokenizer" / "chat_template.jinja").unlink()
    with pytest.raises(PrerequisiteError, match="has no chat template: fetch the pipeline folder again"):
        load_flow_model(folder).encode(["a red sign"])
