"""The head of LAION's aesthetic predictor: linear layers on a direction of CLIP, without anything between them."""

from __future__ import annotations

import re
from itertools import pairwise
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor
from torch.nn.functional import linear

from gdro_cli.errors import PrerequisiteError
from gdro_cli.model_source import WEIGHTS, ModelSource

_LAYER = re.compile(r"(?:mlp\.)?layers\.(\d+)\.(weight|bias)")


class AestheticHead:
    """The head's weights. Constructing one loads nothing.

    Args:
        model: folder or Hub id of the weights: ``layers.0.weight``, ``layers.0.bias``, ``layers.2.weight``, ..., also
            under ``mlp.`` and beside other weights.

    Raises:
        PrerequisiteError: the folder does not exist, or has no weights.
    """

    def __init__(self, model: str) -> None:
        self._source = ModelSource(model, key="reward.aesthetic.head")
        self._layers: list[tuple[Tensor, Tensor]] | None = None
        if self._source.on_hub:
            self._source.in_cache(WEIGHTS)  # knows the commit of weights that are there
        else:
            self._source.require(WEIGHTS)

    @property
    def version(self) -> dict[str, Any]:
        """The weights' Hub id and commit or digest."""
        if self._source.on_hub and self._source.commit is None:
            self._source.get(WEIGHTS)
        return self._source.version(WEIGHTS)

    def load(self, *, width: int) -> None:
        """Load the weights for directions of ``width`` numbers; a second call does nothing.

        Raises:
            PrerequisiteError: they are missing, damaged, or of another head.
        """
        if self._layers is not None:
            return
        source, found = self._source, dict[tuple[int, str], Tensor]()
        try:
            for file in sorted(source.get(WEIGHTS).glob(WEIGHTS)):
                for name, tensor in load_file(file).items():
                    if match := _LAYER.fullmatch(name):
                        found[int(match[1]), match[2]] = tensor.float()
            numbers = sorted({number for number, _ in found})
            layers = [(found[number, "weight"], found[number, "bias"]) for number in numbers]
            fits = bool(layers) and len(layers[-1][0]) == 1
            fits = fits and all(len(a[0]) == b[0].shape[1] for a, b in pairwise(layers))
        except (OSError, SafetensorError, KeyError) as error:
            raise PrerequisiteError(f"model {source.name} cannot be read ({error}): {source.remedy}") from error
        if fits and layers[0][0].shape[1] != width:
            raise PrerequisiteError(
                f"model {source.name} is a head for directions of {layers[0][0].shape[1]} numbers, and those of"
                f" reward.aesthetic.model have {width}: set it to the CLIP that the head was trained on"
            )
        if not fits:
            raise PrerequisiteError(f"model {source.name} is not LAION's aesthetic head: {source.remedy}")
        self._layers = layers

    def __call__(self, directions: Tensor) -> list[float]:
        """The aesthetic scores of directions [N, D]."""
        self.load(width=directions.shape[1])
        hidden = directions.cpu()
        for weight, bias in self._layers or ():
            hidden = linear(hidden, weight, bias)
        scores: list[float] = hidden.squeeze(-1).tolist()
        return scores

    def __getstate__(self) -> dict[str, Any]:
        """Everything but the loaded weights, so that a reward can be sent to a worker process."""
        return {**self.__dict__, "_layers": None}
