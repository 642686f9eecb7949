"""What only HiDream-I1 has: a mixture of experts, padded tokens, other schedulers, a Llama that is not published."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from gdro_cli.errors import PrerequisiteError, UserError
from gdro_cli.models.adapters import attach_lora
from gdro_cli.models.base import FlowModel
from gdro_cli.models.diffusers_flow import load_flow_model
from gdro_cli.models.folder import PipelineFolder
from tests.support.tiny_families import T5_TOKENS

Family = Callable[[str], Path]

SQUARE = {"height": 32, "width": 32}
SIGMA = torch.tensor([0.9, 0.3])


@pytest.fixture
def model(family_folder: Family) -> FlowModel:
    return load_flow_model(family_folder("hidream"), max_sequence_length=T5_TOKENS)


@pytest.fixture
def copy(family_folder: Family, tmp_path: Path) -> Path:
    return Path(shutil.copytree(family_folder("hidream"), tmp_path / "copy"))


def inputs(model: FlowModel) -> tuple[Tensor, dict[str, Tensor]]:
    """Noisy maps of two images, and their prompts encoded."""
    return model.noise([1, 2], **SQUARE), model.batch_conditioning(model.encode(["a red sign", "two blue stars"]))


def by_diffusers(transformer: Any, maps: Tensor, text: dict[str, Tensor]) -> Tensor:
    """The transformer's answer to maps, which it cuts into tokens by itself."""
    answer: Tensor = transformer(
        hidden_states=maps,
        timesteps=1000 * SIGMA,
        encoder_hidden_states_t5=text["prompt_embeds_t5"],
        encoder_hidden_states_llama3=text["prompt_embeds_llama3"].transpose(0, 1),
        pooled_embeds=text["pooled_prompt_embeds"],
        return_dict=False,
    )[0]
    return answer


def test_tokens_and_experts_of_a_square_image_are_those_of_diffusers(model: FlowModel) -> None:
    """It has no padding, unlike the image that ``test_families`` compares."""
    maps, text = inputs(model)
    with torch.no_grad():
        theirs = by_diffusers(model.folder.load("transformer"), maps, text)
        ours = model.velocity(maps, SIGMA, text, guidance=1.0, **SQUARE)
    torch.testing.assert_close(ours, -theirs, rtol=1e-4, atol=1e-5 * float(theirs.std()))


def test_experts_have_the_gradient_of_diffusers_training_mode(model: FlowModel) -> None:
    """Its output has the same numbers as tokens, so the same sum of squares. Outside of that mode the gradient lacks
    the part through the experts that the gate chooses."""
    maps, text = inputs(model)
    transformer = model.folder.load("transformer")
    gradients = []
    for answer in (
        lambda x: model.velocity(x, SIGMA, text, guidance=1.0, **SQUARE),
        lambda x: by_diffusers(transformer.train(), x, text),
        lambda x: by_diffusers(transformer.eval(), x, text),
    ):
        x = maps.clone().requires_grad_()
        answer(x).square().sum().backward()
        assert x.grad is not None
        gradients.append(x.grad)
    ours, trained, outside = gradients
    torch.testing.assert_close(ours, trained, rtol=1e-3, atol=1e-4 * float(trained.std()))
    assert (outside - trained).std() > 0.1 * trained.std()


def test_an_expert_without_tokens_is_trained_on_none(model: FlowModel) -> None:
    """One token goes to two of the four experts."""
    attach_lora(model, rank=2, alpha=2, targets="all-linear")
    mixture: Any = model.transformer.get_submodule("single_stream_blocks.0.block.ff_i")
    mixture(torch.randn(1, 1, 16, generator=torch.Generator().manual_seed(0))).sum().backward()
    used = [bool(expert.w2.lora_B["default"].weight.grad.any()) for expert in mixture.experts]
    assert sum(used) == 2


def test_text_has_the_shapes_that_are_planned_with(model: FlowModel) -> None:
    (text,) = model.encode(["a red sign"])
    assert {key: value.shape for key, value in text.items()} == model.conditioning_shapes(T5_TOKENS)
    assert text["prompt_embeds_llama3"].shape == (3, T5_TOKENS, 16)
    assert all(value.is_contiguous() for value in text.values())


def test_an_image_of_more_tokens_than_the_largest_is_refused(model: FlowModel) -> None:
    """The tiny model has 4 x 4 tokens of 16 x 16 pixels."""
    assert model.grid(height=128, width=32) == (8, 2)
    with pytest.raises(UserError, match="image size 128 x 48 is too large for this model: an image may have 4096 pix"):
        model.grid(height=128, width=48)


@pytest.mark.parametrize(
    ("name", "config"),
    [
        ("UniPCMultistepScheduler", {"flow_shift": 3.0, "use_flow_sigmas": True, "prediction_type": "flow_prediction"}),
        ("FlowMatchLCMScheduler", {"shift": 6.0}),
        ("FlowMatchEulerDiscreteScheduler", {"use_dynamic_shifting": True}),
    ],
)
def test_every_scheduler_becomes_euler_with_its_own_shift(name: str, config: dict[str, Any], copy: Path) -> None:
    """The pipeline's dynamic shift is that of the largest image, here 16 tokens: mu = 0.5 + 0.65 (16 - 256) / 3840."""
    import diffusers

    getattr(diffusers, name)(**config).save_pretrained(copy / "scheduler")
    shift = config.get("flow_shift") or config.get("shift")
    euler = diffusers.FlowMatchEulerDiscreteScheduler(**({"shift": shift} if shift else {"use_dynamic_shifting": True}))
    euler.set_timesteps(5, mu=0.459375)
    sigmas = load_flow_model(copy).sigmas(5, height=32, width=48)
    torch.testing.assert_close(sigmas, euler.sigmas)


@pytest.mark.parametrize("entry", [[None, None], ["transformers", "LlamaForCausalLM"]])
def test_a_folder_without_llama_is_refused_with_the_way_to_a_whole_one(entry: list[str | None], copy: Path) -> None:
    """The published index names its class; a folder that was saved without it has no class."""
    index = json.loads((copy / "model_index.json").read_text())
    (copy / "model_index.json").write_text(json.dumps({**index, "text_encoder_4": entry}))
    shutil.rmtree(copy / "text_encoder_4")
    with pytest.raises(PrerequisiteError) as caught:
        load_flow_model(PipelineFolder(copy))
    message = str(caught.value)
    assert message.startswith(f"model {copy} has no text_encoder_4, since HiDream-I1 is published without its Llama:")
    assert "meta-llama/Llama-3.1-8B-Instruct" in message and message.endswith("and set model.path=FOLDER")
