"""The run folder: what it was made from, and metrics that survive a kill."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from gdro_cli.errors import StoreError
from gdro_cli.runtime.metrics import TrainRow, read_row, train_rows, validation_rows
from gdro_cli.runtime.run import RunFolder
from tests.support.rows import point

RECIPE = {"name": "ocr", "train": {"lr": 3e-4, "steps": 10, "adam_betas": [0.9, 0.999]}}
INPUTS = {"store": "abc"}
ENVIRONMENT = {"python": "3.11"}


def open_run(path: Path, *, recipe: Any = None, inputs: Any = None, environment: Any = None) -> RunFolder:
    return RunFolder.create_or_open(
        path, recipe=recipe or RECIPE, inputs=inputs or INPUTS, environment=environment or ENVIRONMENT
    )


def test_a_run_is_made_once_and_opened_again(tmp_path: Path) -> None:
    run = open_run(tmp_path / "a" / "run")
    created = run.read_json("manifest.json")["created"]
    again = open_run(tmp_path / "a" / "run")
    assert again.read_json("manifest.json")["created"] == created
    assert again.recipe == RECIPE
    assert again.read_json("environment.json") == ENVIRONMENT
    assert sorted(p.name for p in run.path.iterdir()) == ["environment.json", "manifest.json", "recipe.json"]


def test_changed_recipe_or_inputs_are_refused_with_the_difference(tmp_path: Path) -> None:
    open_run(tmp_path)
    other = {**RECIPE, "train": {**RECIPE["train"], "lr": 1e-3}}  # type: ignore[dict-item]
    with pytest.raises(StoreError, match=r"recipe\.train\.lr: 0\.0003 -> 0\.001.*--out"):
        open_run(tmp_path, recipe=other)
    with pytest.raises(StoreError, match=r'inputs\.store: "abc" -> "xyz"'):
        open_run(tmp_path, inputs={"store": "xyz"})


def test_other_environments_are_kept_beside_the_first(tmp_path: Path) -> None:
    open_run(tmp_path)
    for python in ("3.12", "3.12", "3.11", "3.13"):
        run = open_run(tmp_path, environment={"python": python})
    assert run.read_json("environment-2.json") == {"python": "3.12"}
    assert run.read_json("environment-3.json") == {"python": "3.13"}
    assert len(list(tmp_path.glob("environment*.json"))) == 3


def test_a_half_made_run_is_made_again(tmp_path: Path) -> None:
    open_run(tmp_path)
    (tmp_path / "manifest.json").unlink()
    (tmp_path / "recipe.json").write_text("{")
    assert open_run(tmp_path).recipe["name"] == "ocr"


def test_a_run_that_cannot_be_made_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(StoreError, match="cannot write .*file/run"):
        open_run(tmp_path / "file" / "run")


def test_metrics_are_cut_at_a_step(tmp_path: Path) -> None:
    run = open_run(tmp_path)
    assert run.metrics() == []
    run.truncate_metrics(0)
    for step in range(1, 6):
        run.append_metrics(TrainRow(step=step, loss=0.1 * step))
    run.append_metrics(point(3, 0.5, overall=0.25))
    run.truncate_metrics(3)
    steps = [TrainRow(step=step, loss=0.1 * step) for step in (1, 2, 3)]
    assert run.metrics() == [*steps, point(3, 0.5, overall=0.25)]
    run.truncate_metrics(3, unmeasured=True)
    assert run.metrics() == steps


def test_a_row_has_its_fields_and_other_numbers_by_name(tmp_path: Path) -> None:
    """What is missing is not written; the kind says which fields there are."""
    row = point(4, 0.5, overall=0.25, u=3, verdict="healthy")
    assert (row.get("overall"), row["u"], row.get("corrected"), row.get("copy", 7)) == (0.25, 3.0, None, 7)
    assert row.numbers.keys() == {"reward", "low", "high", "u", "overall", "prompts", "images", "failed"}
    assert read_row(json.dumps(row.to_json())) == row and "corrected" not in row.to_json()
    steps = [TrainRow(step=1), row]
    assert (train_rows(steps), validation_rows(steps)) == ([TrainRow(step=1)], [row])
    for changes in ({"reward": None}, {"reward": "0.5"}, {"step": -1}, {"verdict": "bad"}, {"overall": "x"}):
        with pytest.raises(ValueError):
            read_row(json.dumps(row.to_json() | changes))


def test_a_torn_last_line_is_dropped_and_a_damaged_one_named(tmp_path: Path) -> None:
    run = open_run(tmp_path)
    run.append_metrics(TrainRow(step=1))
    with run.metrics_path.open("a") as stream:
        stream.write('{"step": 2, "lo')
    assert run.metrics() == [TrainRow(step=1)]
    run = open_run(tmp_path)
    run.append_metrics(TrainRow(step=2))
    assert [row["step"] for row in run.metrics()] == [1, 2]
    run.metrics_path.write_text('{"kind": "train", "step": 1}\n{"ste\n{"kind": "train", "step": 3}\n')
    with pytest.raises(StoreError, match=r"metrics\.jsonl line 2 is damaged"):
        run.metrics()
