"""The head of LAION's aesthetic predictor: linear layers on a direction of CLIP, without anything between them."""

from __future__ import annotations

import re
from itertools import pairwise
from typing import Any

from torch import Tensor
from torch.nn.functional import linear

from gdro_cli.errors import PrerequisiteError
from gdro_cli.rewards.pretrained import WeightFiles

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
        self._files = WeightFiles(model, key="reward.aesthetic.head")
        self._layers: list[tuple[Tensor, Tensor]] | None = None

    @property
    def version(self) -> dict[str, Any]:
        """The weights' Hub id and commit or digest."""
        return self._files.version

    def load(self, *, width: int) -> None:
        """Load the weights for directions of ``width`` numbers; a second call does nothing.

        Raises:
            PrerequisiteError: they are missing, damaged, or of another head.
        """
        if self._layers is not None:
            return
        source, found = self._files.source, dict[tuple[int, str], Tensor]()
        for name, tensor in self._files.read().items():
            if match := _LAYER.fullmatch(name):
                found[int(match[1]), match[2]] = tensor.float()
        numbers = sorted({number for number, part in found if part == "weight"})
        fits = bool(numbers) and all((number, "bias") in found for number in numbers)
        layers = [(found[number, "weight"], found[number, "bias"]) for number in numbers] if fits else []
        fits = fits and len(layers[-1][0]) == 1 and all(len(a[0]) == b[0].shape[1] for a, b in pairwise(layers))
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
