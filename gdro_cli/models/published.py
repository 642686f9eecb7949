"""Configurations of well-known models as their makers published them, for what can be told without weights.

They come with the package (``published/*.json``: ids on the Hub, the pipeline's index, the components' configurations,
taken from the published repositories), so that ``--dry-run`` needs neither weights nor a network. Where text encoders
or autoencoder are not in the index, their configuration is not known here.
"""

from __future__ import annotations

import json
from functools import cache
from importlib.resources import files
from typing import Any

import torch

from gdro_cli.errors import PrerequisiteError
from gdro_cli.models.folder import PipelineFolder


@cache
def published_configurations() -> dict[str, dict[str, Any]]:
    """Name -> ``hub`` (ids), ``index`` (as in model_index.json) and ``configs`` (component name -> configuration)."""
    folder = files("gdro_cli.models").joinpath("published")
    found = sorted((entry.name, entry) for entry in folder.iterdir() if entry.name.endswith(".json"))
    return {name.removesuffix(".json"): json.loads(entry.read_text(encoding="utf-8")) for name, entry in found}


def published_name(path: str) -> str | None:
    """Name of the configurations of a model by its Hub id; None where there are none."""
    known = published_configurations()
    return next((name for name, entry in known.items() if path in entry["hub"]), None)


class PublishedFolder(PipelineFolder):
    """A pipeline folder of configurations alone.

    Args:
        name: of ``published_configurations``.
        path: what the model is called in messages; None = its first Hub id.
    """

    def __init__(self, name: str, *, path: str | None = None) -> None:
        entry = published_configurations()[name]
        self.path = path or entry["hub"][0]
        self._index = entry["index"]
        self._configs: dict[str, dict[str, Any]] = entry["configs"]
        self._repo = self._commit = None

    def config(self, name: str, *, file: str = "config.json") -> dict[str, Any]:
        """A component's configuration. Raises PrerequisiteError where it is not known."""
        if name not in self._configs:
            raise self._missing(name)
        return dict(self._configs[name])

    def load(self, name: str, *, dtype: torch.dtype | None = None, quantization: Any = None) -> Any:
        """Raises PrerequisiteError: there are no weights."""
        raise self._missing(name)

    @property
    def identity(self) -> dict[str, str | dict[str, str]]:
        """Raises PrerequisiteError: weights that are not here have no digest."""
        raise self._missing("weights")

    def _missing(self, name: str) -> PrerequisiteError:
        return PrerequisiteError(f"model {self.path} is not here, and {name} is more than its published configuration")
