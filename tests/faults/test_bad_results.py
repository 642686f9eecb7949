"""results.json, metrics and recipes of runs that are compared: sound, or one sentence that names the file."""

from __future__ import annotations

import copy
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from gdro_cli.data.imagefolder import PromptPictures
from gdro_cli.data.records import PromptRecord
from gdro_cli.files import parse_json, sha256
from gdro_cli.runtime.run import RunFolder
from gdro_cli.stages.comparison import compare
from gdro_cli.stages.evaluation.image_folder import _read
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
    "images": {"base": ROWS, "trained": copy.deepcopy(ROWS)},  # two, so that one may be changed
}


@pytest.fixture
def pair(tmp_path: Path) -> Path:
    """A workspace with two sound runs, ``one`` and ``two``."""
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
# What stands in results.json: bytes, or a change of sound results.
RESULT_FILES: list[Case] = [
    Case("sound", with_(), 0),
    Case("more than is known", with_(later={"x": [1]}), 0),
    Case("no verdict", with_(verdict=None), 0),
    Case("a measure without intervals", with_(measures={"reward": dict.fromkeys(SIDES)}), 0),
    Case("empty", b"", 4, "results.json is damaged"),
    Case("cut", whole(RESULTS)[:-20], 4, "results.json is damaged"),
    Case("brackets", b"[" * 100_000, 4, "results.json is damaged"),
    Case("half a character", with_(run="\ud800"), 4, "results.json is damaged"),
    Case("half a measure", with_(measures={"reward": SIDES, "\udfff": SIDES}), 4, "results.json is damaged"),
    Case("a whole pair", with_(run="\U0001f600"), 0),
    Case("NaN", whole(RESULTS).replace(b"0.95", b"NaN"), 4, "results.json is damaged"),
    Case("no UTF-8", whole(RESULTS).replace(b"small", b"\xff"), 4, "results.json is damaged"),
    Case("a list", b"[]", 4, "does not hold results"),
    Case("another kind", with_(kind="x"), 4, "does not hold results"),
    Case("another schema", with_(schema=1), 4, "has schema 1"),
    Case("schema a text", with_(schema="2"), 4, "has schema 2"),
    *(
        Case(f"no {key}", without(key), 4, f"damaged at {key}")
        for key in ("recipe", "task", "method", "run", "weights", "measures", "bootstrap", "prompts", "images")
    ),
    Case("no protocol", without("protocol"), 4, "damaged at protocol"),
    Case("protocol a list", with_(protocol=[1]), 4, "damaged at protocol"),
    Case("another protocol", with_(protocol={"seed": 1, "judge": None}), 2, "seed: 1000 / 1"),
    Case("measures empty", with_(measures={}), 4, "damaged at measures"),
    Case("measures a list", with_(measures=["reward"]), 4, "damaged at measures"),
    Case("measure null", with_(measures={"reward": None}), 4, "damaged at measures.reward"),
    Case("interval cut", with_(measures={"reward": SIDES | {"trained": {"mean": 1}}}), 4, "measures.reward.trained"),
    Case("interval with more", with_(measures={"reward": SIDES | {"base": INTERVAL | {"x": 1}}}), 4, "reward.base"),
    Case("mean a text", with_(measures={"reward": SIDES | {"base": INTERVAL | {"mean": "1"}}}), 4, "base.mean"),
    Case("strange measure", with_(measures={"../x <b>": SIDES, "reward": SIDES}), 0),
    Case("bootstrap 0", with_(bootstrap=0), 4, "damaged at bootstrap"),
    Case("bootstrap of years", with_(bootstrap=10**12), 4, "damaged at bootstrap"),
    Case("bootstrap a text", with_(bootstrap="100"), 4, "damaged at bootstrap"),
    Case("verdict a text", with_(verdict="healthy"), 4, "damaged at verdict"),
    Case("reasons a text", with_(verdict={"level": "healthy", "reasons": "x"}), 4, "damaged at verdict.reasons"),
    Case("method a text", with_(method="gdro"), 4, "damaged at method"),
    Case("weights without step", with_(weights={"kind": "ema", "checkpoint": "best"}), 4, "damaged at weights.step"),
    Case("failed below 0", with_(failed=-1), 4, "damaged at failed"),
    Case("prompts empty", with_(prompts=[]), 4, "damaged at prompts"),
    Case("prompt a text", with_(prompts=["a"]), 4, "damaged at prompts.0"),
    Case("metadata a list", with_(prompts=[RESULTS["prompts"][0] | {"metadata": []}]), 4, "prompts.0.metadata"),
    Case("other prompts", with_(prompts=RESULTS["prompts"][:1]), 4, "damaged at images"),
    Case("geneval without tags", with_(task="geneval"), 4, "damaged at prompts"),
    Case("images a list", with_(images=[]), 4, "damaged at images"),
    Case("no trained images", with_(images={"base": ROWS}), 4, "damaged at images.trained"),
    Case("fewer images", with_(images={"base": ROWS, "trained": ROWS[:1]}), 4, "other pictures than"),
    Case("row null", with_(images={"base": ROWS, "trained": [None]}), 4, "damaged at images.trained.0"),
    Case("row of another prompt", row(prompt_id="../../x"), 4, "damaged at images"),
    Case("index a text", row(index="0"), 4, "images.trained.0.index"),
    Case("index below 0", row(index=-1), 4, "images.trained.0.index"),
    Case("value a text", row(value="0.5"), 4, "images.trained.0.value"),
    Case("value infinite", row(value=float("inf")), 4, "results.json is damaged"),
    Case("value and reason", row(reason="x"), 4, "hold a damaged row"),
    Case("neither", row(value=None), 4, "hold a damaged row"),
    Case("details a list", row(details=[1]), 4, "images.trained.0.details"),
    Case("detail a text", row(details={"u": "3"}), 4, "is no number"),
    Case("detail a list", row(details={"u": [3]}), 4, "is no number"),
]


