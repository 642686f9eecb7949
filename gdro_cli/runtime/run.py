"""A run: one folder that holds what was asked for, what came out, and enough to go on after a stop.

recipe.json       the resolved recipe
environment.json  versions and devices when the run began (environment-2.json ... if a later sitting differs)
manifest.json     schema, time, digests of the inputs; written last, so a folder without it is no run yet
metrics.jsonl     one JSON object per line, each with its ``kind`` and ``step``
lock              who works in the folder just now
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from gdro_cli.errors import StoreError
from gdro_cli.files import (
    append_bytes,
    json_lines,
    make_folder,
    parse_json,
    read_bytes,
    reading,
    refuse_links,
    write_bytes,
    write_json,
)
from gdro_cli.identity import differences
from gdro_cli.runtime.lock import folder_lock

SCHEMA = 1
_SHOWN = 8
"""Differences named in one message."""
_LONGEST = 200
"""Characters of a difference that a message shows."""
_TEXTS = ("kind", "protocol", "verdict")
"""The entries of a row of metrics that are texts; all others are numbers, or missing."""
_POINT = "validation"
"""The kind of row that an evaluation point has."""
_COUNTS = ("prompts", "images", "failed", "unjudged")
"""The entries that count something at an evaluation point."""
_OF_A_POINT = ("protocol", "reward", "prompts", "images")
"""What every evaluation point has."""


class RunFolder:
    """An opened run folder; make one with ``create_or_open``."""

    def __init__(self, path: Path) -> None:
        self.path = path

    @classmethod
    def create_or_open(
        cls,
        path: str | Path,
        *,
        recipe: Mapping[str, Any],
        inputs: Mapping[str, Any],
        environment: Mapping[str, Any],
    ) -> RunFolder:
        """Make the run, or go on with it if it was made from the same recipe and inputs.

        Args:
            path: the folder, made if missing.
            recipe: the resolved recipe as JSON values.
            inputs: digests of what the run reads (store, scores, model) as JSON values.
            environment: what ``environment()`` gives; it may change between sittings.

        Raises:
            StoreError: the folder belongs to another recipe or other inputs, is damaged, holds a link, or cannot be
                written to.
        """
        run = cls(Path(path))
        make_folder(run.path)
        refuse_links(each for folder in (run.path, run.path / "best") for each in folder.glob("*"))
        asked = {"recipe": _plain(recipe), "inputs": _plain(inputs)}
        if (run.path / "manifest.json").exists():
            manifest = run.read_object("manifest.json")
            if manifest.get("schema") != SCHEMA:
                raise StoreError(
                    f"run {run.path} has schema {manifest.get('schema')}, this version writes {SCHEMA}: "
                    "choose another folder with --out"
                )
            there = {"recipe": run.read_object("recipe.json"), "inputs": manifest.get("inputs")}
            changed = [str(difference) for difference in differences(there, asked)]
            if changed:
                raise StoreError(_refusal(run.path, changed))
            run._note_environment(_plain(environment))
            run._drop_torn_line()
            return run
        run.write_json("recipe.json", asked["recipe"])
        run.write_json("environment.json", _plain(environment))
        created = datetime.now(UTC).isoformat(timespec="seconds")
        run.write_json("manifest.json", {"schema": SCHEMA, "created": created, "inputs": asked["inputs"]})
        return run

    @property
    def recipe(self) -> dict[str, Any]:
        """The resolved recipe that the run was made from."""
        return self.read_object("recipe.json")

    # -- JSON files ---------------------------------------------------------------------------------------------

    def write_json(self, name: str, value: Any) -> Path:
        """Write a JSON file of the run at once; returns its path."""
        path = self.path / name
        write_json(path, value)
        return path

    def read_json(self, name: str) -> Any:
        """Read a JSON file of the run.

        Raises:
            StoreError: it is missing or damaged.
        """
        path = self.path / name
        try:
            return parse_json(read_bytes(path))
        except FileNotFoundError as error:
            raise StoreError(f"{path} is missing: the run cannot be read; start another with --out") from error
        except (OSError, ValueError) as error:
            raise _damaged(path) from error

    def read_object(self, name: str) -> dict[str, Any]:
        """The same for a file that must hold a JSON object."""
        value = self.read_json(name)
        if not isinstance(value, dict):
            raise _damaged(self.path / name)
        return value

    def _note_environment(self, environment: Any) -> None:
        """Keep a changed environment beside the first, numbered from 2."""
        known = sorted(self.path.glob("environment*.json"))
        if any(self.read_json(path.name) == environment for path in known):
            return
        self.write_json(f"environment-{len(known) + 1}.json", environment)

    # -- metrics ------------------------------------------------------------------------------------------------

    @property
    def metrics_path(self) -> Path:
        """Where the metrics are."""
        return self.path / "metrics.jsonl"

    def append_metrics(self, row: Mapping[str, Any]) -> None:
        """Add one line to the metrics; it survives a kill of the process as soon as this returns.

        Args:
            row: JSON values; ``step`` (int) is required, since resuming cuts the file by it, and ``kind``, by which
                rows are told apart.

        Raises:
            ValueError: the row has no step or no kind.
            StoreError: the file cannot be written to.
        """
        if not isinstance(row.get("step"), int) or not isinstance(row.get("kind"), str):
            raise ValueError("a row of metrics needs an integer 'step' and a 'kind'")
        append_bytes(self.metrics_path, json_lines([row]))

    def metrics(self) -> list[dict[str, Any]]:
        """Read all rows; a last line that was cut off by a crash is left out.

        Raises:
            StoreError: another line is damaged, or is not a row that a training writes.
        """
        rows = []
        for number, line in enumerate(self._metrics_bytes().split(b"\n")[:-1], start=1):
            try:
                rows.append(_row(parse_json(line)))
            except ValueError as error:
                raise StoreError(f"{self.metrics_path} line {number} is damaged: delete the line to go on") from error
        return rows

    def _drop_torn_line(self) -> None:
        """Cut off a last line that a crash left unfinished, so that the next row starts a line."""
        whole, newline, torn = self._metrics_bytes().rpartition(b"\n")
        if torn:
            write_bytes(self.metrics_path, whole + newline)

    def _metrics_bytes(self) -> bytes:
        """What is in the file; nothing where there is none. Raises StoreError."""
        if not self.metrics_path.exists():
            return b""
        if not self.metrics_path.is_file():  # a pipe would be waited for
            raise StoreError(f"{self.metrics_path} is no ordinary file: move it away and run the command again")
        with reading(self.metrics_path):
            return read_bytes(self.metrics_path)

    def truncate_metrics(self, after_step: int, *, unmeasured: bool = False) -> None:
        """Drop every row of a step beyond ``after_step``: those steps will be run again.

        With ``unmeasured`` the evaluation point of that step will be measured again, too.
        """
        if self.metrics_path.exists():
            rows = [row for row in self.metrics() if row["step"] <= after_step]
            kept = [row for row in rows if not (unmeasured and row["step"] == after_step and row["kind"] == _POINT)]
            write_bytes(self.metrics_path, json_lines(kept))

    # -- one writer ---------------------------------------------------------------------------------------------

    @contextmanager
    def lock(self) -> Iterator[None]:
        """Hold the folder for this process; see ``lock.folder_lock``."""
        with folder_lock(self.path / "lock"):
            yield


def _damaged(path: Path) -> StoreError:
    return StoreError(f"{path} is damaged: restore it or start another run with --out")


def _row(value: Any) -> dict[str, Any]:
    """A row of metrics. Raises ValueError for anything else."""
    if not isinstance(value, dict) or not _is_count(value.get("step")) or "kind" not in value:
        raise ValueError("a row of metrics is an object with a kind and a step")
    for key, entry in value.items():
        if not (isinstance(entry, str) if key in _TEXTS else entry is None or isinstance(entry, int | float)):
            raise ValueError(f"{key} has a value of another kind")
    if value["kind"] == _POINT:
        if any(value.get(name) is None for name in _OF_A_POINT):
            raise ValueError(f"an evaluation point has {', '.join(_OF_A_POINT)}")
        if not all(_is_count(value[name]) for name in _COUNTS if name in value):
            raise ValueError(f"{', '.join(_COUNTS)} are whole numbers of 0 or more")
    return value


def _is_count(value: Any) -> bool:
    return type(value) is int and value >= 0


def _refusal(path: Path, changed: list[str]) -> str:
    told = [each if len(each) <= _LONGEST else f"{each[: _LONGEST - 3]}..." for each in changed]
    shown = "; ".join(told[:_SHOWN])
    more = f"; and {len(changed) - _SHOWN} more" if len(changed) > _SHOWN else ""
    return f"run {os.fspath(path)} was made from something else ({shown}{more}): choose another folder with --out"


def _plain(value: Any) -> Any:
    """The value as it comes back from a JSON file (tuples become lists)."""
    return json.loads(json.dumps(value))
