"""docs/demo.ipynb, executed.

python -m tests.support.notebook      # runs the main job and writes the notebook with its pictures
"""

from __future__ import annotations

import os
import re
from pathlib import Path
from tempfile import TemporaryDirectory

import nbformat
from nbclient import NotebookClient

NOTEBOOK = Path(__file__).parents[2] / "docs" / "demo.ipynb"


def executed(folder: Path, *, recipe: str) -> nbformat.NotebookNode:
    """The notebook with its outputs, run in ``folder``. Raises ``CellExecutionError`` if a cell fails."""
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    client = NotebookClient(
        notebook,
        timeout=None,
        startup_timeout=300,
        record_timing=False,
        coalesce_streams=True,
        resources={"metadata": {"path": str(folder)}},
    )
    client.execute(env={**os.environ, "RECIPE": recipe, "OUT": "gdro-out"})
    return notebook


def without_progress(notebook: nbformat.NotebookNode) -> nbformat.NotebookNode:
    """The notebook without the lines that only say how much is left."""
    for output in (output for cell in notebook.cells for output in cell.get("outputs", ()) if "text" in output):
        output["text"] = re.sub(r"^.*\d left\b.*\n| +$", "", output["text"], flags=re.MULTILINE)
    return notebook


if __name__ == "__main__":
    with TemporaryDirectory() as name:
        nbformat.write(without_progress(executed(Path(name), recipe="ocr")), NOTEBOOK)