@rows(RESULT_FILES)
def test_results(case: Case, pair: Path) -> None:
    """The first run is sound; files of a comparison appear together with it, or not at all."""
    given = case.given
    if not isinstance(given, bytes):
        results = copy.deepcopy(RESULTS)
        given(results)
        given = json.dumps(results).encode()
    (pair / "runs" / "two" / "results.json").write_bytes(given)
    found = outcome(lambda: compare.run(["one", "two"], workspace=pair))
    check(found, case.code, case.words)
    assert (pair / "comparisons").exists() == (case.code == 0)


BESIDE = [
    Case("metrics cut in the middle", ("metrics.jsonl", b'{"step"\n{"step": 1}\n'), 4, "line 1 is damaged"),
    Case("metrics of texts", ("metrics.jsonl", b'"a"\n'), 4, "line 1 is damaged"),
    Case("a step up", ("metrics.jsonl", b'{"kind": "validation", "step": "../../x", "protocol": "p"}\n'), 4, "line 1"),
    Case(
        "a reward of text", ("metrics.jsonl", b'{"kind": "validation", "step": 1, "protocol": "p", "reward": "x"}\n'), 4
    ),
    Case("a row without a kind", ("metrics.jsonl", b'{"step": 1, "seconds": 1.0}\n'), 4, "line 1 is damaged"),
    Case("metrics empty", ("metrics.jsonl", b""), 0),
    Case("recipe a list", ("recipe.json", b"[]"), 4, "recipe.json is damaged"),
    Case("recipe cut", ("recipe.json", b"{"), 4, "recipe.json is damaged"),
    Case("recipe's train a list", ("recipe.json", b'{"name": "small", "train": [1]}'), 0),
    Case("recipe's train null", ("recipe.json", b'{"name": "small", "train": null}'), 0),
    Case("times cut", ("stores.json", b"{"), 4, "stores.json is damaged"),
    Case("times a number", ("stores.json", b"3"), 4, "stores.json is damaged"),
    Case("times of texts", ("stores.json", b'["a"]'), 4, "stores.json is damaged"),
]


@rows(BESIDE)
def test_what_lies_beside_results(case: Case, pair: Path) -> None:
    name, data = case.given
    (pair / "runs" / "two" / name).write_bytes(data)
    check(outcome(lambda: compare.run(["one", "two"], workspace=pair)), case.code, case.words)
    assert (pair / "comparisons").exists() == (case.code == 0)


