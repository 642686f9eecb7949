"""Configurations of well-known models as their makers published them, for all that needs no weights.

They come with the package (``published/*.json``: ids on the Hub, the pipeline's index, the components' configurations,
taken from the published repositories), so that ``--dry-run`` needs neither weights nor a network. Where text encoders
or autoencoder are not in the index, their configuration is not known here.
"""

from __future__ import annotations

import json
from functools import cache
from importlib.resources import files
from typing import Any

from gdro_cli.errors import PrerequisiteError
from gdro_cli.model_source import ModelSource
from gdro_cli.models.folder import PipelineFolder


@cache
def published_configurations() -> dict[str, dict[str, Any]]:
    """Name -> ``hub`` (ids), ``index`` (as in model_index.json) and ``configs`` (component name -> configuration)."""
    folder = files("gdro_cli.models").joinpath("published")
    entries = sorted((entry.name, entry) for entry in folder.iterdir() if entry.name.endswith(".json"))
    return {name.removesuffix(".json"): json.loads(entry.read_text(encoding="utf-8")) for name, entry in entries}


def published_name(path: str) -> str | None:
    """Name of the configurations of a model by its Hub id; None where there are none."""
    return next((name for name, entry in published_configurations().items() if path in entry["hub"]), None)


class PublishedFolder(PipelineFolder):
    """A pipeline folder of configurations alone: its weights can be neither loaded nor identified.

    Args:
        name: of ``published_configurations``.
        path: what the model is called in messages; None = its first Hub id.
    """

    def __init__(self, name: str, *, path: str | None = None) -> None:
        entry = published_configurations()[name]
        self.path = path or entry["hub"][0]
        self._source = ModelSource(self.path, key="model.path", fetch=False)
        self._index = entry["index"]
        self._configs: dict[str, dict[str, Any]] = entry["configs"]

    def config(self, name: str, *, file: str = "config.json") -> dict[str, Any]:
        """A component's configuration. Raises PrerequisiteError where it is not known."""
        if name not in self._configs:
            raise PrerequisiteError(
                f"model {self.path} is not on this machine, and {name} is not part of its published configuration: "
                f"{self._source.remedy}"
            )
        return dict(self._configs[name])
