"""What is done on the pretended GPU. A job ends with an error where a check fails."""

from __future__ import annotations

from tests.gpu.pretend_gpu import pretend_gpu  # isort: skip - before whatever imports torch

import json
import os
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from diffusers.models import attention_dispatch
from torch import Tensor

from gdro_cli.config.load import load_recipe
from gdro_cli.errors import Interrupted
from gdro_cli.models import adapters
from gdro_cli.models.backends import ComputeOptions
from gdro_cli.models.base import FlowModel
from gdro_cli.rewards.ocr.reward import OcrReward
from gdro_cli.rewards.pool import ScoringPool
from gdro_cli.runtime.progress import Reporter
from gdro_cli.stages.evaluation import evaluate
from gdro_cli.stages.setup.session import Session
from gdro_cli.stages.training import group_gradient, train
from gdro_cli.stages.training.group_gradient import GroupGradient
from tests.gpu import passes
from tests.gpu.acceptance import __main__ as acceptance
from tests.gpu.passes import FAMILIES, difference, engine_pass, flat
from tests.gpu.peaks import check_peaks


def check_families(out: str, *names: str) -> None:
    """Each family's tiny random model on the GPU against the CPU, and in bfloat16 under CUDA's autocast."""
    for name in names:
        folder = FAMILIES[name](Path(out) / name)
        latents, gradients = engine_pass(folder, "cpu")
        with pretend_gpu():
            found, found_gradients = engine_pass(folder, "cuda")
            _, rounded = engine_pass(folder, "cuda", "bfloat16")
        torch.testing.assert_close(found, latents, rtol=1e-4, atol=1e-4)
        error = difference(flat(found_gradients), flat(gradients))
        assert error < 1e-3, (name, error)
        assert flat(rounded).isfinite().all() and flat(rounded).dtype == torch.float32
        print(name)  # noqa: T201


_reference_errors, _batch_conditioning = GroupGradient.reference_errors, FlowModel.batch_conditioning
_noisy_groups = passes.noisy_groups
FAULTS: dict[str, tuple[Any, str, Callable[..., Any]]] = {
    "reference": (GroupGradient, "reference_errors", lambda *args: _reference_errors(*args).cpu()),
    "text": (
        FlowModel,
        "batch_conditioning",
        lambda *args: {key: value.cpu() for key, value in _batch_conditioning(*args).items()},
    ),
    "sigma": (
        passes,
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
        for work in (train.run, evaluate.run):
            session = Session(recipe, Path(out), Reporter())
            assert session.engine.device.type == "cuda"
            results.append(work(session).summary)
    print(results)  # noqa: T201


def run_on_small_gpu(out: str, *settings: str) -> None:
    """The same on a GPU of 100 MB, of which 60 are taken, 28 of them by this process."""
    free, reserved = {"return_value": (40 * 10**6, 100 * 10**6)}, {"return_value": 28 * 10**6}
    with mock.patch("torch.cuda.mem_get_info", **free), mock.patch("torch.cuda.memory_reserved", **reserved):
        run_recipe(out, *settings)


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


def check_acceptance(out: str) -> None:
    """The acceptance with a wrong gradient, again without it, with an error, and without time; prints exit codes."""
    pretended = ["--tiny", "--pretend", os.environ["PRETEND_GPU"]]
    true_weights = group_gradient.image_weights

    def accept(folder: str, *arguments: str) -> int:
        return acceptance.main([str(Path(out) / folder), *pretended, *arguments])

    with mock.patch.object(group_gradient, "image_weights", lambda **given: 1.1 * true_weights(**given)):
        codes = [accept("fault", "--sections", "6")]
    codes.append(accept("fault", "--sections", "6"))
    with mock.patch.object(FlowModel, "release_encoders", side_effect=RuntimeError("planted\nsecond line")):
        codes.append(accept("error", "--sections", "8,14"))
    codes.append(accept("late", "--budget", "0"))
    print(json.dumps(codes))  # noqa: T201


JOBS: dict[str, Callable[..., None]] = {
    "families": check_families,
    "planted": check_planted,
    "attention": check_attention,
    "autocast": check_autocast,
    "recipe": run_recipe,
    "small_gpu": run_on_small_gpu,
    "resume": check_resume,
    "peaks": check_peaks,
    "acceptance": check_acceptance,
    "device-scorer": check_device_scorer,
}
