"""results.json, metrics and recipes of compared runs: intact, or one sentence that names the file."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from gdro_cli.config.load import load_recipe
from gdro_cli.stages.comparison import compare
from tests.support.faulty import Case, check, command, outcome, rows
from tests.support.rows import image_row, interval, point, results

INTERVAL = interval(0.5, 0.4, 0.6, images=2)
SIDES = {"base": INTERVAL, "trained": INTERVAL, "difference": INTERVAL}
RESULTS = results(
    base=[image_row(n, 0, u=3.0) for n in range(2)],
    trained=[image_row(n, 0, u=3.0) for n in range(2)],
    measures={"reward": SIDES, "u": SIDES},
)
ROWS = RESULTS["images"]["base"]
RECIPE = load_recipe("smoke").resolved()


@pytest.fixture
def pair(tmp_path: Path) -> Path:
    """A workspace with two intact runs, ``one`` and ``two``."""
    for name in ("one", "two"):
        folder = tmp_path / "runs" / name
        folder.mkdir(parents=True)
        (folder / "results.json").write_text(json.dumps(RESULTS))
        (folder / "recipe.json").write_text(json.dumps({"name": "small", "train": {"steps": 4}}))
        (folder / "resolved.json").write_text(json.dumps(RECIPE))
        (folder / "metrics.jsonl").write_text(json.dumps(point(4, 0.5).to_json()) + "\n")
    return tmp_path


Change = Callable[[dict[str, Any]], object]


def without(key: str) -> Change:
    return lambda results: results.pop(key) and None


def with_(**changes: Any) -> Change:
    return lambda results: results.update(changes)


def whole(value: Any) -> bytes:
    return json.dumps(value).encode()


def row(**changes: Any) -> Change:
    return lambda results: results["images"]["trained"][0].update(changes)


AGAIN = "run `gdro eval` with its recipe again"
# The content of results.json: bytes, or a change of intact results.
RESULT_FILES: list[Case] = [
    Case("sound", with_(), 0),
    Case("an unknown key", with_(extra=1), 4, "damaged at extra"),
    Case("no verdict", with_(verdict=None), 4, "damaged at verdict"),
    Case("another verdict", with_(verdict={"level": "fine", "reasons": []}), 4, "damaged at verdict.level"),
    Case("cut", whole(RESULTS)[:-20], 4, "results.json is damaged"),
    Case("NaN", whole(RESULTS).replace(b"0.95", b"NaN"), 4, "results.json is damaged at measures.reward"),
    Case("no UTF-8", whole(RESULTS).replace(b"small", b"\xff"), 4, "results.json is damaged"),
    Case("a list", b"[]", 4, "does not hold results"),
    Case("another kind", with_(kind="x"), 4, "does not hold results"),
    Case("another schema", with_(schema=1), 4, "has schema 1"),
    *(
        Case(f"no {key}", without(key), 4, f"damaged at {key}")
        for key in ("task", "weights", "measures", "prompts", "images", "seen", "protocol_name")
    ),
    Case("no protocol", without("protocol"), 4, "damaged at protocol"),
    Case("another protocol", with_(protocol={"seed": 1, "judge": None}), 2, "seed: 1000 / 1"),
    Case("interval cut", with_(measures={"reward": SIDES | {"trained": {"mean": 1}}}), 4, "measures.reward.trained"),
    Case("mean a text", with_(measures={"reward": SIDES | {"base": INTERVAL | {"mean": "1"}}}), 4, "base.mean"),
    Case("bootstrap 0", with_(bootstrap=0), 4, "damaged at bootstrap"),
    Case("other prompts", with_(prompts=RESULTS["prompts"][:1]), 4, "damaged (images of unknown prompts)"),
    Case("geneval without tags", with_(task="geneval"), 4, "damaged (prompts without a tag)"),
    Case("another reward", with_(task="beauty"), 2, "there is no reward 'beauty'"),
    Case("fewer images", with_(images={"base": ROWS, "trained": ROWS[:1]}), 4, "other images than"),
    Case("row of another prompt", row(prompt_id="../../x"), 4, "damaged (images of unknown prompts)"),
    Case("value and reason", row(reason="x"), 4, "damaged at images.trained.0"),
    Case("interval without a mean", with_(measures={"u": SIDES | {"base": INTERVAL | {"mean": None}}}), 4, "base.mean"),
    Case("detail a text", row(details={"u": "3"}), 4, "is not a number"),
]


@rows(RESULT_FILES)
def test_results(case: Case, pair: Path) -> None:
    """The first run is intact. A comparison that fails leaves no files."""
    given = case.given
    if not isinstance(given, bytes):
        changed = copy.deepcopy(RESULTS)
        given(changed)
        given = json.dumps(changed).encode()
    (pair / "runs" / "two" / "results.json").write_bytes(given)
    check(outcome(lambda: compare.run(["one", "two"], workspace=pair)), case.code, case.words)
    assert (pair / "comparisons").exists() == (case.code == 0)


BESIDE = [
    Case("metrics cut in the middle", ("metrics.jsonl", b'{"step"\n{"step": 1}\n'), 4, "line 1 is damaged"),
    Case("recipe cut", ("recipe.json", b"{"), 4, "recipe.json is damaged"),
    Case("resolved recipe cut", ("resolved.json", b"{"), 4, "resolved.json is damaged"),
    Case("resolved recipe of another version", ("resolved.json", b'{"x": 1}'), 2, "x"),
    Case("times cut", ("stores.json", b"{"), 4, "stores.json is damaged"),
]


@rows(BESIDE)
def test_files_beside_results(case: Case, pair: Path) -> None:
    name, data = case.given
    (pair / "runs" / "two" / name).write_bytes(data)
    check(outcome(lambda: compare.run(["one", "two"], workspace=pair)), case.code, case.words)
    assert (pair / "comparisons").exists() == (case.code == 0)


def test_the_command_line_reports_the_same(pair: Path) -> None:
    (pair / "runs" / "two" / "results.json").write_bytes(b"{}")
    found = command("compare", "one", "two", "--out", str(pair))
    check(found, 4, "does not hold results")
