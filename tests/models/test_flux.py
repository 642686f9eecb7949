"""The FLUX family against ``FluxPipeline`` itself, on real classes with random weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from gdro_cli.errors import UserError
from gdro_cli.models.base import FlowModel
from gdro_cli.models.diffusers_flow import load_flow_model
from gdro_cli.models.sampling import sample_latents
from gdro_cli.models.text import tokenize
from tests.support.tiny_families import t5_tokenizer

from .conftest import PROMPTS, SIZE, TOKENS

STEPS = 4


def pipeline(folder: Path) -> Any:
    from diffusers import FluxPipeline

    pipe = FluxPipeline.from_pretrained(folder, local_files_only=True)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def by_pipeline(pipe: Any, prompt: str, seed: int, *, guidance: float, output: str) -> Any:
    generator = torch.Generator().manual_seed(seed)
    options = {
        "num_inference_steps": STEPS,
        "max_sequence_length": TOKENS,
        "guidance_scale": guidance,
        **SIZE,
    }
    return pipe(prompt, generator=generator, output_type=output, **options).images


def by_us(model: FlowModel, prompts: list[str], seeds: list[int], *, guidance: float = 1.0, batch: int = 8) -> Tensor:
    return sample_latents(
        model,
        model.noise(seeds, **SIZE),
        model.encode(prompts),
        steps=STEPS,
        guidance=guidance,
        batch_size=batch,
        **SIZE,
    )


@pytest.mark.parametrize(("folder", "guidance"), [("flux_folder", 1.0), ("guided_folder", 3.5)])
def test_same_latents_and_image_as_the_pipeline(folder: str, guidance: float, request: pytest.FixtureRequest) -> None:
    path = request.getfixturevalue(folder)
    pipe, model = pipeline(path), load_flow_model(path)
    ours = by_us(model, [PROMPTS[1]], [7], guidance=guidance)
    theirs = by_pipeline(pipe, PROMPTS[1], 7, guidance=guidance, output="latent")
    assert ours.std() > 0.1
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
    image = model.decode(ours, **SIZE)[0]
    expected = by_pipeline(pipe, PROMPTS[1], 7, guidance=guidance, output="pil")[0]
    assert image.size == (SIZE["width"], SIZE["height"]) and image.mode == "RGB"
    # One grey level: 0.5 / 255 may be rounded either way.
    assert np.abs(np.asarray(image, dtype=int) - np.asarray(expected, dtype=int)).max() <= 1


def test_guidance_has_an_effect_only_as_an_input(flux_folder: Path, guided_folder: Path) -> None:
    plain, guided = load_flow_model(flux_folder), load_flow_model(guided_folder)
    prompts, seeds = list(PROMPTS[:1]), [3]
    assert torch.equal(by_us(plain, prompts, seeds, guidance=1.0), by_us(plain, prompts, seeds, guidance=5.0))
    assert not torch.allclose(by_us(guided, prompts, seeds, guidance=1.0), by_us(guided, prompts, seeds, guidance=5.0))


def test_image_does_not_depend_on_its_batch(flux_folder: Path) -> None:
    model = load_flow_model(flux_folder)
    prompts, seeds = [*PROMPTS, *PROMPTS], [1, 2, 3, 4, 5, 6]
    together = by_us(model, prompts, seeds, batch=6)
    for batch in (1, 4):
        torch.testing.assert_close(by_us(model, prompts, seeds, batch=batch), together, rtol=1e-4, atol=1e-5)
    alone = by_us(model, [prompts[4]], [seeds[4]])
    torch.testing.assert_close(alone[0], together[4], rtol=1e-4, atol=1e-5)
    assert not torch.allclose(together[0], together[3], atol=0.1)


def test_noise_of_an_image_depends_on_its_seed_only(flux_folder: Path) -> None:
    model = load_flow_model(flux_folder)
    noise = model.noise([5, 6, 5], **SIZE)
    assert noise.shape == (3, *model.latent_shape(**SIZE)) == (3, 6, 16) and noise.dtype == torch.float32
    assert torch.equal(noise[0], noise[2]) and not torch.equal(noise[0], noise[1])
    assert torch.equal(noise[1:2], model.noise([6], **SIZE))


def test_encoding_does_not_depend_on_the_batch(flux_folder: Path) -> None:
    model = load_flow_model(flux_folder)
    many = model.encode([*PROMPTS] * 4)
    assert len(many) == 12 and many[0]["prompt_embeds"].shape == (TOKENS, 24)
    assert many[0]["pooled_prompt_embeds"].shape == (16,)
    for one, prompt in zip(many, PROMPTS, strict=False):
        for key, value in model.encode([prompt])[0].items():
            torch.testing.assert_close(value, one[key], rtol=1e-5, atol=1e-6)
    assert not torch.allclose(many[0]["prompt_embeds"], many[1]["prompt_embeds"])


def test_too_long_a_prompt_is_cut_with_a_warning(flux_folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    model = load_flow_model(flux_folder)
    embeds = model.encode(["abcdefghijklmnopq"])[0]["prompt_embeds"]
    assert embeds.shape[0] == TOKENS
    assert f"cut to {TOKENS} of its 19 text tokens" in caplog.text  # 17 letters, the word mark and the end


def test_the_tokenizer_itself_does_not_warn_of_a_cut() -> None:
    """Its words, "will result in indexing errors", would be wrong."""
    tokenizer = t5_tokenizer()
    assert tokenize(tokenizer, ["abcdefghijklmnopq"], length=TOKENS).input_ids.shape == (1, TOKENS)
    assert not tokenizer.deprecation_warnings


def test_own_sequence_length(flux_folder: Path) -> None:
    model = load_flow_model(flux_folder, max_sequence_length=5)
    assert model.encode(["a sign"])[0]["prompt_embeds"].shape == (5, 24)


def test_batched_and_listed_conditioning_agree(flux_folder: Path) -> None:
    model = load_flow_model(flux_folder)
    texts = model.encode(PROMPTS)
    x, sigma = model.noise([1, 2, 3], **SIZE), torch.tensor([0.9, 0.5, 0.1])
    listed = model.velocity(x, sigma, texts, guidance=1.0, **SIZE)
    batched = model.velocity(x, sigma, model.batch_conditioning(texts), guidance=1.0, **SIZE)
    assert torch.equal(listed, batched) and listed.shape == x.shape
    one = model.velocity(x[1:2], sigma[1:2], texts[1:2], guidance=1.0, **SIZE)
    torch.testing.assert_close(one[0], listed[1], rtol=1e-4, atol=1e-5)


def test_schedule_is_the_pipelines(flux_folder: Path, guided_folder: Path) -> None:
    """With a fixed shift s, sigma' = s sigma / (1 + (s - 1) sigma): for s = 3, sigma 1/2 -> 1.5 / 2 = 0.75."""
    fixed = load_flow_model(guided_folder).sigmas(2, **SIZE)
    torch.testing.assert_close(fixed, torch.tensor([1.0, 0.75, 0.0]))
    from diffusers.pipelines.flux.pipeline_flux import calculate_shift

    shifted = load_flow_model(flux_folder).sigmas(4, height=512, width=256)
    mu = calculate_shift(32 * 16)
    even = torch.tensor([1.0, 0.75, 0.5, 0.25])
    expected = np.exp(mu) / (np.exp(mu) + (1 / even - 1))
    torch.testing.assert_close(shifted, torch.cat([expected, torch.zeros(1)]))
    assert shifted.dtype == torch.float32


