"""Tokenizers of the embedded model: whole words for the prompt's template, single letters for quoted text.

Both are transformers classes, so the pipeline treats them like FLUX's own.
"""

from __future__ import annotations

from transformers import CLIPTokenizer, T5Tokenizer

from gdro_cli.tiny.backgrounds import BACKGROUNDS
from gdro_cli.tiny.world import ALPHABET, COLOURS, NUMBERS, RELATIONS, SHAPES

T5_LENGTH = 26  # the longest sign prompt: 12 letters, a line break, 11 words and marks, an end token, one spare
CLIP_LENGTH = 32

_TEMPLATE = "a sign that says on background photo of and"


def template_words() -> list[str]:
    """All words of the world's prompts in lower case, in a fixed order."""
    relations = " ".join(RELATIONS).split()
    shapes = [*SHAPES, *(f"{shape}s" for shape in SHAPES)]
    words = [*_TEMPLATE.split(), *COLOURS, *BACKGROUNDS, *shapes, *NUMBERS.values(), *relations]
    return list(dict.fromkeys(words))


def build_t5_tokenizer() -> T5Tokenizer:
    """Unigram tokenizer: a template word, a quote or a letter is one token.

    The space between two quoted words is also a token, because the sign breaks its line there.
    """
    special = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", -100.0)]
    pieces = [(f"▁{word}", -1.0) for word in template_words()] + [('▁"', -1.0), ('"', -1.0), ("▁", -2.0)]
    letters = [(letter, -3.0) for letter in ALPHABET + ALPHABET.lower()]
    return T5Tokenizer(vocab=special + pieces + letters, extra_ids=0, model_max_length=T5_LENGTH)


def build_clip_tokenizer() -> CLIPTokenizer:
    """Byte-pair tokenizer whose merges build each template word; other text becomes single characters."""
    characters = [chr(code) for code in range(33, 127)]
    vocab = [*characters, *(f"{character}</w>" for character in characters)]
    merges: list[tuple[str, str]] = []
    for word in template_words():
        left = word[0]
        for i, character in enumerate(word[1:], start=1):
            right = character if i < len(word) - 1 else f"{character}</w>"
            if (left, right) not in merges:
                merges.append((left, right))
            left += right
    vocab += [left + right for left, right in merges] + ["<|startoftext|>", "<|endoftext|>"]
    ids = {piece: i for i, piece in enumerate(dict.fromkeys(vocab))}
    # The class takes pairs, although its annotation says otherwise.
    return CLIPTokenizer(vocab=ids, merges=merges, model_max_length=CLIP_LENGTH)  # type: ignore[arg-type]
