"""results.json, metrics and recipes of compared runs: intact, or one sentence that names the file."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from gdro_cli.runtime.run import RunFolder
from gdro_cli.stages.comparison import compare
from gdro_cli.stages.runs.results import read_shown
from tests.support.faulty import Case, check, command, outcome, rows

INTERVAL = {"mean": 0.5, "low": 0.4, "high": 0.6, "prompts": 2, "images": 2, "level": 0.95}
SIDES = {"base": INTERVAL, "trained": INTERVAL, "difference": INTERVAL}
ROWS = [{"prompt_id": f"{n:012x}", "index": 0, "value": 0.5, "reason": None, "details": {"u": 3.0}} for n in range(2)]
RESULTS: dict[str, Any] = {
    "kind": "gdro results",
    "schema": 2,
    "recipe": "small",
    "task": "ocr",
    "method": {"name": "gdro"},
    "run": "small",
    "protocol": {"seed": 1000, "judge": None},
    "weights": {"kind": "ema", "checkpoint": "best", "step": 4},
    "measures": {"reward": SIDES, "u": SIDES},
    "signals": {},
    "verdict": {"level": "healthy", "reasons": []},
    "failed": 0,
    "unjudged": 0,
    "bootstrap": 100,
    "grid": None,
    "prompts": [{"id": f"{n:012x}", "prompt": f"prompt {n}", "target": None, "metadata": {}} for n in range(2)],
    "images": {"base": ROWS, "trained": copy.deepcopy(ROWS)},  # a copy, so that a test can change one
}


@pytest.fixture
def pair(tmp_path: Path) -> Path:
    """A workspace with two intact runs, ``one`` and ``two``."""
    for name in ("one", "two"):
        folder = tmp_path / "runs" / name
        folder.mkdir(parents=True)
        (folder / "results.json").write_text(json.dumps(RESULTS))
        (folder / "recipe.json").write_text(json.dumps({"name": "small", "train": {"steps": 4}}))
        point = {"kind": "validation", "step": 4, "protocol": "p", "reward": 0.5, "prompts": 2, "images": 2}
        (folder / "metrics.jsonl").write_text(json.dumps(point) + "\n")
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
    Case("intact", with_(), 0),
    Case("no verdict", with_(verdict=None), 0),
    Case("cut", whole(RESULTS)[:-20], 4, "results.json is damaged"),
    Case("NaN", whole(RESULTS).replace(b"0.95", b"NaN"), 4, "results.json is damaged"),
    Case("no UTF-8", whole(RESULTS).replace(b"small", b"\xff"), 4, "results.json is damaged"),
    Case("a list", b"[]", 4, "does not hold results"),
    Case("another kind", with_(kind="x"), 4, "does not hold results"),
    Case("another schema", with_(schema=1), 4, "has schema 1"),
    *(
        Case(f"no {key}", without(key), 4, f"damaged at {key}")
        for key in ("task", "weights", "measures", "prompts", "images")
    ),
    Case("no protocol", without("protocol"), 4, "damaged at protocol"),
    Case("another protocol", with_(protocol={"seed": 1, "judge": None}), 2, "seed: 1000 / 1"),
    Case("interval cut", with_(measures={"reward": SIDES | {"trained": {"mean": 1}}}), 4, "measures.reward.trained"),
    Case("mean a text", with_(measures={"reward": SIDES | {"base": INTERVAL | {"mean": "1"}}}), 4, "base.mean"),
    Case("bootstrap 0", with_(bootstrap=0), 4, "damaged at bootstrap"),
    Case("other prompts", with_(prompts=RESULTS["prompts"][:1]), 4, "damaged at images"),
    Case("geneval without tags", with_(task="geneval"), 4, "damaged at prompts"),
    Case("fewer images", with_(images={"base": ROWS, "trained": ROWS[:1]}), 4, "other pictures than"),
    Case("row of another prompt", row(prompt_id="../../x"), 4, "damaged at images"),
    Case("value and reason", row(reason="x"), 4, "hold a damaged row"),
    Case("detail a text", row(details={"u": "3"}), 4, "is not a number"),
]


@rows(RESULT_FILES)
def test_results(case: Case, pair: Path) -> None:
    """The first run is intact. A comparison that fails leaves no files."""
    given = case.given
    if not isinstance(given, bytes):
        results = copy.deepcopy(RESULTS)
        given(results)
        given = json.dumps(results).encode()
    (pair / "runs" / "two" / "results.json").write_bytes(given)
    check(outcome(lambda: compare.run(["one", "two"], workspace=pair)), case.code, case.words)
    assert (pair / "comparisons").exists() == (case.code == 0)


BESIDE = [
    Case("metrics cut in the middle", ("metrics.jsonl", b'{"step"\n{"step": 1}\n'), 4, "line 1 is damaged"),
    Case("recipe cut", ("recipe.json", b"{"), 4, "recipe.json is damaged"),
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
    check(command("compare", "one", "two", "--out", str(pair)), 4, "does not hold results")


def trained(*without: str, **changes: Any) -> Change:
    """Another interval of the trained model."""
    interval = {name: value for name, value in {**INTERVAL, **changes}.items() if name not in without}
    return with_(measures={"reward": SIDES | {"trained": interval}})


SHOWN = [
    Case("intact", with_(), 0),
    Case("nothing measured", trained(mean=None, low=None, high=None), 0),
    *(Case(f"without {name}", trained(name), 4, f"reward.trained.{name}") for name in ("mean", "low", "high")),
    Case("low a text", trained(low="0.4"), 4, "reward.trained.low"),
]


@rows(SHOWN)
def test_what_a_card_shows(case: Case, tmp_path: Path) -> None:
    results = copy.deepcopy(RESULTS | {"protocol_name": "p", "seen": 0})
    case.given(results)
    (tmp_path / "results.json").write_text(json.dumps(results))
    check(outcome(lambda: read_shown(RunFolder(tmp_path))), case.code, case.words)
