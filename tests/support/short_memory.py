"""A device with too little memory, planted on the CPU. As a program: a training whose process 1 has such a device."""

from __future__ import annotations

import os
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from gdro_cli.config.load import load_recipe
from gdro_cli.models.base import FlowModel
from gdro_cli.runtime.progress import Reporter
from gdro_cli.stages.setup.session import Session
from gdro_cli.stages.training import train


def plant(patch: pytest.MonkeyPatch, room: Callable[[int], int]) -> Counter[int]:
    """Let passes fail, except those that sample images.

    ``room`` gives, for a number of images, how many passes with gradient succeed before. Returns how many there were.
    """
    passes: Counter[int] = Counter()
    whole: Any = FlowModel.velocity

    def velocity(self: FlowModel, latents: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        images = len(latents)
        if not torch.is_inference_mode_enabled() and passes[images] >= room(images):
            raise torch.OutOfMemoryError("planted")
        passes[images] += torch.is_grad_enabled()
        return whole(self, latents, *args, **kwargs)  # type: ignore[no-any-return]

    patch.setattr(FlowModel, "velocity", velocity)
    return passes


if __name__ == "__main__":
    path, workspace, limit = sys.argv[1:]
    with pytest.MonkeyPatch.context() as patched:
        if os.environ["RANK"] == "1":
            plant(patched, lambda images: 0 if images > int(limit) else 99)
        reporter = Reporter(quiet=os.environ["RANK"] != "0")
        train.run(Session(load_recipe(path), Path(workspace), reporter))
