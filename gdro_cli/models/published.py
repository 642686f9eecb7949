"""Configurations of well-known models as their makers published them, for everything that needs no weights.

They are part of the package (``published/*.json``: Hub ids, the pipeline's index and the components' configurations,
from the published repositories), so ``--dry-run`` needs neither weights nor a network. A component that the index lacks
has no configuration here.
"""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

from gdro_cli.errors import PrerequisiteError
from gdro_cli.model_source import ModelSource
from gdro_cli.models.folder import PipelineFolder


@cache
def published_configurations() -> dict[str, dict[str, Any]]:
    """Name -> ``hub`` (ids), ``index`` (as in model_index.json) and ``configs`` (component name -> configuration).

    In the file of a model with the configurations of another one, ``configs`` is the other one's name.
    """
    files = sorted((Path(__file__).parent / "published").glob("*.json"))
    entries = {file.stem: json.loads(file.read_text(encoding="utf-8")) for file in files}
    others = {name: entries[entry["configs"]] for name, entry in entries.items() if isinstance(entry["configs"], str)}
    return entries | {name: entries[name] | {"configs": other["configs"]} for name, other in others.items()}


def published_name(path: str) -> str | None:
    """Return the name of the configurations of a model by its Hub id; None if there are none."""
    return next((name for name, entry in published_configurations().items() if path in entry["hub"]), None)


class PublishedFolder(PipelineFolder):
    """A pipeline folder with configurations only: its weights can be neither loaded nor identified.

    Args:
        name: a key of ``published_configurations``.
        path: name of the model in messages; None = its first Hub id.
    """

    def __init__(self, name: str, *, path: str | None = None) -> None:
        entry = published_configurations()[name]
        self.path = path or entry["hub"][0]
        self._source = ModelSource(self.path, key="model.path", fetch=False)
        self._index = entry["index"]
        self._configs: dict[str, dict[str, Any]] = entry["configs"]

    def config(self, name: str, *, file: str = "config.json") -> dict[str, Any]:
        """A component's configuration. Raises PrerequisiteError if it is unknown."""
        if name not in self._configs:
            raise PrerequisiteError(
                f"model {self.path} is not on this machine, and {name} is not part of its published configuration: "
                f"{self._source.remedy}"
            )
        return dict(self._configs[name])
