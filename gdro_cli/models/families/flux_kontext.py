"""FLUX.1 Kontext (``FluxKontextPipeline``): FLUX.1 that edits an image.

The source image is a second image at the same positions, told apart by the first number of each position. The pipeline
itself brings the source to one of 17 sizes of about a megapixel (``_auto_resize``) and the drawn image to a megapixel
(``max_area``); here both have the job's size, so ``pipeline_call`` turns that off. The rest is that of ``flux``.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor

from gdro_cli.models.families.editing import EditingFlow
from gdro_cli.models.families.flux import FluxFlow


class FluxKontextFlow(EditingFlow, FluxFlow):
    """FLUX.1 Kontext as a ``FlowModel``."""

    family: ClassVar[str] = "flux-kontext"

    def pipeline_call(self, *, steps: int, guidance: float, height: int, width: int) -> dict[str, Any]:
        """Return the arguments, prompt and source image aside, with which the pipeline draws the same image."""
        call = super().pipeline_call(steps=steps, guidance=guidance, height=height, width=width)
        return {**call, "max_area": height * width, "_auto_resize": False}

    def _image_positions(self, grid: tuple[int, int]) -> Tensor:
        drawn = super()._image_positions(grid)
        return torch.cat([drawn, drawn + drawn.new_tensor([1, 0, 0])])
