"""Run folders that a user edited or cut: one sentence, and still a row in the list of runs."""

from __future__ import annotations

import json
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from gdro_cli.runtime.metrics import TrainRow
from gdro_cli.runtime.run import RunFolder
from gdro_cli.stages.runs.store_times import note_batch, read_batches
from tests.support.faulty import Case, check, command, outcome, rows

RECIPE = {"name": "small", "train": {"steps": 3}, "method": {"name": "gdro"}}
Damage = Callable[[Path], object]


def open_run(path: Path) -> RunFolder:
    return RunFolder.create_or_open(path, recipe=RECIPE, inputs={"store": "aaaa"}, environment={"python": "3.11"})


@pytest.fixture
def run(tmp_path: Path) -> Path:
    folder = open_run(tmp_path / "runs" / "small-1")
    for step in (1, 2, 3):
        folder.append_metrics(TrainRow(step=step, loss=0.5))
    folder.write_json("stores.json", [{"step": 0, "sampling": 1.0, "scoring": 2.0}])
    return folder.path


def put(name: str, data: bytes) -> Damage:
    return lambda path: (path / name).write_bytes(data)


def edit(name: str, change: Callable[[Any], object]) -> Damage:
    def damage(path: Path) -> None:
        value = json.loads((path / name).read_text())
        change(value)
        (path / name).write_text(json.dumps(value))

    return damage


def line(data: bytes) -> Damage:
    """Insert a line into the metrics."""

    def damage(path: Path) -> None:
        first, rest = (path / "metrics.jsonl").read_bytes().split(b"\n", 1)
        (path / "metrics.jsonl").write_bytes(first + b"\n" + data + b"\n" + rest)

    return damage


BAD_LINE = "metrics.jsonl line 2 is damaged"
RUNS = [
    Case("untouched", lambda path: None, 0),
    Case("manifest cut", put("manifest.json", b'{"schema": 1'), 4, "manifest.json is damaged"),
    Case("manifest a pickle", put("manifest.json", pickle.dumps({"schema": 1})), 4, "manifest.json is damaged"),
    Case("another schema", edit("manifest.json", lambda v: v.update(schema=2)), 4, "has schema 2"),
    Case("huge input", edit("manifest.json", lambda v: v.update(inputs={"store": "x" * 10**6})), 4, "inputs.store"),
    Case("recipe edited", edit("recipe.json", lambda v: v["train"].update(steps=4)), 4, "recipe.train.steps"),
    Case("recipe gone", lambda path: (path / "recipe.json").unlink(), 4, "recipe.json is missing"),
    Case("a line cut", line(b'{"step": 1'), 4, BAD_LINE),
    Case("a line a list", line(b"[]"), 4, BAD_LINE),
    Case("a line no UTF-8", line(b'{"step": 1, "kind": "\xff"}'), 4, BAD_LINE),
    Case("step a text", line(b'{"kind": "train", "step": "../../x"}'), 4, BAD_LINE),
    Case("loss NaN", line(b'{"kind": "train", "step": 1, "loss": NaN}'), 4, BAD_LINE),
    Case("loss a list", line(b'{"kind": "train", "step": 1, "loss": [1]}'), 4, BAD_LINE),
    Case("loss missing", line(b'{"kind": "train", "step": 1, "loss": null}'), 0),
    Case("another kind", line(b'{"kind": "other", "step": 1}'), 4, BAD_LINE),
    Case("no kind", line(b'{"step": 1, "loss": 0.5, "seconds": 1.0}'), 4, BAD_LINE),
    Case("times a number", put("stores.json", b"3"), 4, "stores.json is damaged"),
    Case("a time of text", put("stores.json", b'[{"step": 0, "sampling": "x", "scoring": 1}]'), 4, "delete it"),
    Case("a time that is not known", put("stores.json", b'[{"step": 0, "sampling": null, "scoring": 1}]'), 0),
]


@rows(RUNS)
def test_a_run(case: Case, run: Path) -> None:
    case.given(run)

    def use() -> None:
        folder = open_run(run)
        folder.truncate_metrics(after_step=3)
        assert len(folder.metrics()) >= 3
        note_batch(folder, None, step=1)
        read_batches(folder)
        assert folder.recipe == RECIPE

    check(outcome(use), case.code, case.words)


@pytest.mark.parametrize(
    "data", [b'{"name": null, "train": null, "method": "gdro"}', b"\xff\xfe", b'{"name": "[bold]\\u001b[31m<b>"}']
)
def test_gdro_runs_lists_a_run_with_any_content(data: bytes, run: Path) -> None:
    (run / "recipe.json").write_bytes(data)
    (run / "metrics.jsonl").write_bytes(data)
    check(command("runs", str(run.parents[1])), 0)
