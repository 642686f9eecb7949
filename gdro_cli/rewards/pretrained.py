"""The files of a transformers model that a reward needs: a local folder, or a repository of the Hugging Face Hub.

A repository in the Hub's cache is read from there without any network request. Otherwise the small files are fetched
when the reward is constructed, and the weights when it is loaded.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from gdro_cli.errors import PrerequisiteError, UserError
from gdro_cli.model_source import WEIGHTS, ModelSource

_CONFIG = "config.json"
_SMALL = ("*.json", "*.txt")
_PROCESSOR = ("preprocessor_config.json", "processor_config.json")


class ModelFiles:
    """The files of one model. Constructing this reads ``config.json`` and loads nothing.

    Args:
        model: a folder with ``config.json`` and ``*.safetensors``, or a Hub id like ``owner/name``.
        key: the recipe's key that names the model, for error messages.
        kind: the ``model_type`` that ``config.json`` must name.
        needs: further small files; one of each group of names must exist.
        weights: whether a folder must hold weights; False for a model whose small files alone are used.

    Raises:
        PrerequisiteError: the folder or its files are missing, or the repository cannot be fetched.
        UserError: the model is of another kind.
    """

    def __init__(
        self,
        model: str | Path,
        *,
        key: str,
        kind: str,
        needs: Sequence[Sequence[str]] = (_PROCESSOR,),
        weights: bool = True,
    ) -> None:
        self._source = ModelSource(model, key=key)
        if self._source.on_hub and not self._source.in_cache(_CONFIG, WEIGHTS):
            self._source.get(*_SMALL)
        self._source.require(_CONFIG, *needs, *((WEIGHTS,) if weights and not self._source.on_hub else ()))
        self.config = self._source.read_json(_CONFIG)
        actual = self.config.get("model_type")
        if actual != kind:
            raise UserError(f"`{key}` names {model}, a model of the type {actual}; it must be of the type {kind}")

    @functools.cached_property
    def version(self) -> dict[str, Any]:
        """The model's Hub id and commit or the digest of its files (read once), and the version of transformers."""
        return {**self._source.version(*_SMALL, WEIGHTS), "transformers": metadata.version("transformers")}

    def load_model(self, cls: Any, *, device: str) -> Any:
        """The model of the class ``cls`` in float32, for inference, on ``device`` (see ``pick_device``).

        Raises:
            PrerequisiteError: the weights are missing, damaged or not those of this model.
        """
        if self._source.on_hub and not self._source.in_cache(WEIGHTS):
            self._source.get(*_SMALL, WEIGHTS)
        # The files could name an attention implementation that is code from the Hub.
        attention = "sdpa" if cls._supports_sdpa else "eager"
        model = self._source.load(cls, dtype=torch.float32, attn_implementation=attention)
        return model.eval().requires_grad_(False).to(pick_device(device))

    def load_part(self, cls: Any) -> Any:
        """A tokenizer or image processor of the class ``cls``. Raises ``PrerequisiteError``."""
        return self._source.load(cls)


class WeightFiles:
    """Weights without a configuration: all ``*.safetensors`` of a folder or Hub id. Constructing this loads nothing.

    Raises:
        PrerequisiteError: the folder does not exist, or has no weights.
    """

    def __init__(self, model: str, *, key: str) -> None:
        self.source = ModelSource(model, key=key)
        if self.source.on_hub:
            self.source.in_cache(WEIGHTS)  # knows the commit of weights that are there
        else:
            self.source.require(WEIGHTS)

    @property
    def version(self) -> dict[str, str]:
        """The Hub id and commit, or the digest of the files. Raises ``PrerequisiteError``."""
        if self.source.on_hub and self.source.commit is None:
            self.source.get(WEIGHTS)
        return self.source.version(WEIGHTS)

    def read(self) -> dict[str, Tensor]:
        """All weights by name, on the CPU. Raises ``PrerequisiteError`` if they are missing or damaged."""
        source, weights = self.source, dict[str, Tensor]()
        try:
            for file in sorted(source.get(WEIGHTS).glob(WEIGHTS)):
                weights |= load_file(file)
        except (OSError, SafetensorError) as error:
            raise PrerequisiteError(f"model {source.name} cannot be read ({error}): {source.remedy}") from error
        return weights


def pick_device(device: str) -> torch.device:
    """The device of that name; ``auto`` is ``cuda`` if there is a GPU, else ``cpu``."""
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    return torch.device(device)
