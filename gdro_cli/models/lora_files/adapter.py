"""An adapter in memory, whatever file it came from."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True, slots=True)
class Adapter:
    """Low-rank updates ``s B A`` of a transformer's linear layers; ranks and scales may differ between layers."""

    pairs: Mapping[str, tuple[Tensor, Tensor]]
    """Layer, by diffusers' name inside the transformer -> (A [r, in], B [out, r]), float32."""
    scales: Mapping[str, float]
    """The same layers -> s."""

    def folded(self) -> dict[str, tuple[Tensor, Tensor]]:
        """Layer -> (A, s B): the same updates with s = 1, for readers that know no scale."""
        return {layer: (down, self.scales[layer] * up) for layer, (down, up) in self.pairs.items()}
