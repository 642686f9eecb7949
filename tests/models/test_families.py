"""Every family against diffusers' own pipeline, on real classes with random weights (FLUX.1: ``test_flux.py``)."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from gdro_cli.errors import UserError
from gdro_cli.models.adapters import attach_lora
from gdro_cli.models.base import FlowModel, stack_conditioning
from gdro_cli.models.diffusers_flow import load_flow_model
from gdro_cli.models.sampling import sample_latents
from gdro_cli.stages.training.estimate import autocast
from tests.support import tiny_families
from tests.support.tiny_families import BUILDERS, SIZE, encode, sources

Folder = Callable[[str], Path]

STEPS = 4
PROMPTS = ("a red sign", "two blue stars on a brick wall", "a green heart")
ALL = tuple(BUILDERS)
TRAINED = (
    "flux-kontext",
    "sd3",
    "qwen-image",
    "qwen-image-edit",
    "qwen-image-edit-plus",
    "z-image",
    "flux2-klein",
    "chroma",
    "lumina2",
    "sana",
    "flux2",
    "hidream",
)
"""One model of each family."""
EDITING = ("flux-kontext", "qwen-image-edit", "qwen-image-edit-plus")


TEXT_LENGTH = {
    "flux-kontext": 12,
    "flux2-klein": 48,
    "flux2-klein-distilled": 48,
    "sd3": 32,
    "sd3-without-t5": 32,
    "chroma": 48,
    "lumina2": 48,
    "sana": 48,
    "flux2": 48,
    "hidream": 32,
}
"""Shorter than the family's own length where it pads, for speed."""


def open_model(folder: Folder, name: str, **options: Any) -> FlowModel:
    return load_flow_model(folder(name), max_sequence_length=TEXT_LENGTH.get(name), **options)


def open_pipeline(folder: Folder, name: str) -> Any:
    absent = {"text_encoder_3": None, "tokenizer_3": None} if name == "sd3-without-t5" else {}
    return tiny_families.open_pipeline(folder(name), **absent)


def guidance_options(name: str, guidance: float) -> dict[str, Any]:
    """Our guidance as the pipeline takes it: at 1 there is none, and Z-Image counts from 0."""
    if name.startswith("qwen-image"):
        edited = {"image": sources(1)[0]} if name in EDITING else {}
        return {"true_cfg_scale": guidance, "negative_prompt": " ", **edited}
    if name == "sana":
        return {"guidance_scale": guidance, "use_resolution_binning": False}
    if name == "flux-kontext":
        area = {"max_area": SIZE["height"] * SIZE["width"], "_auto_resize": False}
        return {"guidance_scale": guidance, "image": sources(1)[0], **area}
    return {"guidance_scale": guidance - 1.0 if name == "z-image" else guidance}


def by_pipeline(pipe: Any, name: str, prompt: str, *, seed: int, guidance: float) -> tuple[list[Tensor], Any]:
    """Latents after every step, as the transformer sees them, and the image."""
    states: list[Tensor] = []

    def keep(_pipe: Any, _step: int, _time: Any, values: dict[str, Tensor]) -> dict[str, Tensor]:
        states.append(values["latents"].clone())
        return {}

    image = pipe(
        prompt=prompt,
        generator=torch.Generator().manual_seed(seed),
        num_inference_steps=STEPS,
        callback_on_step_end=keep,
        **guidance_options(name, guidance),
        **({"max_sequence_length": TEXT_LENGTH[name]} if name in TEXT_LENGTH else {}),
        **SIZE,
    ).images[0]
    return states, image


def by_us(model: FlowModel, prompts: list[str], seeds: list[int], *, guidance: float = 1.0, batch: int = 8) -> Tensor:
    options = {"steps": STEPS, "guidance": guidance, "batch_size": batch, **SIZE}
    return sample_latents(model, model.noise(seeds, **SIZE), encode(model, prompts), **options)


