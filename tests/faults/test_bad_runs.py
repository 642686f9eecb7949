"""Run folders that somebody edited or cut."""

from __future__ import annotations

import json
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from gdro_cli.runtime.run import RunFolder
from gdro_cli.stages.runs.store_times import note_batch, read_batches
from tests.support.faulty import Case, check, command, outcome, rows

RECIPE = {"name": "small", "train": {"steps": 3}, "method": {"name": "gdro"}}
INPUTS = {"store": "aaaabbbbcccc"}
POINT = {"kind": "validation", "step": 3, "protocol": "p", "reward": 0.5, "prompts": 2, "images": 2, "failed": 0}
Harm = Callable[[Path], object]


def open_run(path: Path) -> RunFolder:
    return RunFolder.create_or_open(path, recipe=RECIPE, inputs=INPUTS, environment={"python": "3.11"})


@pytest.fixture
def run(tmp_path: Path) -> Path:
    folder = open_run(tmp_path / "runs" / "small-1")
    for step in (1, 2, 3):
        folder.append_metrics({"kind": "train", "step": step, "loss": 0.5})
    folder.append_metrics(POINT)
    folder.write_json("stores.json", [{"step": 0, "sampling": 1.0, "scoring": 2.0}])
    return folder.path


def put(name: str, data: bytes) -> Harm:
    return lambda path: (path / name).write_bytes(data)


def edit(name: str, change: Callable[[Any], object]) -> Harm:
    def harm(path: Path) -> None:
        value = json.loads((path / name).read_text())
        changed = change(value)
        (path / name).write_text(json.dumps(value if changed is None else changed))

    return harm


def line(data: bytes) -> Harm:
    """Another line of metrics, in the middle."""

    def harm(path: Path) -> None:
        first, rest = (path / "metrics.jsonl").read_bytes().split(b"\n", 1)
        (path / "metrics.jsonl").write_bytes(first + b"\n" + data + b"\n" + rest)

    return harm


def use_run(path: Path) -> None:
    """What every stage reads of a run."""
    folder = open_run(path)
    folder.truncate_metrics(after_step=3)
    assert len(folder.metrics()) >= 4
    note_batch(folder, None, step=1)
    read_batches(folder)
    assert folder.recipe == RECIPE


BAD_LINE = "metrics.jsonl line 2 is damaged"
RUNS = [
    Case("untouched", lambda path: None, 0),
    Case("manifest cut", put("manifest.json", b'{"schema": 1'), 4, "manifest.json is damaged"),
    Case("manifest a pickle", put("manifest.json", pickle.dumps({"schema": 1})), 4, "manifest.json is damaged"),
    Case("another schema", edit("manifest.json", lambda v: v.update(schema=2)), 4, "has schema 2"),
    Case("other inputs", edit("manifest.json", lambda v: v.update(inputs={"store": "x"})), 4, "inputs.store"),
    Case("huge input", edit("manifest.json", lambda v: v.update(inputs={"store": "x" * 10**6})), 4, "inputs.store"),
    Case("recipe edited", edit("recipe.json", lambda v: v["train"].update(steps=4)), 4, "recipe.train.steps"),
    Case("recipe with a key more", edit("recipe.json", lambda v: v.update(x=1)), 4, "recipe.x"),
    Case("recipe cut", put("recipe.json", b'{"name'), 4, "recipe.json is damaged"),
    Case("recipe gone", lambda path: (path / "recipe.json").unlink(), 4, "recipe.json is missing"),
    Case("metrics torn at the end", lambda path: _append(path, b'{"step": 4, "lo'), 0),
    Case("a line cut", line(b'{"step": 1'), 4, BAD_LINE),
    Case("a line a list", line(b"[]"), 4, BAD_LINE),
    Case("a line no UTF-8", line(b'{"step": 1, "kind": "\xff"}'), 4, BAD_LINE),
    Case("loss NaN", line(b'{"kind": "train", "step": 1, "loss": NaN}'), 4, BAD_LINE),
    Case("loss a list", line(b'{"kind": "train", "step": 1, "loss": [1]}'), 4, BAD_LINE),
    Case("kind a number", line(b'{"kind": 3, "step": 1}'), 4, BAD_LINE),
    Case("loss missing", line(b'{"kind": "train", "step": 1, "loss": null}'), 0),
    Case("no kind", line(b'{"step": 1, "loss": 0.5, "seconds": 1.0}'), 4, BAD_LINE),
    Case("times a number", put("stores.json", b"3"), 4, "stores.json is damaged"),
    *(
        Case(
            f"a time of {name}",
            put("stores.json", b'[{"step": 0, "sampling": %s, "scoring": 1}]' % name.encode()),
            4,
            "stores.json is damaged: delete it",
        )
        for name in ('"x"', "-1", "[1]")
    ),
    Case("a time that is not known", put("stores.json", b'[{"step": 0, "sampling": null, "scoring": 1}]'), 0),
]


def _append(path: Path, data: bytes) -> None:
    with (path / "metrics.jsonl").open("ab") as file:
        file.write(data)


@rows(RUNS)
def test_a_run(case: Case, run: Path) -> None:
    case.given(run)
    check(outcome(lambda: use_run(run)), case.code, case.words)


LISTED = [
    Case("method a text", b'{"name": "a", "method": "gdro"}', 0),
    Case("all null", b'{"name": null, "train": null, "method": null}', 0),
    Case("no UTF-8", b"\xff\xfe", 0),
    Case("markup and control", b'{"name": "[bold]\\u001b[31m<b>"}', 0),
]


@rows(LISTED)
def test_gdro_runs_lists_a_run_whatever_is_in_it(case: Case, run: Path) -> None:
    (run / "recipe.json").write_bytes(case.given)
    (run / "metrics.jsonl").write_bytes(case.given.replace(b"\n", b""))
    check(command("runs", str(run.parents[1])), case.code)
