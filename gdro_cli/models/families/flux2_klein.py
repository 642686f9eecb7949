"""FLUX.2 klein, distilled and base (``Flux2KleinPipeline``): a smaller FLUX.2 with another text encoder.

Text: the hidden states after layers 9, 18 and 27 of Qwen3, side by side, for the prompt as a chat turn, padding
included. Guidance: the distilled models have none; base has classifier-free guidance away from the empty prompt, and
trains on the conditional velocity. The rest is that of ``flux2``.
"""

from __future__ import annotations

from typing import Any, ClassVar

from gdro_cli.models.base import GuidanceKind
from gdro_cli.models.families.flux2 import Flux2Flow
from gdro_cli.models.text import chat, tokenize


class Flux2KleinFlow(Flux2Flow):
    """FLUX.2 klein as a ``FlowModel``; conditioning: ``prompt_embeds`` [L, 3 D]."""

    family: ClassVar[str] = "flux2-klein"
    text_layers: ClassVar[tuple[int, int, int]] = (9, 18, 27)

    @property
    def guidance_kind(self) -> GuidanceKind:
        """``none`` for a distilled model, else ``cfg``."""
        return "none" if self.folder.setting("is_distilled") else "cfg"

    def _tokens(self, prompts: list[str]) -> Any:
        tokenizer = self._component("tokenizer")
        texts = chat(tokenizer, prompts, thinking=False)
        return tokenize(tokenizer, texts, length=self.max_sequence_length, prompts=prompts)
