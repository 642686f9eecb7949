"""Where a model's files come from: folders, the Hub's cache, and the errors if they are missing."""

from __future__ import annotations

import pickle
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from gdro_cli.errors import PrerequisiteError, UserError
from gdro_cli.rewards.pretrained import ModelFiles, pick_device

COMMIT = "0123456789abcdef0123456789abcdef01234567"
CONFIG = '{"model_type": "clip", "id2label": {"0": "cat"}}'


def fill(folder: Path, *, without: str = "", config: str = CONFIG) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    files = {"config.json": config, "preprocessor_config.json": "{}", "model.safetensors": "weights"}
    for name, text in files.items():
        if name != without:
            (folder / name).write_text(text)
    return folder


def open_files(model: str | Path) -> ModelFiles:
    return ModelFiles(model, key="reward.some_model", kind="clip")


@pytest.fixture
def cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """An empty Hub cache; the Hub cannot be reached."""
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    return tmp_path / "hub"


def snapshot(cache: Path) -> Path:
    repository = cache / "models--owner--name"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text(COMMIT)
    return repository / "snapshots" / COMMIT


def test_the_digest_covers_names_and_bytes_of_the_files_that_are_loaded(tmp_path: Path) -> None:
    version = open_files(fill(tmp_path / "a")).version
    other = fill(tmp_path / "b")
    (other / "README.md").write_text("read me")
    assert open_files(other).version == version and set(version) == {"sha256", "transformers"}
    (other / "model.safetensors").write_text("other weights")
    assert open_files(other).version != version
    fill(other)
    (other / "tokenizer.json").write_text("{}")
    assert open_files(other).version != version


def test_a_repository_in_the_cache_needs_no_network(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The library is online and may ask the Hub, but no address is looked up."""
    from huggingface_hub import constants

    requests: list[object] = []

    def look_up(*address: object, **_options: object) -> None:
        requests.append(address)
        raise OSError("no network in tests")

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(socket, "getaddrinfo", look_up)
    root = fill(snapshot(cache))
    files = open_files("owner/name")
    assert not requests
    assert files.config["id2label"] == {"0": "cat"}
    assert files.version["model"] == "owner/name" and files.version["commit"] == COMMIT
    assert pickle.loads(pickle.dumps(files)).version == files.version
    (root / "config.json").write_text(CONFIG.replace("clip", "bert"))
    with pytest.raises(UserError, match=r"`reward\.some_model` names owner/name, a model of the type bert; .* clip"):
        open_files("owner/name")


def test_a_repository_that_cannot_be_fetched(cache: Path) -> None:
    sentence = (
        r"owner/name is neither a local folder nor could .* be read from the Hugging Face cache or fetched "
        r"\(OfflineModeIsEnabled\): .*`hf download owner/name`.* set reward\.some_model=FOLDER \(docs/rewards\.md\)$"
    )
    with pytest.raises(PrerequisiteError, match=sentence):
        open_files("owner/name")


def test_a_repository_without_weights_in_the_cache_fails_on_loading(cache: Path) -> None:
    from transformers import CLIPModel

    fill(snapshot(cache), without="model.safetensors")
    files = open_files("owner/name")
    with pytest.raises(PrerequisiteError, match="run `hf download owner/name`"):
        files.load_model(CLIPModel, device="cpu")


@pytest.mark.parametrize("name", ["config.json", "preprocessor_config.json", "model.safetensors"])
def test_the_missing_file_of_a_folder_is_named(tmp_path: Path, name: str) -> None:
    folder = fill(tmp_path / "model", without=name)
    pattern = {"model.safetensors": r"\*\.safetensors"}.get(name, name)
    with pytest.raises(PrerequisiteError, match=f"model has no {pattern}.*: fetch the whole folder again$"):
        open_files(folder)


def test_broken_config_and_missing_folder(tmp_path: Path) -> None:
    with pytest.raises(PrerequisiteError, match=r"nowhere does not exist: set reward\.some_model to a folder"):
        open_files(tmp_path / "nowhere")
    with pytest.raises(PrerequisiteError, match=r"config\.json of model .* cannot be read"):
        open_files(fill(tmp_path / "broken", config="{"))
    with pytest.raises(PrerequisiteError, match=r"config\.json of model .* is not a JSON object"):
        open_files(fill(tmp_path / "list", config="[]"))


def test_devices() -> None:
    assert pick_device("cpu") == torch.device("cpu")
    assert pick_device("auto").type == ("cuda" if torch.cuda.is_available() else "cpu")


@pytest.mark.slow
def test_constructing_a_detector_or_classifier_does_not_import_transformers(tmp_path: Path) -> None:
    """A fresh process constructs both, reads their versions and pickles them."""
    detector = fill(tmp_path / "detector", config=CONFIG.replace("clip", "mask2former"))
    colours = fill(tmp_path / "colours")
    (colours / "tokenizer.json").write_text("{}")
    program = (
        "import pickle, sys; from gdro_cli.rewards.geneval.mask2former import Mask2FormerDetector;"
        "from gdro_cli.rewards.geneval.clip_colour import ClipColours;"
        "models = Mask2FormerDetector(sys.argv[1]), ClipColours(sys.argv[2]);"
        "[pickle.dumps((model, model.version)) for model in models]; sys.exit('transformers' in sys.modules)"
    )
    subprocess.run([sys.executable, "-c", program, str(detector), str(colours)], check=True)
