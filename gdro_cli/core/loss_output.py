"""What every loss of groups returns."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from gdro_cli.core.flow import as_float


@dataclass(frozen=True, slots=True)
class LossOutput:
    """A loss and what is worth logging about it.

    Attributes:
        loss: scalar, mean of ``per_group``; carries the gradient.
        per_group: [B] loss of each group; carries the gradient.
        metrics: detached scalars. ``loss_floor`` is the lowest value that the loss can reach for these rewards (that
            of distributions: the entropy of the targets); the method's loss minus this is what is left to learn.
    """

    loss: Tensor
    per_group: Tensor
    metrics: dict[str, Tensor]


def checked(s: Tensor, rewards: Tensor) -> Tensor:
    """Return ``s`` [B, K] in at least float32. Raises ValueError unless the rewards have its shape."""
    if s.shape != rewards.shape or s.ndim != 2:
        raise ValueError(f"s and rewards must share one shape [B, K], got {list(s.shape)} and {list(rewards.shape)}")
    return as_float(s)
