"""A CLIP of the real classes with few random weights."""

from __future__ import annotations

import string
from pathlib import Path

import torch

SIZE = 32
"""Pixels of a side of its input."""


def tiny_clip(path: Path) -> Path:
    """A CLIP with few random weights, a tokenizer of single letters, and an image processor for 32 x 32 pixels."""
    from transformers import CLIPConfig, CLIPModel, CLIPTokenizer
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    letters = [*string.ascii_lowercase, "-"]
    words = [*letters, *(f"{letter}</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    vocabulary = {word: number for number, word in enumerate(words)}
    tokenizer = CLIPTokenizer(vocab=vocabulary, merges=[], model_max_length=77)
    small = {"hidden_size": 16, "intermediate_size": 32, "num_attention_heads": 2, "num_hidden_layers": 2}
    ends = {"bos_token_id": len(words) - 2, "eos_token_id": len(words) - 1, "pad_token_id": len(words) - 1}
    config = CLIPConfig(
        text_config={**small, **ends, "vocab_size": len(words), "max_position_embeddings": 77},
        vision_config={**small, "image_size": SIZE, "patch_size": 8},
        projection_dim=16,
    )
    with torch.random.fork_rng():
        torch.manual_seed(1)
        model = CLIPModel(config)
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.data = torch.randn_like(parameter) * 0.4  # with CLIP's own, all images look alike
    model.save_pretrained(path)
    tokenizer.save_pretrained(path)
    square = {"height": SIZE, "width": SIZE}
    CLIPImageProcessorPil(size={"shortest_edge": SIZE}, crop_size=square).save_pretrained(path)
    return path
