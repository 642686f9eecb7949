"""What is done on the pretended GPU: ``python -m tests.gpu.jobs NAME ARGUMENT...``, with ``PRETEND_GPU`` set.

A job is a process of its own, since the pretended GPU must be there before PyTorch. It ends with an error where a check
fails.
"""

from __future__ import annotations

from tests.gpu.pretend_gpu import pretend_gpu  # isort: skip - before whatever imports torch

import shutil
import sys
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from diffusers.models import attention_dispatch
from torch import Tensor

from gdro_cli.config.load import load_recipe
from gdro_cli.config.methods import GdroMethod
from gdro_cli.core.seeds import generator
from gdro_cli.data.dataset import GroupBatch
from gdro_cli.data.records import PromptRecord
from gdro_cli.errors import Interrupted
from gdro_cli.models import adapters
from gdro_cli.models.backends import ComputeOptions
from gdro_cli.models.base import FlowModel
from gdro_cli.models.diffusers_flow import DtypeName, load_flow_model
from gdro_cli.models.sampling import sample_latents
from gdro_cli.rewards.ocr.reward import OcrReward
from gdro_cli.rewards.pool import ScoringPool
from gdro_cli.runtime.progress import Reporter
from gdro_cli.stages.evaluation import evaluate
from gdro_cli.stages.planning.estimate import image_flops
from gdro_cli.stages.setup.session import Session
from gdro_cli.stages.training import train
from gdro_cli.stages.training.group_gradient import GroupGradient, draw_noise, loss_arguments, noisy_groups
from tests.support.tiny_families import BUILDERS, build_flux

SIZE = {"height": 32, "width": 48}
PROMPTS = ("a red sign", "two blue stars on a brick wall")
K = 3
FAMILIES: dict[str, Callable[[Path], Path]] = {"flux-dev": partial(build_flux, guidance_embeds=True), **BUILDERS}


def draw(*shape: int, name: str) -> Tensor:
    return torch.randn(shape, generator=generator(0, name))


def engine_pass(
    folder: Path, device: str, dtype: DtypeName = "float32", compute: ComputeOptions | None = None
) -> tuple[Tensor, dict[str, Tensor]]:
    """Latents [2, ...] of two sampling steps, and the adapter's gradients of a checkpointed step in two passes."""
    model = load_flow_model(folder, dtype=dtype, device=device, compute=compute)
    text, noise = model.encode(PROMPTS), model.noise([1, 2], **SIZE)
    latents = sample_latents(model, noise, text, steps=2, guidance=2.0, batch_size=2, **SIZE)
    assert None not in model.decode(latents, **SIZE)
    parameters = adapters.attach_lora(model, rank=2, alpha=4)
    with torch.no_grad():
        for number, parameter in enumerate(parameters):
            parameter.copy_(0.1 * draw(*parameter.shape, name=f"parameter {number}"))
    transformer: Any = model.transformer
    transformer.enable_gradient_checkpointing()
    gradient = group_gradient(model, latents.cpu(), tuple(text))
    assert gradient.isfinite(), gradient
    return latents.cpu(), {
        name: p.grad.cpu() for name, p in transformer.named_parameters() if p.requires_grad and p.grad is not None
    }


def group_gradient(model: FlowModel, latents: Tensor, text: tuple[Any, ...]) -> Tensor:
    """Backward of one step of two groups of K images, in micro-batches of two; returns the loss."""
    method = GdroMethod(name="gdro", k=K)
    batch = GroupBatch(
        latents=latents[:, None] + draw(2, K, *latents.shape[1:], name="latents"),
        rewards=torch.tensor([[0.1, 0.9, 0.4], [1.0, 0.0, 0.2]]),
        mask=torch.ones(2, K, dtype=torch.bool),
        prompts=tuple(PromptRecord(id=str(i), prompt=prompt) for i, prompt in enumerate(PROMPTS)),
        image_indices=torch.arange(K).repeat(2, 1),
        visits=(0, 0),
        conditioning=text,
    )
    step = GroupGradient(
        model=model,
        loss=loss_arguments(method),
        reduction=method.reduction,
        guidance=2.0,
        size=(SIZE["height"], SIZE["width"]),
        micro_batch=2,
        one_pass=False,
        backward=lambda loss: loss.backward(),
    )
    return step(noisy_groups(model, batch, draw_noise(batch, method, seed=0))).loss.cpu()


def check_families(out: str, *names: str) -> None:
    """Each family's tiny random model on the GPU against the CPU, and in bfloat16 under CUDA's autocast."""
    for name in names:
        folder = FAMILIES[name](Path(out) / name)
        latents, gradients = engine_pass(folder, "cpu")
        with pretend_gpu():
            found, found_gradients = engine_pass(folder, "cuda")
            _, rounded = engine_pass(folder, "cuda", "bfloat16")
        torch.testing.assert_close(found, latents, rtol=1e-4, atol=1e-4)
        difference = (flat(found_gradients) - flat(gradients)).norm() / flat(gradients).norm()
        assert difference < 1e-3, (name, difference)
        assert flat(rounded).isfinite().all() and flat(rounded).dtype == torch.float32
        print(name)  # noqa: T201


def flat(gradients: dict[str, Tensor]) -> Tensor:
    return torch.cat([gradients[name].flatten() for name in sorted(gradients)])