@pytest.mark.slow
@pytest.mark.parametrize("guidance", [1.0, 3.5])
@pytest.mark.parametrize("name", ALL)
def test_same_latents_and_image_as_the_pipeline(name: str, guidance: float, family_folder: Folder) -> None:
    model, pipe = open_model(family_folder, name), open_pipeline(family_folder, name)
    states, expected = by_pipeline(pipe, name, PROMPTS[1], seed=7, guidance=guidance)
    ours = by_us(model, [PROMPTS[1]], [7], guidance=guidance)
    assert ours.std() > 0.1
    torch.testing.assert_close(ours, states[-1], rtol=1e-3, atol=1e-3 * float(ours.std()))
    image = model.decode(ours, **SIZE)[0]
    assert image.size == (SIZE["width"], SIZE["height"]) and image.mode == "RGB"
    # One grey level: 0.5 / 255 may be rounded either way.
    assert np.abs(np.asarray(image, dtype=int) - np.asarray(expected, dtype=int)).max() <= 1


@pytest.mark.parametrize("name", ALL)
def test_velocity_is_the_slope_of_the_pipelines_path(name: str, family_folder: Folder) -> None:
    """Euler: x' = x + (sigma' - sigma) v. So two states of the pipeline give v (sign, scale, time)."""
    model, pipe = open_model(family_folder, name), open_pipeline(family_folder, name)
    states, _ = by_pipeline(pipe, name, PROMPTS[0], seed=3, guidance=1.0)
    sigmas = model.sigmas(STEPS, **SIZE)
    x, after = states[1], states[2]
    slope = (after - x) / (sigmas[3] - sigmas[2])
    ours = model.velocity(x, sigmas[2:3], encode(model, PROMPTS[:1]), guidance=1.0, **SIZE)
    torch.testing.assert_close(ours, slope, rtol=1e-3, atol=1e-3 * float(slope.std()))


def test_a_schedule_that_is_not_finite_is_refused(family_folder: Folder) -> None:
    """Qwen-Image's schedule of one step is 0 / 0, in diffusers as well."""
    model = open_model(family_folder, "qwen-image")
    with pytest.raises(UserError, match=r"no noise levels for 1 sampling step \(.*: raise the number"):
        model.sigmas(1, **SIZE)
    assert model.sigmas(2, **SIZE).isfinite().all()


@pytest.mark.parametrize("name", ALL)
def test_guidance_does_what_the_family_says(name: str, family_folder: Folder) -> None:
    """Guidance above 1 changes samples where it is classifier-free, but no trained velocity; embedded, both."""
    model = open_model(family_folder, name)
    kind = {"flux2-klein-distilled": "none", "flux2": "embedded", "flux-kontext": "embedded"}.get(name, "cfg")
    assert model.guidance_kind == kind
    texts, noise = encode(model, PROMPTS[:1]), model.noise([3], **SIZE)
    plain, strong = (by_us(model, [PROMPTS[0]], [3], guidance=g) for g in (1.0, 5.0))
    assert torch.allclose(plain, strong) == (kind == "none")
    assert torch.equal(plain, by_us(model, [PROMPTS[0]], [3], guidance=0.0)) == (kind != "embedded")
    sigma = torch.tensor([0.5])
    trained = [model.velocity(noise, sigma, texts, guidance=g, **SIZE) for g in (1.0, 5.0)]
    assert torch.equal(*trained) == (kind != "embedded")


def test_guidance_of_flux_is_an_input_or_nothing(flux_folder: Path, guided_folder: Path) -> None:
    assert load_flow_model(flux_folder).guidance_kind == "none"
    assert load_flow_model(guided_folder).guidance_kind == "embedded"