def test_the_command_line_says_the_same(pair: Path) -> None:
    (pair / "runs" / "two" / "results.json").write_bytes(b"{}")
    found = command("compare", "one", "two", "--out", str(pair))
    check(found, 4, "does not hold results")


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere names of files are text")
def test_runs_whose_names_are_no_text(pair: Path) -> None:
    """They are listed, compared and drawn with their bytes spelt out, and what is written is UTF-8."""
    runs = pair / "runs"
    for old, new in (("one", b"a\xff"), ("two", b"b\xed\xa0\x80")):
        (runs / old).rename(runs / os.fsdecode(new))
    names = [os.fsdecode(name) for name in (b"a\xff", b"b\xed\xa0\x80")]
    check(command("runs", str(pair)), 0)
    check(command("compare", *names, "--out", str(pair)), 0)
    (folder,) = (pair / "comparisons").iterdir()
    written = {path.suffix: path.read_text(encoding="utf-8") for path in folder.iterdir()}
    assert "a\\xff" in written[".html"] and "b\\xed\\xa0\\x80" in written[".csv"]
    assert parse_json(written[".json"])["first"] == "a\\xff"
    check(command("compare", names[0], os.fsdecode(b"c\xff"), "--out", str(pair)), 2, "no run c\\xff in")


def trained(*without: str, **changes: Any) -> Change:
    """Another interval of the trained model."""
    interval = {name: value for name, value in {**INTERVAL, **changes}.items() if name not in without}
    return with_(measures={"reward": SIDES | {"trained": interval}})


SHOWN = [
    Case("sound", with_(), 0),
    Case("without counts", trained("prompts", "images", "level"), 0),
    Case("nothing measured", trained(mean=None, low=None, high=None), 0),
    *(Case(f"without {name}", trained(name), 4, f"reward.trained.{name}") for name in ("mean", "low", "high")),
    Case("low a text", trained(low="0.4"), 4, "reward.trained.low"),
    Case("high true", trained(high=True), 4, "reward.trained.high"),
    Case("a number", with_(measures={"reward": SIDES | {"base": 3}}), 4, "reward.base"),
    Case(
        "of a signal", with_(signals={"dark_share": SIDES | {"base": {"mean": 0.5}}}), 4, "signals.dark_share.base.low"
    ),
]


@rows(SHOWN)
def test_what_a_card_shows(case: Case, tmp_path: Path) -> None:
    results = copy.deepcopy(RESULTS | {"protocol_name": "p", "seen": 0})
    case.given(results)
    (tmp_path / "results.json").write_text(json.dumps(results))
    check(outcome(lambda: read_shown(RunFolder(tmp_path))), case.code, case.words)


PROMPT = PromptRecord.of("a sign", target="A")
ROW = json.dumps({"prompt_id": PROMPT.id, "index": 0, "value": 0.5, "reason": None, "details": {}}).encode()


def part(rows: bytes) -> bytes:
    """The file of a part whose rows are as they were written."""
    return json.dumps({"sha256": sha256(rows)}).encode() + b"\n" + rows


PARTS = [
    Case("sound", part(ROW), 0),
    Case("empty", b"", 4, "is damaged"),
    Case("no rows", part(b""), 4, "is damaged"),
    Case("cut", part(ROW)[:-3], 4, "is damaged"),
    Case("cut before it was written", part(ROW[:-3]), 4, "is damaged"),
    Case("twice", part(ROW + b"\n" + ROW), 4, "is damaged"),
    Case("another prompt", part(ROW.replace(PROMPT.id.encode(), b"../../x")), 4, "is damaged"),
    Case("another image", part(ROW.replace(b'"index": 0', b'"index": 1')), 4, "is damaged"),
    Case("a value of text", part(ROW.replace(b"0.5", b'"a"')), 4, "is damaged"),
    Case("another value since", part(ROW).replace(b"0.5", b"0.9"), 4, "is damaged"),
    Case("another digest", part(ROW).replace(b"sha256", b"sha512"), 4, "is damaged"),
    Case("a row for a digest", ROW + b"\n" + ROW, 4, "is damaged"),
    Case("brackets", b"[" * 100_000, 4, "is damaged"),
    Case("a number", b"3", 4, "is damaged"),
    Case("no UTF-8", b"\xff", 4, "is damaged"),
]


@rows(PARTS)
def test_a_part_of_a_scored_folder(case: Case, tmp_path: Path) -> None:
    path = tmp_path / "00000.jsonl"
    path.write_bytes(case.given)
    entries = (PromptPictures(PROMPT, (tmp_path / "0000.png",)),)
    check(outcome(lambda: _read(path, entries)), case.code, case.words)


CASES = [*RESULT_FILES, *BESIDE, *SHOWN, *PARTS]
