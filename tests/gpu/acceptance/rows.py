"""The rows of an acceptance: written one by one as they are known, read to continue and to report.

A row has ``name``, ``section``, ``value``, ``wanted``, ``passed``, ``seconds``, ``commit`` and ``device``. ``passed``
is null where a check was skipped, which is not passed; ``value`` then says why. The row ``whole section`` ends a
section.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Iterable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from gdro_cli.files import write_json

FILE = "acceptance.jsonl"
WHOLE = "whole section"
NOT_HERE = "not on this device"

Row = dict[str, Any]


class Journal:
    """The file of rows in a folder."""

    def __init__(self, folder: Path, *, commit: str | None, device: str) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.path, self._source = folder / FILE, {"commit": commit, "device": device}

    def append(self, row: Row) -> None:
        """Write a row to the disk, with the commit and the device."""
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps({**row, **self._source}) + "\n")

    def rows(self) -> list[Row]:
        """The rows of this commit on this device."""
        return [row for row in read_rows(self.path) if self._source.items() <= row.items()]

    def done(self) -> set[int]:
        """The sections that came to their end, well or badly."""
        return {row["section"] for row in self.rows() if row["name"] == WHOLE and not _is_skip(row["value"])}


def read_rows(path: Path) -> list[Row]:
    """The newest row of each check; a line that a kill cut off is left out."""
    newest: dict[tuple[int, str], Row] = {}
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else ():
        try:
            row = json.loads(line)
        except ValueError:
            continue
        newest[row["section"], row["name"]] = row
    return list(newest.values())


class Section:
    """The checks of one section. A value that is None has no meaning on this device: the check is skipped."""

    def __init__(self, number: int, journal: Journal) -> None:
        self.number, self._journal = number, journal
        self._states: dict[str, bool | None] = {}
        self._began = self._last = time.perf_counter()

    def row(self, name: str, value: Any, wanted: Any, passed: bool | None) -> None:
        """Write a row; its seconds are those since the row before."""
        now = time.perf_counter()
        if name in self._states:
            raise ValueError(f"section {self.number} has two rows named {name!r}")
        self._states[name] = passed
        seconds, self._last = now - (self._began if name == WHOLE else self._last), now
        self._journal.append(
            {
                "name": name,
                "section": self.number,
                "value": _short(value),
                "wanted": _short(wanted),
                "passed": passed,
                "seconds": round(seconds, 3),
            }
        )
        state = {True: "passed", False: "FAILED", None: "skipped"}[passed]
        print(f"{self.number:>2}  {state:<8}{name}: {_short(value)} (wanted: {_short(wanted)})", flush=True)  # noqa: T201

    def skip(self, name: str, reason: str = NOT_HERE) -> None:
        self.row(name, f"skipped: {reason}", None, None)

    def check(self, name: str, passed: bool, value: Any, wanted: Any) -> None:
        """A check that the caller decides."""
        self.row(name, value, wanted, bool(passed))

    def at_most(self, name: str, value: float | None, limit: float) -> None:
        self._number(name, value, f"at most {limit:.6g}", lambda found: found <= limit)

    def at_least(self, name: str, value: float | None, limit: float) -> None:
        self._number(name, value, f"at least {limit:.6g}", lambda found: found >= limit)

    def near(self, name: str, value: float | None, wanted: float, *, within: float) -> None:
        """A number that may differ from the wanted one by the share ``within``."""
        text = f"{wanted:.6g} within {within:.0%}"
        self._number(name, value, text, lambda found: abs(found - wanted) <= within * abs(wanted))

    def figure(self, name: str, value: float | None, *, note: str = "a figure above 0") -> None:
        """A measurement without a bound."""
        self._number(name, value, note, lambda found: found > 0)

    def _number(self, name: str, value: float | None, wanted: str, holds: Any) -> None:
        if value is None:
            self.row(name, f"skipped: {NOT_HERE}", wanted, None)
        else:
            self.row(name, value, wanted, math.isfinite(value) and bool(holds(value)))

    def exit_code(self, name: str, ended: tuple[int, str], wanted: int = 0) -> None:
        """The exit code of a process; with another one, also the end of what it printed."""
        code, said = ended
        self.check(f"{name}: exit code", code == wanted, code if code == wanted else f"{code}: {said[-500:]}", wanted)

    def end(self) -> None:
        states = self._states.values()
        if False in states:
            self.row(WHOLE, "a check failed", "all checks pass", False)
        elif None in states:
            self.row(WHOLE, "complete but for skipped checks", "all checks pass", None)
        else:
            self.row(WHOLE, "complete", "all checks pass", True)

    def raised(self, error: Exception) -> None:
        """End with an error: its first line, and where it came from."""
        trace, place = error.__traceback__, ""
        while trace is not None:
            code = trace.tb_frame.f_code
            if "site-packages" not in code.co_filename:
                place = f"{Path(code.co_filename).name}:{trace.tb_lineno}"
            trace = trace.tb_next
        first = (str(error).splitlines() or [""])[0][:300]
        self.row(WHOLE, f"{type(error).__name__}: {first} ({place})", "no error", False)


def _is_skip(value: Any) -> bool:
    return isinstance(value, str) and value.startswith("skipped:")


def _short(value: Any) -> Any:
    """Six digits of a number; not-a-number and infinity, which JSON lacks, as text."""
    if isinstance(value, float):
        return float(f"{value:.6g}") if math.isfinite(value) else str(value)
    if isinstance(value, dict):
        return {key: _short(one) for key, one in value.items()}
    return [_short(one) for one in value] if isinstance(value, list | tuple) else value


def exit_code(rows: Iterable[Row]) -> int:
    """0 = every row passed, 1 = a row failed, 3 = none failed, but some were skipped."""
    states = [row["passed"] for row in rows]
    return 1 if False in states else 3 if None in states or not states else 0


def write_report(folder: Path, target: Path) -> Path:
    """Write a folder's rows with commit, versions and counts to ``target``/<card>-<date>.json; returns the path."""
    rows = read_rows(folder / FILE)
    if not rows:
        raise SystemExit(f"{folder} has no {FILE} with rows: run the acceptance into it first")
    surroundings = next((row["value"] for row in rows if row["name"] == ENVIRONMENT), {})
    states = [row["passed"] for row in rows]
    report = {
        "commit": sorted({str(row["commit"]) for row in rows}),
        "device": sorted({row["device"] for row in rows}),
        "environment": surroundings,
        "passed": states.count(True),
        "failed": states.count(False),
        "skipped": states.count(None),
        "rows": rows,
    }
    card = rows[0]["device"].lower().removeprefix("nvidia ").replace(" ", "-")
    date = datetime.fromtimestamp((folder / FILE).stat().st_mtime, UTC).date().isoformat()
    path = target / f"{card}-{date}.json"
    target.mkdir(parents=True, exist_ok=True)
    write_json(path, report)
    return path


ENVIRONMENT = "environment"
"""The row of section 0 with versions and devices."""
