"""PaddleOCR, wrapped in one small class: an RGB image in, its lines of text in reading order out.

Only this module imports ``paddleocr``, and only when an engine is constructed: the import takes seconds.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.metadata
import importlib.util
import logging
import os
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import Any, Literal

from PIL import Image

from gdro_cli.errors import PrerequisiteError
from gdro_cli.files import cache_folder
from gdro_cli.rewards.base import one_line
from gdro_cli.rewards.ocr.models import OcrModels

EngineKind = Literal["onnxruntime", "paddle"]

# Modules that an engine needs, with the distributions that may provide them; error messages name the first.
_COMMON_PACKAGES: dict[str, tuple[str, ...]] = {
    "paddleocr": ("paddleocr",),
    "paddlex": ("paddlex",),
    "cv2": ("opencv-contrib-python", "opencv-contrib-python-headless", "opencv-python"),
    "rapidfuzz": ("rapidfuzz",),
}
_RUNTIME_PACKAGES: dict[EngineKind, dict[str, tuple[str, ...]]] = {
    "onnxruntime": {"onnxruntime": ("onnxruntime", "onnxruntime-gpu")},
    "paddle": {"paddle": ("paddlepaddle", "paddlepaddle-gpu")},
}


READING_SIDE = 512
"""Pixels of the shorter side to which a larger image is shrunk: PaddleOCR's detector does not see letters of several
hundred pixels, or cuts them into pieces, and it shrinks images without smoothing (docs/rewards.md)."""


@dataclass(frozen=True, slots=True)
class Reading:
    """The text that the engine read in one image, lines in reading order."""

    lines: tuple[str, ...]
    confidences: tuple[float, ...]
    """One per line, in [0, 1]."""
    text_area: float
    """Area of the detected text boxes as a share of the image, in [0, 1]."""

    @property
    def text(self) -> str:
        """All lines joined without a separator."""
        return "".join(self.lines)

    @property
    def confidence(self) -> float | None:
        """Mean over the lines; ``None`` if nothing was read."""
        return sum(self.confidences) / len(self.confidences) if self.confidences else None


Box = tuple[float, float, float, float]
"""Left, top, right, bottom in pixels."""


def reading_order(boxes: Sequence[Box]) -> list[int]:
    """Indices of ``boxes`` in reading order: rows from top to bottom, within a row from left to right.

    A box belongs to a row if its overlap with the row's topmost box is at least half of the smaller height. The rule
    does not depend on the image's size; PaddleOCR's own has a fixed limit of 10 pixels.
    """
    rows: list[list[int]] = []
    for index in sorted(range(len(boxes)), key=lambda i: (boxes[i][1], boxes[i][0])):
        row = next((row for row in rows if _same_row(boxes[row[0]], boxes[index])), None)
        if row is None:
            rows.append([index])
        else:
            row.append(index)
    return [index for row in rows for index in sorted(row, key=lambda i: boxes[i][0])]


def engine_version(kind: EngineKind) -> dict[str, Any]:
    """Names and versions of the packages that an engine of this kind needs, without importing them.

    Raises ``PrerequisiteError`` naming a missing package.
    """
    needed = _COMMON_PACKAGES | _RUNTIME_PACKAGES[kind]
    libraries = dict(_installed(module, names) for module, names in needed.items())
    return {"engine": "paddleocr", "runtime": kind, "libraries": libraries}


class OcrEngine:
    """A loaded PaddleOCR pipeline (detection and recognition of text, nothing else) on local model folders.

    It has one thread: more processes score faster than more threads.

    Raises ``PrerequisiteError`` if PaddleOCR cannot be imported or cannot load the models.
    """

    def __init__(self, models: OcrModels, *, kind: EngineKind = "onnxruntime") -> None:
        options: dict[str, Any] = {"engine": kind}
        if kind == "onnxruntime":
            options |= {"device": "cpu", "engine_config": {"intra_op_num_threads": 1, "inter_op_num_threads": 1}}
        try:
            paddleocr = _import_paddleocr()
            self._pipeline: Any = paddleocr.PaddleOCR(
                text_detection_model_name=models.detection.name,
                text_detection_model_dir=str(models.detection.path),
                text_recognition_model_name=models.recognition.name,
                text_recognition_model_dir=str(models.recognition.path),
                use_doc_orientation_classify=False,
                use_doc_unwarping=False,
                use_textline_orientation=False,
                **options,
            )
            importlib.import_module("cv2").setNumThreads(1)
        except Exception as error:
            raise PrerequisiteError(
                f"PaddleOCR cannot load the models {models.detection.path} and {models.recognition.path} "
                f"({one_line(error)}): check that the folders fit the installed version of paddleocr"
            ) from error

    def read(self, image: Image.Image) -> Reading:
        """Read an RGB image of any size. An image without text has no lines. Errors of PaddleOCR are not caught."""
        import numpy as np

        image = image.convert("RGB")
        if (factor := READING_SIDE / max(min(image.size), 1)) < 1:
            image = image.resize((round(factor * image.width), round(factor * image.height)), Image.Resampling.LANCZOS)
        bgr = np.ascontiguousarray(np.asarray(image)[:, :, ::-1])
        (result,) = self._pipeline.predict(bgr)
        boxes = [_bounds(polygon) for polygon in result["rec_polys"]]
        order = reading_order(boxes)
        covered = sum(_polygon_area(polygon) for polygon in result["dt_polys"])
        return Reading(
            lines=tuple(str(result["rec_texts"][i]) for i in order),
            confidences=tuple(float(result["rec_scores"][i]) for i in order),
            text_area=min(covered / (image.width * image.height), 1.0),
        )


def _installed(module: str, distributions: Sequence[str]) -> tuple[str, str]:
    """The distribution that provides ``module``, and its version. Raises ``PrerequisiteError``."""
    if importlib.util.find_spec(module) is None:
        raise PrerequisiteError(
            f"the OCR reward needs the Python package {distributions[0]}, which is not installed: install it "
            f"with `pip install {distributions[0]}` (docs/rewards.md#ocr)"
        )
    for name in distributions:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            return name, importlib.metadata.version(name)
    return distributions[0], "unknown"


def _import_paddleocr() -> Any:
    """Import PaddleOCR without its log messages, and with its files in our cache folder."""
    os.environ.setdefault("PADDLE_PDX_CACHE_HOME", str(cache_folder() / "paddlex"))
    with _without_modelscope():
        module = importlib.import_module("paddleocr")
    for name in ("paddlex", "paddleocr"):
        logging.getLogger(name).setLevel(logging.ERROR)
    return module


@contextlib.contextmanager
def _without_modelscope() -> Iterator[None]:
    """Spare the import of modelscope, which imports torch: most of the time and memory of a scoring process.

    paddlex imports it to download models, and the engine's models are local.
    """
    if "modelscope" in sys.modules:
        yield
        return
    sys.modules["modelscope"] = ModuleType("modelscope")
    try:
        yield
    finally:
        del sys.modules["modelscope"]


def _same_row(first: Box, second: Box) -> bool:
    shared = min(first[3], second[3]) - max(first[1], second[1])
    return 2 * shared >= min(first[3] - first[1], second[3] - second[1])


def _bounds(polygon: Sequence[Sequence[float]]) -> Box:
    xs = [float(point[0]) for point in polygon]
    ys = [float(point[1]) for point in polygon]
    return min(xs), min(ys), max(xs), max(ys)


def _polygon_area(polygon: Sequence[Sequence[float]]) -> float:
    """Area in pixels by the shoelace formula."""
    points = [(float(point[0]), float(point[1])) for point in polygon]
    pairs = zip(points, points[1:] + points[:1], strict=True)
    return abs(sum(x0 * y1 - x1 * y0 for (x0, y0), (x1, y1) in pairs)) / 2
