"""The schedule of a model: the noise levels of its sampling steps, from its pipeline's scheduler."""

from __future__ import annotations

import abc
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from gdro_cli.errors import UserError


class Scheduling(abc.ABC):
    """What a ``FlowModel`` does with its scheduler."""

    @abc.abstractmethod
    def _component(self, name: str) -> Any:
        """A component without weights, loaded once."""

    @abc.abstractmethod
    def grid(self, *, height: int, width: int) -> tuple[int, int]:
        """Return the token grid (rows, columns) of an image. Raises ``UserError`` if the size does not fit."""

    def sigmas(self, steps: int, *, height: int, width: int) -> Tensor:
        """Return the scheduler's schedule [steps + 1] with its shift for this size: float32, descending to 0.

        Raises:
            UserError: the schedule is not finite, as that of one step where the scheduler stretches it to end at
                ``shift_terminal`` (Qwen-Image): it divides 0 by 0, in diffusers' own pipeline as well.
        """
        scheduler, (rows, columns) = self._component("scheduler"), self.grid(height=height, width=width)
        config = scheduler.config
        unshifted = None if config.get("use_flow_sigmas") else self._unshifted(steps)
        with np.errstate(invalid="ignore", divide="ignore"):
            scheduler.set_timesteps(
                num_inference_steps=steps if unshifted is None else None,
                sigmas=unshifted,
                mu=self._shift(config, rows * columns, steps) if config.get("use_dynamic_shifting") else None,
            )
        schedule: Tensor = scheduler.sigmas
        if not schedule.isfinite().all():
            raise UserError(
                f"this model's scheduler has no noise levels for {steps} sampling step{'s' if steps > 1 else ''} (they"
                " are not finite numbers): raise the number of steps (sample.steps, eval.steps or"
                " method.train_sample_steps)"
            )
        return schedule.to("cpu", torch.float32).clone()

    def _unshifted(self, steps: int) -> npt.NDArray[np.float64] | None:
        """Sigmas [steps] before the scheduler shifts them, from 1 down; None = spaced by the scheduler."""
        return np.linspace(1.0, 1.0 / steps, steps)

    def _shift(self, config: Any, tokens: int, steps: int) -> float:
        """The schedule's shift exponent mu: linear in the number of image tokens (``calculate_shift``)."""
        low, high = config.get("base_image_seq_len", 256), config.get("max_image_seq_len", 4096)
        start, end = config.get("base_shift", 0.5), config.get("max_shift", 1.15)
        return float(start + (end - start) * (tokens - low) / (high - low))