@pytest.mark.parametrize("name", ALL)
def test_image_does_not_depend_on_its_batch(name: str, family_folder: Folder) -> None:
    """Prompts of different lengths share a batch: the padding of the shorter ones must have no effect."""
    model = open_model(family_folder, name)
    seeds = [1, 2, 3]
    together = by_us(model, list(PROMPTS), seeds, guidance=2.0)
    for batch in (1, 2):
        apart = by_us(model, list(PROMPTS), seeds, guidance=2.0, batch=batch)
        torch.testing.assert_close(apart, together, rtol=1e-3, atol=1e-3 * float(together.std()))
    for one, prompt in zip(encode(model, PROMPTS), PROMPTS, strict=True):
        alone = encode(model, [prompt])[0]
        for key, value in one.items():
            torch.testing.assert_close(value, alone[key], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", EDITING)
def test_each_prompt_edits_its_own_image(name: str, family_folder: Folder) -> None:
    model, prompts, edited = open_model(family_folder, name), [PROMPTS[0]] * 2, sources(2)
    options: dict[str, Any] = {"steps": STEPS, "guidance": 2.0, "batch_size": 2, **SIZE}
    noise = model.noise([1, 1], **SIZE)
    one, other = sample_latents(model, noise, model.encode(prompts, edited), **options)
    assert not torch.allclose(one, other, atol=1e-2 * float(one.std()))
    swapped = sample_latents(model, noise, model.encode(prompts, edited[::-1]), **options)
    torch.testing.assert_close(swapped, torch.stack([other, one]), rtol=1e-3, atol=1e-3 * float(one.std()))
    with pytest.raises(ValueError, match="2 prompts and 1 images to edit"):
        model.encode(prompts, edited[:1])


def test_the_estimate_has_the_image_that_the_text_encoder_sees(family_folder: Folder) -> None:
    """Sides near 384 x 384 pixels, in multiples of 32, and a token per 28 pixels: 11 x 17, 14 x 14 and 8 x 24."""
    model = open_model(family_folder, "qwen-image-edit-plus")
    sizes = {(32, 48): 187, (64, 64): 196, (32, 96): 192}
    assert {s: model.sized_shapes(0, height=s[0], width=s[1])["prompt_embeds"][0] for s in sizes} == sizes
    lengths = [len(model.encode([""], [sources(1)[0].resize((w, h))])[0]["prompt_embeds"]) for h, w in sizes]
    assert len({length - seen for length, seen in zip(lengths, sizes.values(), strict=True)}) == 1


@pytest.mark.parametrize("name", ALL)
def test_the_prompt_matters(name: str, family_folder: Folder) -> None:
    model = open_model(family_folder, name)
    one, other = by_us(model, list(PROMPTS[:2]), [1, 1])
    assert not torch.allclose(one, other, atol=1e-3 * float(one.std()))


@pytest.mark.parametrize("name", [name for name in TRAINED if name not in ("flux2", "flux-kontext")])
def test_unconditional_pass_needs_no_encoder_after_encoding(name: str, family_folder: Folder) -> None:
    model: Any = open_model(family_folder, name)
    texts = encode(model, PROMPTS[:1])
    model.release_encoders()
    sample_latents(model, model.noise([1], **SIZE), texts, steps=2, guidance=2.0, batch_size=1, **SIZE)
    assert not any(part.startswith("text_encoder") for part in model._loaded)


@pytest.mark.parametrize("name", TRAINED)
def test_published_layers_are_adapted_and_trained(name: str, family_folder: Folder) -> None:
    """Every adapter layer gets a gradient: none feeds only an unused output."""
    model = open_model(family_folder, name)
    parameters = attach_lora(model, rank=2, alpha=2)
    model.transformer.enable_gradient_checkpointing()  # type: ignore[operator]
    x, sigma = model.noise([1, 2], **SIZE), torch.tensor([0.9, 0.3])
    velocity = model.velocity(x, sigma, encode(model, PROMPTS[:2]), guidance=1.0, **SIZE)
    assert velocity.shape == x.shape
    velocity.square().mean().backward()
    # B is zero at the start, so A has no gradient yet; the last block's text output is not used by any family.
    layers = {n: p for n, p in model.transformer.named_parameters() if ".lora_B." in n}
    idle = [n for n, p in layers.items() if p.grad is None or not p.grad.any()]
    assert len(layers) * 2 == len(parameters)
    assert all("to_add_out" in n or "add_q_proj" in n for n in idle), idle


@pytest.mark.parametrize("name", TRAINED)
def test_checkpointing_does_not_change_the_velocity(name: str, family_folder: Folder) -> None:
    model: Any = open_model(family_folder, name)
    x, sigma, texts = model.noise([1, 2], **SIZE), torch.tensor([0.9, 0.3]), encode(model, PROMPTS[:2])
    expected = model.velocity(x, sigma, texts, guidance=1.0, **SIZE)
    model.transformer.enable_gradient_checkpointing()
    velocity = model.velocity(x.requires_grad_(), sigma, texts, guidance=1.0, **SIZE)
    torch.testing.assert_close(velocity, expected)


@pytest.mark.slow
@pytest.mark.parametrize("name", TRAINED)
def test_bfloat16_stays_close(name: str, family_folder: Folder) -> None:
    exact, coarse = open_model(family_folder, name), open_model(family_folder, name, dtype="bfloat16")
    texts, noise = encode(exact, PROMPTS), exact.noise([1, 2, 3], **SIZE)
    sigma = torch.tensor([0.5, 0.25, 0.125])  # as exact in bfloat16, even as times up to 1000
    fine = exact.velocity(noise, sigma, texts, guidance=1.0, **SIZE)
    rough = coarse.velocity(noise, sigma, texts, guidance=1.0, **SIZE)
    assert rough.dtype == torch.bfloat16
    assert (rough - fine).abs().mean() < 0.1 * fine.std()
    assert coarse.decode(by_us(coarse, list(PROMPTS[:1]), [1], guidance=2.0), **SIZE)[0].mode == "RGB"


@pytest.mark.parametrize(("name", "expected"), [("sd3", True), ("sana", False)])
def test_linear_attention_is_not_run_under_autocast(name: str, expected: bool, family_folder: Folder) -> None:
    """Its sums are float32, which autocast would round; the estimate of a job counts as the job computes."""
    model = load_flow_model(family_folder(name), dtype="bfloat16", device="cuda")  # nothing is loaded
    assert model.autocasts == expected
    assert autocast(model) == (torch.bfloat16 if expected else None)


def test_stacking_pads_and_masks_only_entries_of_different_lengths() -> None:
    """Lengths 2 and 1: the second row ends with a zero that is not the prompt's own."""
    long, short = {"a": torch.ones(2, 3), "b": torch.ones(4)}, {"a": torch.ones(1, 3), "b": torch.ones(4)}
    mixed = stack_conditioning([long, short])
    assert set(mixed) == {"a", "a_mask", "b"} and mixed["a"].shape == (2, 2, 3)
    assert mixed["a_mask"].tolist() == [[True, True], [True, False]] and not mixed["a"][1, 1].any()
    assert set(stack_conditioning([long, long])) == {"a", "b"}


def test_size_beyond_the_position_table_is_refused(family_folder: Folder) -> None:
    """The tiny SD3 has positions for 12 x 12 tokens of 16 pixels: 192 pixels."""
    model = load_flow_model(family_folder("sd3"))
    assert model.latent_shape(height=192, width=192) == (4, 24, 24)
    with pytest.raises(UserError, match="208 x 32 is too large for this model: no side may exceed 192"):
        model.noise([1], height=208, width=32)


def test_more_text_than_the_model_has_positions_for_is_refused(family_folder: Folder) -> None:
    """The image has a position after the text, so 300 positions are 299 tokens and the image."""
    load_flow_model(family_folder("lumina2"), max_sequence_length=299)
    with pytest.raises(UserError, match="is 300, but this model has positions for 299 text tokens: set it to 299"):
        load_flow_model(family_folder("lumina2"), max_sequence_length=300)


def test_a_processor_s_tokenizer_is_loaded_without_the_rest(family_folder: Folder, tmp_path: Path) -> None:
    """The published FLUX.2 dev names a processor, which needs torchvision, and has the tokenizer's files."""
    copy = Path(shutil.copytree(family_folder("flux2"), tmp_path / "copy"))
    index = json.loads((copy / "model_index.json").read_text())
    index["tokenizer"] = ["transformers", "PixtralProcessor"]
    (copy / "model_index.json").write_text(json.dumps(index))
    (ours,), (expected,) = (
        open_model(lambda _, at=at: at, "flux2").encode(PROMPTS[:1]) for at in (copy, family_folder("flux2"))
    )
    assert torch.equal(ours["prompt_embeds"], expected["prompt_embeds"])


def test_too_long_a_prompt_is_named_without_its_template(
    family_folder: Folder, caplog: pytest.LogCaptureFixture
) -> None:
    """The tiny chat template adds 10 bytes to the prompt's 10; the warning must not show them."""
    model = load_flow_model(family_folder("z-image"), max_sequence_length=15)
    assert encode(model, ["a red sign"])[0]["prompt_embeds"].shape == (15, 24)
    assert "cut to 15 of its 20 text tokens: a red sign" in caplog.text