def test_wrong_size_is_refused(flux_folder: Path) -> None:
    model = load_flow_model(flux_folder)
    with pytest.raises(UserError, match="40 x 32 .* multiples of 16"):
        model.noise([1], height=40, width=32)


def test_components_load_when_used_and_go_when_released(flux_folder: Path) -> None:
    model: Any = load_flow_model(flux_folder)
    assert model._transformer is None and not model._loaded
    model.encode(PROMPTS[:1])
    assert {"text_encoder", "text_encoder_2"} <= set(model._loaded) and model._transformer is None
    model.release_encoders()
    assert not any(name.startswith("text_encoder") for name in model._loaded)
    model.decode(model.noise([1], **SIZE), **SIZE)
    assert "vae" in model._loaded and model._transformer is None
    model.release_decoder()
    assert "vae" not in model._loaded
    assert not any(p.requires_grad for p in model.transformer.parameters())


def test_model_first_used_while_sampling_can_be_trained(flux_folder: Path) -> None:
    """Weights created inside inference mode would refuse autograd."""
    model = load_flow_model(flux_folder)
    latents = by_us(model, list(PROMPTS[:1]), [1])
    model.transformer.requires_grad_(True)
    texts = model.encode(PROMPTS[:1])
    model.velocity(latents, torch.tensor([0.5]), texts, guidance=1.0, **SIZE).square().mean().backward()
    assert all(p.grad is not None for p in model.transformer.parameters())


def test_progress_counts_every_step(flux_folder: Path) -> None:
    model = load_flow_model(flux_folder)
    seen: list[int] = []
    noise, texts = model.noise([1, 2, 3], **SIZE), model.encode(PROMPTS)
    options = {"steps": 2, "guidance": 1.0, "batch_size": 2, **SIZE}
    sample_latents(model, noise, texts, on_step=seen.append, **options)
    assert seen == [2, 2, 1, 1]
    with pytest.raises(ValueError, match="3 starting points but 2"):
        sample_latents(model, noise, texts[:2], **options)


def test_bfloat16_stays_close(flux_folder: Path) -> None:
    model = load_flow_model(flux_folder, dtype="bfloat16")
    assert model.dtype == next(model.transformer.parameters()).dtype == torch.bfloat16
    exact = load_flow_model(flux_folder)
    texts, noise, sigma = exact.encode(PROMPTS), exact.noise([1, 2, 3], **SIZE), torch.tensor([0.9, 0.5, 0.1])
    coarse = model.velocity(noise, sigma, texts, guidance=1.0, **SIZE)
    fine = exact.velocity(noise, sigma, texts, guidance=1.0, **SIZE)
    assert coarse.dtype == torch.bfloat16
    assert (coarse - fine).abs().mean() < 0.1 * fine.std()
    latents = by_us(model, list(PROMPTS[:1]), [1])
    assert latents.dtype == torch.float32 and model.decode(latents, **SIZE)[0].mode == "RGB"
