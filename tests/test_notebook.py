"""docs/demo.ipynb: it runs, and the stored pictures are those of a run."""

from __future__ import annotations

from pathlib import Path

import nbformat
import pytest

from tests.support.notebook import NOTEBOOK, executed

pytestmark = pytest.mark.slow


def pictures_of(notebook: nbformat.NotebookNode) -> list[int]:
    """The number of pictures below each cell that has any."""
    counts = [
        sum("image/png" in output.get("data", {}) for output in cell.get("outputs", ())) for cell in notebook.cells
    ]
    return [count for count in counts if count]


def verdict_of(notebook: nbformat.NotebookNode) -> str:
    """The first word of the output of the last cell with code."""
    last = [cell for cell in notebook.cells if cell.cell_type == "code"][-1]
    return last.outputs[0].text.split()[0]


@pytest.mark.timeout(600)
def test_the_notebook_runs(tmp_path: Path) -> None:
    notebook = executed(tmp_path, recipe="smoke")
    assert pictures_of(notebook) == [1, 1, 1]
    assert verdict_of(notebook) in ("healthy", "suspicious", "collapsed")
    assert len(list((tmp_path / "gdro-out" / "runs").glob("smoke-*/report.html"))) == 1


def test_the_stored_notebook_shows_the_main_job() -> None:
    assert NOTEBOOK.stat().st_size < 300_000
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    assert pictures_of(notebook) == [1, 1, 1] and verdict_of(notebook) == "healthy"
    assert "/home/" not in str(notebook) and "/tmp/" not in str(notebook)
