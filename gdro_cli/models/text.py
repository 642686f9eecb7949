"""From prompts to token ids, and from hidden states to conditionings: what the families' text encoding shares."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

from torch import Tensor

from gdro_cli.errors import PrerequisiteError
from gdro_cli.models.base import Conditioning

_LOG = logging.getLogger(__name__)


def tokenize(
    tokenizer: Any, texts: Sequence[str], *, length: int, to_length: bool = True, prompts: Sequence[str] | None = None
) -> Any:
    """Return token ids and attention mask [N, L] of texts, cut to ``length`` tokens; a warning names each cut text.

    Args:
        tokenizer: a tokenizer of transformers.
        texts: the texts.
        length: the most tokens.
        to_length: pad to ``length``; otherwise to the longest text.
        prompts: what the warning names instead of a text that is a prompt inside a template.
    """
    whole = [len(tokenizer(text, verbose=False).input_ids) for text in texts]  # or the tokenizer itself would warn
    warn_of_cuts(whole, prompts or texts, length)
    padding = "max_length" if to_length else "longest"
    return tokenizer(list(texts), padding=padding, max_length=length, truncation=True, return_tensors="pt")


def warn_of_cuts(lengths: Sequence[int], prompts: Sequence[str], length: int) -> None:
    """Name each prompt whose text has more than ``length`` tokens in a warning."""
    for whole, prompt in zip(lengths, prompts, strict=True):
        if whole > length:
            _LOG.warning("prompt cut to %d of its %d text tokens: %s", length, whole, prompt)


def clip_ids(tokenizer: Any, prompts: list[str], *, length: int) -> Tensor:
    """Return CLIP's token ids [N, L], cut or padded to ``length`` without a warning: T5 reads long prompts."""
    tokens = tokenizer(prompts, padding="max_length", max_length=length, truncation=True, return_tensors="pt")
    ids: Tensor = tokens.input_ids
    return ids


def chat(tokenizer: Any, prompts: Sequence[str], *, thinking: bool) -> list[str]:
    """Return each prompt as the user's turn of the tokenizer's own chat template, up to the start of the answer.

    Raises:
        PrerequisiteError: the tokenizer has no template.
    """
    if tokenizer.chat_template is None:
        raise PrerequisiteError(
            f"the tokenizer in {tokenizer.name_or_path} has no chat template: fetch the pipeline folder again"
        )
    return [
        tokenizer.apply_chat_template(
            [{"role": "user", "content": prompt}], tokenize=False, add_generation_prompt=True, enable_thinking=thinking
        )
        for prompt in prompts
    ]


def split(batch: Conditioning) -> list[Conditioning]:
    """Split entries with a leading N into one conditioning per prompt."""
    count = len(next(iter(batch.values())))
    return [{key: value[i] for key, value in batch.items()} for i in range(count)]


def own_tokens(states: Tensor, mask: Tensor, *, skip: int = 0) -> list[Tensor]:
    """Hidden states [L_i, D] of each text's own tokens but the first ``skip``, from [N, L, D] and a mask [N, L]."""
    return [one[own.bool()][skip:] for one, own in zip(states, mask, strict=True)]
