"""Rows of metrics and results of an evaluation, made by hand."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from gdro_cli.runtime.metrics import TrainRow, ValidationRow
from gdro_cli.stages.runs.results import Results


def timeless(row: Mapping[str, Any]) -> dict[str, Any]:
    """A row without what differs from run to run: wall times and speeds."""
    return {key: value for key, value in row.items() if not key.startswith(("seconds", "images_per_second"))}


def step(number: int, **values: Any) -> TrainRow:
    """A training step."""
    return TrainRow.model_validate({"step": number, **values})


def point(number: int, reward: float, **values: Any) -> ValidationRow:
    """An evaluation point of two prompts with one image each."""
    own = {"step": number, "protocol": "p", "reward": reward, "low": reward, "high": reward}
    return ValidationRow.model_validate({**own, "prompts": 2, "images": 2, "failed": 0, **values})


def interval(mean: float, low: float, high: float, *, prompts: int = 2, images: int = 4) -> dict[str, Any]:
    """An interval as results.json has it."""
    return {"mean": mean, "low": low, "high": high, "prompts": prompts, "images": images, "level": 0.95}


def image_row(prompt: int, index: int, value: float | None = 0.5, **details: Any) -> dict[str, Any]:
    """The row of an image of the ``prompt``-th prompt of ``results``."""
    reason = "no image" if value is None else None
    row = {"prompt_id": f"{prompt:012x}", "index": index, "value": value, "reason": reason, "details": details}
    return row | {"file": None}


def results(
    *, count: int = 2, base: Sequence[Mapping[str, Any]], trained: Sequence[Mapping[str, Any]], **changes: Any
) -> dict[str, Any]:
    """What results.json says of an evaluation of OCR without a judge."""
    half = interval(0.5, 0.4, 0.6)
    return {
        "kind": "gdro results",
        "schema": 2,
        "recipe": "small",
        "task": "ocr",
        "method": {"name": "gdro"},
        "run": "small",
        "protocol": {"seed": 1000, "judge": None},
        "protocol_name": "ocr-2x2-3steps-0123456789ab",
        "weights": {"kind": "ema", "checkpoint": "best", "step": 4, "chosen_by": None},
        "measures": {"reward": {"base": half, "trained": half, "difference": half}},
        "signals": {},
        "verdict": {"level": "healthy", "reasons": ["Nothing moved."]},
        "failed": 0,
        "unjudged": 0,
        "seen": 0,
        "bootstrap": 100,
        "grid": None,
        "prompts": [{"id": f"{n:012x}", "prompt": f"prompt {n}", "target": None, "metadata": {}} for n in range(count)],
        "images": {"base": list(base), "trained": list(trained)},
        **changes,
    }


def read(made: Mapping[str, Any]) -> Results:
    """``results`` as the code reads them."""
    return Results.model_validate_json(json.dumps(made))
