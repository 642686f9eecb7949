"""Qwen-Image-Edit-2509 and -2511 (``QwenImageEditPlusPipeline``): a Qwen-Image-Edit that was trained on several images.

Here a prompt edits one image, the first picture of the pipeline's template. Text: Qwen2.5-VL sees the source image at
an area of about 384 x 384 pixels, whatever its size, so a text is shorter than that of ``qwen-image-edit``. Latents:
the pipeline itself brings the source to a megapixel; here it has the job's size, which ``pipeline_setup`` makes the
pipeline do. The transformer of 2511 gives the source's tokens the time of a clean image (``zero_cond_t``), which
needs nothing of the family. The rest is that of ``qwen-image-edit``.
"""

from __future__ import annotations

import functools
import math
from typing import Any, ClassVar

from gdro_cli.models.families.qwen_image_edit import QwenImageEditFlow

_PICTURE = "Picture 1: <|vision_start|><|image_pad|><|vision_end|>{}"
"""What the pipeline puts into its template for one image and the prompt."""
_SEEN_AREA, _SEEN_MULTIPLE = 384 * 384, 32
"""Pixels of an image as the text encoder sees it, and what its sides are multiples of."""


class QwenImageEditPlusFlow(QwenImageEditFlow):
    """Qwen-Image-Edit-2509 and -2511 as a ``FlowModel``."""

    family: ClassVar[str] = "qwen-image-edit-plus"
    pipeline_setup: ClassVar[str] = (
        "from diffusers.pipelines.qwenimage import pipeline_qwenimage_edit_plus as edit_plus\n"
        "edit_plus.calculate_dimensions = lambda area, ratio, own=edit_plus.calculate_dimensions: (\n"
        "    own(area, ratio) if area == edit_plus.CONDITION_IMAGE_SIZE else ($width, $height)  # of the source\n"
        ")"
    )

    @functools.cached_property
    def _template(self) -> tuple[str, int]:
        from diffusers import QwenImageEditPlusPipeline

        pipeline: Any = QwenImageEditPlusPipeline(None, None, None, None, None, None)
        return pipeline.prompt_template_encode.format(_PICTURE), int(pipeline.prompt_template_encode_start_idx)

    def _seen_size(self, *, height: int, width: int) -> tuple[int, int]:
        seen_width = math.sqrt(_SEEN_AREA * (width / height))
        sides = seen_width / (width / height), seen_width
        rows, columns = (round(side / _SEEN_MULTIPLE) * _SEEN_MULTIPLE for side in sides)
        return rows, columns
