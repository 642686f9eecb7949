"""The engine and the stages on a pretended GPU: everything that meets must be on it, under CUDA's own autocast.

It has no kernels, no streams, no memory of its own and no NCCL; those need a GPU (``tests/gpu/acceptance``).
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from gdro_cli.config.load import load_recipe
from gdro_cli.stages.training.estimate import Estimate
from tests.gpu.conftest import Job

pytestmark = pytest.mark.slow


def test_sampling_and_gradients_are_those_of_the_cpu(job: Job, tmp_path: Path) -> None:
    families = ["flux-dev", "sd3", "qwen-image", "z-image", "flux2-klein", "chroma", "hidream"]
    assert job("families", tmp_path, *families).split() == families


def test_planted_faults_are_caught(job: Job, tmp_path: Path) -> None:
    assert job("planted", tmp_path / "model").split() == ["reference", "text", "sigma", "image"]


def test_a_foreign_attention_kernel_samples_and_trains(job: Job, tmp_path: Path) -> None:
    """Under CUDA's autocast the norms of queries and keys are float32, which such kernels refuse."""
    job("attention", tmp_path / "model")


SMALL = (
    "judge.kind=none",  # it works in a process of its own, which does not pretend
    "prompts.train.count=2",
    "prompts.validation.count=1",
    "prompts.eval.count=2",
    "train.steps=2",
)


def test_training_and_evaluation(job: Job, tmp_path: Path) -> None:
    assert "validation reward" in job("recipe", tmp_path, *SMALL)
    (metrics,) = tmp_path.glob("runs/*/metrics.jsonl")
    steps = [row for row in map(json.loads, metrics.read_text().splitlines()) if row["kind"] == "train"]
    assert [row["gpu_peak_gb"] for row in steps] == [2, 2]
    on_gpu = load_recipe("smoke", overrides=[*SMALL, "model.dtype=bfloat16"])
    expected = Estimate(on_gpu).step_flops / 1e12
    assert [row["tflops"] * row["seconds"] for row in steps] == pytest.approx([expected, expected])


def test_sampling_and_training_share_a_state_of_autocast(job: Job, tmp_path: Path) -> None:
    job("autocast", tmp_path, *SMALL)


def test_the_model_leaves_the_gpu_to_scorers_that_need_it(job: Job, tmp_path: Path) -> None:
    job("device-scorer", tmp_path, *SMALL)


def test_automatic_micro_batch_fits_the_gpu(job: Job, tmp_path: Path) -> None:
    """Of 100 MB a tenth stays free and other programs have 32 MB: 58 MB. Six images would need 63."""
    job("small_gpu", tmp_path, *SMALL, "train.micro_batch=auto", "train.eval_every=0")
    (metrics,) = tmp_path.glob("runs/*/metrics.jsonl")
    assert [json.loads(row)["micro_batch"] for row in metrics.read_text().splitlines()] == [3, 3]


def test_online_method_with_offload(job: Job, tmp_path: Path) -> None:
    method = ("group_size=2", "prompts_per_round=2", "updates_per_round=1", "train_sample_steps=3")
    settings = ("method.name=flow-grpo", *(f"method.{each}" for each in method), "model.offload=true")
    assert "report" in job("recipe", tmp_path, *SMALL, *settings, "train.eval_every=0")


def test_resumed_run_has_the_same_bits(job: Job, tmp_path: Path) -> None:
    job("resume", tmp_path, *SMALL)
