"""Qwen-Image-Edit (``QwenImageEditPipeline``): Qwen-Image that edits an image.

Text: Qwen2.5-VL sees the source image and the prompt in the pipeline's template, and its hidden states for both are the
text. Prompts are never cut, as in the pipeline. Latents: the source image is a second image after the drawn one.
Guidance: as in ``qwen-image``, but the negative prompt is encoded with each source image, so each conditioning has its
own. The pipeline itself brings the source to a megapixel (``calculate_dimensions``); here it has the job's size, which
``pipeline_setup`` makes the pipeline do. Of its processor only the settings for images are read, as the rest needs
torchvision.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any, ClassVar

from PIL import Image
from torch import Tensor

from gdro_cli.images import fit
from gdro_cli.models.base import Conditioning
from gdro_cli.models.families.editing import NEGATIVE, SOURCE, EditingFlow
from gdro_cli.models.families.qwen_image import QwenImageFlow
from gdro_cli.models.text import own_tokens

_PLACE = "<|image_pad|>"
"""The token that stands for the image in the template; a text has it once for each token of the image."""
_TOKEN_SIDE = 28
"""Pixels per side of one token of Qwen2.5-VL's image."""


class QwenImageEditFlow(EditingFlow, QwenImageFlow):
    """Qwen-Image-Edit as a ``FlowModel``.

    Conditioning: ``prompt_embeds`` and ``negative_prompt_embeds`` [L, D], L the length of image and prompt together.
    """

    family: ClassVar[str] = "qwen-image-edit"
    images_seen: ClassVar[int] = 2
    pipeline_setup: ClassVar[str] = (
        "from diffusers.pipelines.qwenimage import pipeline_qwenimage_edit\n"
        "pipeline_qwenimage_edit.calculate_dimensions = lambda area, ratio: ($width, $height, None)  # of the source"
    )

    def sized_shapes(self, tokens: int, *, height: int, width: int) -> dict[str, tuple[int, ...]]:
        """Image and text, and the source image's tokens in the transformer."""
        seen_height, seen_width = self._seen_size(height=height, width=width)
        seen = round(seen_height / _TOKEN_SIDE) * round(seen_width / _TOKEN_SIDE)
        return super().sized_shapes(tokens + seen, height=height, width=width)

    def _seen_size(self, *, height: int, width: int) -> tuple[int, int]:
        """Height and width of a source image of this size as the text encoder sees it: its own unless overridden."""
        return height, width

    def unconditional(self) -> Conditioning:
        """Return nothing: each conditioning has its own negative prompt."""
        return {}

    def away(self, conditioning: Conditioning) -> Conditioning:
        """Return the negative prompt beside the same source images."""
        own = {name.removeprefix(NEGATIVE): value for name, value in conditioning.items() if name.startswith(NEGATIVE)}
        return {**own, SOURCE: conditioning[SOURCE]}

    @functools.cached_property
    def _template(self) -> tuple[str, int]:
        from diffusers import QwenImageEditPipeline

        pipeline: Any = QwenImageEditPipeline(None, None, None, None, None, None)
        return str(pipeline.prompt_template_encode), int(pipeline.prompt_template_encode_start_idx)

    @functools.cached_property
    def _processor(self) -> Any:
        """Cuts images into patches."""
        from transformers import Qwen2VLImageProcessorPil

        return Qwen2VLImageProcessorPil.from_dict(self.folder.config("processor", file="preprocessor_config.json"))

    def _encode_edits(self, prompts: list[str], sources: Sequence[Image.Image]) -> list[Conditioning]:
        texts = self._states(prompts, sources)
        negative = self._states([self.negative_prompt] * len(prompts), sources)
        return [
            {"prompt_embeds": one, f"{NEGATIVE}prompt_embeds": other}
            for one, other in zip(texts, negative, strict=True)
        ]

    def _states(self, prompts: list[str], sources: Sequence[Image.Image]) -> list[Tensor]:
        """Hidden states [L_i, D] of each source image and prompt."""
        template, head = self._template
        height, width = self._seen_size(height=sources[0].height, width=sources[0].width)  # all have the job's size
        seen = [fit(source, height=height, width=width, how="stretch") for source in sources]
        images = self._processor(images=seen, return_tensors="pt").to(self.device)
        counts = (images["image_grid_thw"].prod(dim=1) // self._processor.merge_size**2).tolist()
        texts = [
            template.replace(_PLACE, _PLACE * count).format(prompt)
            for count, prompt in zip(counts, prompts, strict=True)
        ]
        tokens = self._component("tokenizer")(texts, padding=True, return_tensors="pt").to(self.device)
        encoder = self._network("text_encoder").base_model  # without the head: the logits are not needed
        mask = tokens.attention_mask
        states = encoder(
            input_ids=tokens.input_ids,
            attention_mask=mask,
            pixel_values=images["pixel_values"],
            image_grid_thw=images["image_grid_thw"],
            output_hidden_states=True,
        ).hidden_states[-1]
        return own_tokens(states, mask, skip=head)
