"""The optimizers that a recipe can name."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch

from gdro_cli.errors import PrerequisiteError

OptimizerKind = Literal["adamw", "adamw8bit"]


def check_optimizer(kind: OptimizerKind) -> None:
    """Raise PrerequisiteError if the optimizer's package cannot be imported."""
    if kind == "adamw8bit":
        _adamw8bit()


def make_optimizer(
    kind: OptimizerKind,
    parameters: Sequence[torch.nn.Parameter],
    *,
    lr: float,
    betas: tuple[float, float],
    weight_decay: float,
) -> torch.optim.Optimizer:
    """AdamW, or AdamW with both moments in 8 bits (arXiv 2110.02861) and one float32 scale per 256 values.

    In the 8-bit optimizer a parameter of fewer than 4,096 values keeps 32-bit moments.

    Raises:
        PrerequisiteError: bitsandbytes is not installed.
    """
    if kind == "adamw":
        return torch.optim.AdamW(parameters, lr=lr, betas=betas, weight_decay=weight_decay)
    return _adamw8bit()(parameters, lr=lr, betas=betas, weight_decay=weight_decay)  # type: ignore[call-arg]


def _adamw8bit() -> type[torch.optim.Optimizer]:
    try:
        import bitsandbytes.optim as optim
    except ImportError as error:
        raise PrerequisiteError(
            "train.optimizer adamw8bit needs the package bitsandbytes: run `pip install 'gdro_cli[bitsandbytes]'`, or"
            " set train.optimizer=adamw (docs/memory.md)"
        ) from error
    eight_bit: type[torch.optim.Optimizer] = optim.AdamW8bit  # type: ignore[attr-defined]
    return eight_bit
