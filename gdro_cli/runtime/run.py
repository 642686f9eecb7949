"""A run: one folder with what was requested, what came out, and enough to continue after a stop.

recipe.json       the resolved recipe
environment.json  versions and devices when the run began (environment-2.json ... if they differ later)
manifest.json     schema, time, digests of the inputs; written last, so a folder without it is not a run yet
metrics.jsonl     one JSON object per line, each with its ``kind`` and ``step``
lock              locked by the process that works in the folder, which lock.owner names
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from gdro_cli.errors import StoreError
from gdro_cli.files import (
    append_bytes,
    json_lines,
    make_folder,
    read_file,
    read_json,
    read_object,
    refuse_links,
    write_bytes,
    write_json,
)
from gdro_cli.identity import differences
from gdro_cli.runtime.lock import folder_lock
from gdro_cli.runtime.metrics import MetricsRow, ValidationRow, read_row

SCHEMA = 1
_REMEDY = "restore it, or start another run with --out"
_MOST_DIFFERENCES = 8
"""Differences that a message names."""
_MOST_CHARACTERS = 200
"""Characters of a difference that a message shows."""


class RunFolder:
    """A run folder; ``create_or_open`` makes one."""

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
        provenance: Mapping[str, Any] | None = None,
    ) -> RunFolder:
        """Make the run, or open it if it was made from the same recipe and inputs.

        Args:
            path: the folder, made if missing.
            recipe: the resolved recipe as JSON values.
            inputs: digests of what the run reads (store, scores, model).
            environment: from ``environment()``; it may change between two starts.
            provenance: what ``inputs`` are digests of; kept for messages.

        Raises:
            StoreError: the folder belongs to another recipe or other inputs, is damaged, contains a link, or cannot be
                written to.
        """
        run = cls(Path(path))
        make_folder(run.path)
        refuse_links(entry for folder in (run.path, run.path / "best") for entry in folder.glob("*"))
        if (run.path / "manifest.json").exists():
            run._refuse_other({"recipe": recipe, "inputs": inputs})
            run._note_environment(environment)
            run._drop_torn_line()
            return run
        run.write_json("recipe.json", recipe)
        run.write_json("environment.json", environment)
        created = datetime.now(UTC).isoformat(timespec="seconds")
        manifest = {"schema": SCHEMA, "created": created, "inputs": inputs}
        run.write_json("manifest.json", manifest | {"provenance": provenance or {}})
        return run

    @property
    def recipe(self) -> dict[str, Any]:
        """The resolved recipe that the run was made from."""
        return self.read_object("recipe.json")

    # -- JSON files ---------------------------------------------------------------------------------------------

    def write_json(self, name: str, value: Any) -> Path:
        """Write a JSON file of the run; returns its path."""
        path = self.path / name
        write_json(path, value)
        return path

    def read_json(self, name: str) -> Any:
        """The value in a JSON file of the run. Raises ``StoreError`` if it is missing or damaged."""
        return read_json(self.path / name, remedy=_REMEDY)

    def read_object(self, name: str) -> dict[str, Any]:
        """The object in a JSON file of the run. Raises ``StoreError`` also if it is another value."""
        return read_object(self.path / name, remedy=_REMEDY)

    def _refuse_other(self, source: Mapping[str, Any]) -> None:
        manifest = self.read_object("manifest.json")
        if manifest.get("schema") != SCHEMA:
            raise StoreError(
                f"run {self.path} has schema {manifest.get('schema')}, this version writes {SCHEMA}: "
                "choose another folder with --out"
            )
        own = {"recipe": self.recipe, "inputs": manifest.get("inputs")}
        changes = [str(difference)[:_MOST_CHARACTERS] for difference in differences(own, source)]
        if changes:
            more = [f"and {len(changes) - _MOST_DIFFERENCES} more"] if len(changes) > _MOST_DIFFERENCES else []
            raise StoreError(
                f"run {self.path} was made from something else ({'; '.join(changes[:_MOST_DIFFERENCES] + more)}): "
                "choose another folder with --out"
            )

    def _note_environment(self, environment: Mapping[str, Any]) -> None:
        """Write a changed environment beside the first, numbered from 2."""
        names = [path.name for path in self.path.glob("environment*.json")]
        if not any(self.read_json(name) == environment for name in names):
            self.write_json(f"environment-{len(names) + 1}.json", environment)

    # -- metrics ------------------------------------------------------------------------------------------------

    @property
    def metrics_path(self) -> Path:
        """The file of the metrics."""
        return self.path / "metrics.jsonl"

    def append_metrics(self, row: MetricsRow) -> None:
        """Add one row to the metrics; it survives a kill of the process as soon as this returns.

        Raises:
            StoreError: the file cannot be written to.
        """
        append_bytes(self.metrics_path, json_lines([row.to_json()]))

    def metrics(self) -> list[MetricsRow]:
        """Read all rows; a last line that was cut off by a crash is left out.

        Raises:
            StoreError: another line is damaged.
        """
        return [row for row, _ in self._rows()]

    def truncate_metrics(self, after_step: int, *, unmeasured: bool = False) -> None:
        """Drop every row of a step beyond ``after_step``: those steps will be run again.

        With ``unmeasured`` the evaluation point of that step will be measured again as well.
        """
        if self.metrics_path.exists():
            last_point = after_step - unmeasured
            kept = [
                line
                for row, line in self._rows()
                if row.step <= (last_point if isinstance(row, ValidationRow) else after_step)
            ]
            write_bytes(self.metrics_path, b"".join(line + b"\n" for line in kept))

    def _rows(self) -> Iterator[tuple[MetricsRow, bytes]]:
        """Each row with its line. Raises StoreError."""
        for number, line in enumerate(self._metrics_bytes().split(b"\n")[:-1], start=1):
            try:
                yield read_row(line), line
            except ValueError as error:
                raise StoreError(
                    f"{self.metrics_path} line {number} is damaged: delete the line to continue"
                ) from error

    def _drop_torn_line(self) -> None:
        """Cut off a last line that a crash left unfinished, so that the next row starts a line."""
        whole, newline, torn = self._metrics_bytes().rpartition(b"\n")
        if torn:
            write_bytes(self.metrics_path, whole + newline)

    def _metrics_bytes(self) -> bytes:
        """The content of the file, empty if there is none. Raises StoreError."""
        return read_file(self.metrics_path, remedy=_REMEDY) if self.metrics_path.exists() else b""

    # -- one writer ---------------------------------------------------------------------------------------------

    def lock(self) -> AbstractContextManager[None]:
        """Lock the folder for this process; see ``lock.folder_lock``."""
        return folder_lock(self.path / "lock")
