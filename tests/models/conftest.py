"""A tiny random FLUX: the real classes of ``FluxPipeline``, small enough to build in a second."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from tests.support.tiny_families import BUILDERS

SIZE = {"height": 32, "width": 48}
"""Picture size of the tests: 4 x 6 latent pixels, 2 x 3 tokens; not square, so that swapped axes show."""
TOKENS = 12
"""Text tokens of the tiny model (its T5 tokenizer's own length)."""
PROMPTS = ("a red sign", "two blue stars on a brick wall", "a green heart")


def build_flux(folder: Path, *, guidance_embeds: bool = False, dynamic_shift: bool = True) -> Path:
    """Write a pipeline folder with random weights; every weight has a size that matters for the output."""
    from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, FluxPipeline, FluxTransformer2DModel
    from transformers import (
        CLIPTextConfig,
        CLIPTextModel,
        CLIPTokenizer,
        T5Config,
        T5EncoderModel,
        T5Tokenizer,
    )

    letters = "abcdefghijklmnopqrstuvwxyz"
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        transformer = FluxTransformer2DModel(
            in_channels=16,
            num_layers=1,
            num_single_layers=2,
            attention_head_dim=8,
            num_attention_heads=4,
            joint_attention_dim=24,
            pooled_projection_dim=16,
            guidance_embeds=guidance_embeds,
            axes_dims_rope=(2, 2, 4),
        ).eval()
        for parameter in transformer.parameters():
            if parameter.ndim > 1:
                torch.nn.init.normal_(parameter, std=0.2)
        vae = AutoencoderKL(
            down_block_types=("DownEncoderBlock2D",) * 4,
            up_block_types=("UpDecoderBlock2D",) * 4,
            block_out_channels=(4, 4, 4, 4),
            latent_channels=4,
            norm_num_groups=2,
            sample_size=64,
            scaling_factor=0.4,
            shift_factor=0.1,
        ).eval()
        clip_words = {piece: i for i, piece in enumerate(["<|startoftext|>", "<|endoftext|>", *letters])}
        clip_words |= {f"{letter}</w>": len(clip_words) + i for i, letter in enumerate(letters)}
        clip = CLIPTextModel(
            CLIPTextConfig(
                vocab_size=len(clip_words),
                hidden_size=16,
                intermediate_size=32,
                num_hidden_layers=1,
                num_attention_heads=2,
                bos_token_id=0,
                eos_token_id=1,
            )
        ).eval()
        pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", -9.0), ("▁", -2.0), *[(c, -3.0) for c in letters]]
        t5 = T5EncoderModel(
            T5Config(vocab_size=len(pieces), d_model=24, d_kv=8, d_ff=32, num_layers=1, num_heads=2)
        ).eval()
        FluxPipeline(
            scheduler=FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=dynamic_shift, shift=3.0),
            vae=vae,
            text_encoder=clip,
            tokenizer=CLIPTokenizer(vocab=clip_words, merges=[], model_max_length=77),
            text_encoder_2=t5,
            tokenizer_2=T5Tokenizer(vocab=pieces, extra_ids=0, model_max_length=TOKENS),
            transformer=transformer,
        ).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def flux_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny FLUX without a guidance input (as schnell), schedule shifted by picture size."""
    return build_flux(tmp_path_factory.mktemp("models") / "flux")


@pytest.fixture(scope="session")
def guided_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny FLUX with a guidance input (as dev), schedule with a fixed shift."""
    return build_flux(tmp_path_factory.mktemp("models") / "guided", guidance_embeds=True, dynamic_shift=False)


@pytest.fixture(scope="session")
def family_folder(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The tiny model of a family in ``tiny_families.BUILDERS``, built when it is first asked for."""
    root = tmp_path_factory.mktemp("families")

    @functools.cache
    def folder(name: str) -> Path:
        return BUILDERS[name](root / name)

    return folder