_reference_errors, _batch_conditioning = GroupGradient.reference_errors, FlowModel.batch_conditioning
_noisy_groups = noisy_groups
FAULTS: dict[str, tuple[Any, str, Callable[..., Any]]] = {
    "reference": (GroupGradient, "reference_errors", lambda *args: _reference_errors(*args).cpu()),
    "text": (
        FlowModel,
        "batch_conditioning",
        lambda *args: {key: value.cpu() for key, value in _batch_conditioning(*args).items()},
    ),
    "sigma": (
        sys.modules[__name__],
        "noisy_groups",
        lambda *args, **kwargs: replace(groups := _noisy_groups(*args, **kwargs), sigma=groups.sigma.cpu()),
    ),
    "image": (torch.Tensor, "cpu", lambda self: self),
}
"""Mistakes that only a GPU shows: something stays on the host, or is read there without having been brought."""


def check_planted(out: str) -> None:
    """The pretended GPU must refuse what a real one does."""
    folder = FAMILIES["flux-dev"](Path(out))
    for name, fault in FAULTS.items():
        with pretend_gpu(), mock.patch.object(*fault):
            try:
                engine_pass(folder, "cuda")
            except (RuntimeError, TypeError) as error:
                assert "same device" in str(error) or "to numpy" in str(error), error
                print(name)  # noqa: T201
                continue
        raise AssertionError(f"the pretended GPU accepted the fault: {name}")


def check_attention(out: str) -> None:
    """Sampling and training with a foreign kernel that takes what flash-attn takes."""
    calls = []

    def flash(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        if not query.dtype == key.dtype == value.dtype == torch.bfloat16:
            raise RuntimeError(f"FlashAttention only supports bf16 (q {query.dtype}, k {key.dtype}, v {value.dtype})")
        calls.append(query.requires_grad)
        heads = [tensor.transpose(1, 2) for tensor in (query, key, value)]
        return torch.nn.functional.scaled_dot_product_attention(*heads).transpose(1, 2)

    folder = FAMILIES["flux-dev"](Path(out))
    registry = attention_dispatch._AttentionBackendRegistry
    name = attention_dispatch.AttentionBackendName.FLASH
    taken = {"query", "key", "value"}
    with (
        pretend_gpu(),
        mock.patch.object(attention_dispatch, "_check_attention_backend_requirements"),
        mock.patch.dict(registry._backends, {name: flash}),
        mock.patch.dict(registry._supported_arg_names, {name: taken}),
    ):
        engine_pass(folder, "cuda", "bfloat16", ComputeOptions(attention="flash"))
    assert set(calls) == {False, True}, calls


def check_autocast(out: str, *settings: str) -> None:
    """Two precisions in one process. In each, sampling, training and evaluation run in one state of autocast."""
    for dtype, expected in (("bfloat16", (True, torch.bfloat16)), ("float32", (False, None))):
        states = set()

        def note(*_: Any, seen: set[Any] = states) -> None:
            on = torch.is_autocast_enabled("cuda")
            seen.add((torch.is_grad_enabled(), on, torch.get_autocast_dtype("cuda") if on else None))

        with pretend_gpu():
            recipe = load_recipe("smoke", overrides=[*settings, f"model.dtype={dtype}"])
            session = Session(recipe, Path(out) / dtype, Reporter())
            transformer: Any = session.model.transformer
            transformer.transformer_blocks[0].register_forward_pre_hook(note)
            train.run(session)
        assert states == {(False, *expected), (True, *expected)}, (dtype, states)


def run_recipe(out: str, *settings: str) -> None:
    """Train the smoke recipe with changes, and evaluate it; prints the summaries."""
    results = []
    with pretend_gpu():
        recipe = load_recipe("smoke", overrides=list(settings))
        for work in (partial(train.run, image_flops=image_flops), evaluate.run):
            session = Session(recipe, Path(out), Reporter())
            assert session.engine.device.type == "cuda"
            results.append(work(session).summary)
    print(results)  # noqa: T201


def check_device_scorer(out: str, *settings: str) -> None:
    """While stores are scored on the GPU, nothing of the model is there; afterwards training and sampling continue."""
    found = []

    def score(pool: ScoringPool, *args: Any, **kwargs: Any) -> Any:
        model: Any = session.model
        left = [name for name in model._loaded if name.startswith(("text_encoder", "vae"))]
        found.append((left, {parameter.device.type for parameter in model._transformer.parameters()}))
        return real(pool, *args, **kwargs)

    real = ScoringPool.score
    changes = mock.patch.object(OcrReward, "resources", "device"), mock.patch.object(ScoringPool, "score", score)
    with pretend_gpu(), changes[0], changes[1]:
        for stage in (train, evaluate):
            session = Session(load_recipe("smoke", overrides=[*settings, "train.eval_every=0"]), Path(out), Reporter())
            stage.run(session)  # type: ignore[attr-defined]
    assert len(found) >= 3 and all(each == ([], {"cpu"}) for each in found), found


def check_resume(out: str, *settings: str) -> None:
    """A run that was stopped after its first step and continued has the weights of one that was not."""
    adapters_found = []
    with pretend_gpu():
        recipe = load_recipe("smoke", overrides=[*settings, "train.eval_every=0"])
        for stop_first in (False, True):
            if stop_first:
                session = Session(recipe, Path(out), Reporter())
                session.stop.requested = True
                try:
                    train.run(session)
                except Interrupted:
                    pass
                else:
                    raise AssertionError("the training ignored the stop")
            result = train.run(Session(recipe, Path(out), Reporter()))
            assert result.resumed_from == (1 if stop_first else 0), result
            adapters_found.append((result.run.path / adapters.LORA_FILE).read_bytes())
            shutil.rmtree(result.run.path)
    assert adapters_found[0] == adapters_found[1]


if __name__ == "__main__":
    JOBS = {
        "families": check_families,
        "planted": check_planted,
        "attention": check_attention,
        "autocast": check_autocast,
        "recipe": run_recipe,
        "resume": check_resume,
        "device-scorer": check_device_scorer,
    }
    JOBS[sys.argv[1]](*sys.argv[2:])
