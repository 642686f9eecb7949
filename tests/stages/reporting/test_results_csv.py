"""The table of all images beside a report."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

from gdro_cli.stages.reporting.evaluation_report import write_csv
from tests.support.rows import image_row, read, results

PROMPT = 'a sign, that says "=TOM"\nin two lines'


def row(value: float | None, *, index: int = 0, reason: str | None = None, **details: Any) -> dict[str, Any]:
    return {**image_row(0, index, value, **details), "reason": reason, "file": "x.png"}


def written(
    folder: Path, *, base: list[dict[str, Any]], trained: list[dict[str, Any]], task: str = "ocr"
) -> list[dict[str, str]]:
    made = results(count=1, base=base, trained=trained, task=task)
    made["prompts"][0] |= {"prompt": PROMPT, "metadata": {"tag": "colors"}}
    with write_csv(folder / "results.csv", read(made)).open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def test_one_row_per_image_and_model(tmp_path: Path) -> None:
    """Text as it is, truth values as 1 and 0, lists left out, and only the columns that some image has."""
    first = row(0.5, exact=False, text="T,OM", lines=["T", "OM"], u=3.0, corrected=0.2, dark_share=0.0, other=1)
    second = row(1.0, index=1, exact=True, text="TOM", u=4.0, corrected=1.2, dark_share=0.1)
    found = written(tmp_path, base=[first, second], trained=[second])
    assert [(each["model"], each["index"], each["value"]) for each in found] == [
        ("base", "0", "0.5"),
        ("base", "1", "1.0"),
        ("trained", "1", "1.0"),
    ]
    assert list(found[0]) == [
        *("model", "prompt_id", "index", "prompt", "value"),
        *("exact", "text", "u", "corrected", "dark_share", "other", "reason", "file"),
    ]
    assert list(found[0].values())[3:] == [PROMPT, "0.5", "0", "T,OM", "3.0", "0.2", "0.0", "1", "", "x.png"]
    assert (found[1]["exact"], found[1]["other"]) == ("1", "")


def test_missing_numbers_are_empty_with_their_reason(tmp_path: Path) -> None:
    unjudged = row(0.5, u=None, corrected=None, unjudged="no answer")
    failed = row(None, index=1, reason="the engine stopped", u=3.0, corrected=None)
    first, second = written(tmp_path, base=[unjudged, failed], trained=[])
    assert (first["value"], first["u"], first["corrected"], first["unjudged"]) == ("0.5", "", "", "no answer")
    assert (second["value"], second["u"], second["reason"]) == ("", "3.0", "the engine stopped")


def test_what_a_detector_saw_is_a_cell(tmp_path: Path) -> None:
    stars = [{"label": "star", "confidence": 0.9, "box": [0, 0, 1, 1], "colour": "red"}] * 2
    rows = [row(0.5, accuracy=True, soft=0.5, detections=stars), row(0.0, index=1, accuracy=False, detections=[])]
    first, second = written(tmp_path, base=rows, trained=[], task="geneval")
    assert (first["accuracy"], first["soft"], first["detections"]) == ("1", "0.5", "2 red star")
    assert (second["accuracy"], second["soft"], second["detections"]) == ("0", "", "-")
