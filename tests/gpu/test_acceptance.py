"""The acceptance of a GPU on the pretended one, with tiny models: its rows, its exit codes, and what it does again."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.gpu.acceptance.sections import SECTIONS
from tests.gpu.conftest import Jobs

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]
KEYS = {"name", "section", "value", "wanted", "passed", "seconds", "commit", "device"}
WHOLE = "whole section"


def read(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "acceptance.jsonl").read_text().splitlines()]


def accept(out: Path, *arguments: str | Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "tests.gpu.acceptance", out, *arguments]
    surroundings = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run(command, env=surroundings, cwd=ROOT, capture_output=True, text=True, timeout=600)


def test_rows_and_report(library: Path, tmp_path: Path) -> None:
    """What the pretended GPU can show passes; what it cannot is skipped, and so is the section as a whole."""
    out, pretended = tmp_path / "out", ("--pretend", library, "--tiny", "--commit", "abc")
    done = accept(out, *pretended, "--sections", "4,8,11")
    assert done.returncode == 3, done.stdout[-2000:] + done.stderr[-2000:]
    rows = read(out)
    assert all(row.keys() == KEYS and row["commit"] == "abc" and row["seconds"] >= 0 for row in rows)
    assert {row["device"] for row in rows} == {"a pretended GPU"}
    passed = {row["name"] for row in rows if row["passed"]}
    skipped = [row for row in rows if row["passed"] is None]
    assert passed > {"native_math: difference", "shapes of an encoding", "first update: clipped share"}
    assert len(passed) + len(skipped) == len(rows)
    assert all(row["value"] == "skipped: not on this device" or row["name"] == WHOLE for row in skipped)
    assert [row["section"] for row in skipped if row["name"] == WHOLE] == [4, 8, 11]

    reported = accept(out, "--report", tmp_path / "measured")
    (file,) = (tmp_path / "measured").iterdir()
    assert reported.stdout.strip() == str(file) and file.name.startswith("a-pretended-gpu-20")
    report = json.loads(file.read_text())
    assert report["rows"] == rows and report["commit"] == ["abc"]
    assert (report["passed"], report["failed"], report["skipped"]) == (len(passed), 0, len(skipped))


def test_the_page_has_every_section() -> None:
    page = (ROOT / "docs/hardware.md").read_text(encoding="utf-8")
    _, _, table = page.partition("## Acceptance of a GPU")
    assert [int(number) for number in re.findall(r"^\| (\d+) \|", table, flags=re.MULTILINE)] == list(SECTIONS)


def test_faults_stops_and_second_runs(jobs: Jobs, tmp_path: Path) -> None:
    (output,) = jobs(["acceptance", tmp_path])
    codes = json.loads(output.splitlines()[-1])
    assert codes == [1, 1, 1, 3]

    # a gradient that is wrong in two passes; the second run, without the fault, adds no row
    failed = [row["name"] for row in read(tmp_path / "fault") if row["passed"] is False]
    assert failed == ["one pass: difference of the gradient from two passes", WHOLE]
    assert [row["name"] for row in read(tmp_path / "fault")].count(WHOLE) == 1

    # an error ends its section only
    error, last = (row for row in read(tmp_path / "error") if row["name"] == WHOLE)
    assert error["section"] == 8 and error["passed"] is False
    assert error["value"].startswith("RuntimeError: planted (") and last["section"] == 14

    # without time every section is a skipped row
    late = read(tmp_path / "late")
    assert [row["section"] for row in late] == list(range(16))
    assert all(row["passed"] is None and row["value"] == "skipped: the clock passed 0 s" for row in late)
