"""The engine and the stages on a pretended GPU: everything that meets must be on it, under CUDA's own autocast.

It has no kernels, no streams, no memory of its own and no NCCL; those need a GPU (``tests/gpu/acceptance``).
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from gdro_cli.config.load import load_recipe
from gdro_cli.stages.training.estimate import Estimate
from tests.gpu.conftest import Jobs

pytestmark = pytest.mark.slow


def test_models_and_planted_faults(jobs: Jobs, tmp_path: Path) -> None:
    """Sampling and gradients are those of the CPU, planted faults are caught, and a foreign attention kernel works.

    Under CUDA's autocast the norms of queries and keys are float32, which such kernels refuse.
    """
    families = ["flux-dev", "sd3", "qwen-image", "z-image", "flux2-klein", "chroma", "hidream"]
    drawn, faults, _ = jobs(
        ["families", tmp_path, *families], ["planted", tmp_path / "planted"], ["attention", tmp_path / "attention"]
    )
    assert drawn.split() == families
    assert faults.split() == ["reference", "text", "sigma", "image"]


SMALL = (
    "judge.kind=none",  # it works in a process of its own, which does not pretend
    "prompts.train.count=2",
    "prompts.validation.count=1",
    "prompts.eval.count=2",
    "train.steps=2",
)
STORED = (*SMALL, "sample.images_per_prompt=3")


def test_training_and_evaluation(jobs: Jobs, tmp_path: Path) -> None:
    """Also in two precisions, each in one state of autocast, and without the model while a scorer needs the GPU."""
    output, *_ = jobs(
        ["recipe", tmp_path / "recipe", *STORED],
        ["autocast", tmp_path / "autocast", *STORED],
        ["device-scorer", tmp_path / "scorer", *STORED],
    )
    assert "validation reward" in output
    (metrics,) = tmp_path.glob("recipe/runs/*/metrics.jsonl")
    steps = [row for row in map(json.loads, metrics.read_text().splitlines()) if row["kind"] == "train"]
    assert [row["gpu_peak_gb"] for row in steps] == [2, 2]
    on_gpu = load_recipe("smoke", overrides=[*STORED, "model.dtype=bfloat16"])
    expected = Estimate(on_gpu).step_flops / 1e12
    assert [row["tflops"] * row["seconds"] for row in steps] == pytest.approx([expected, expected])


def test_small_memory_online_and_resumed(jobs: Jobs, tmp_path: Path) -> None:
    """An automatic micro-batch fits the GPU, an online method trains with offload, a resumed run has the same bits.

    Of 100 MB a tenth stays free and other programs have 32 MB: 58 MB. Six images would need 63.
    """
    automatic = ("train.micro_batch=auto", "train.eval_every=0")
    method = ("group_size=2", "prompts_per_round=2", "updates_per_round=1", "train_sample_steps=3")
    online = ("method.name=flow-grpo", *(f"method.{each}" for each in method), "model.offload=true")
    _, output, _ = jobs(
        ["small_gpu", tmp_path / "small", *STORED, *automatic],
        ["recipe", tmp_path / "online", *SMALL, *online, "train.eval_every=0"],
        ["resume", tmp_path / "resume", *STORED],
    )
    (metrics,) = tmp_path.glob("small/runs/*/metrics.jsonl")
    assert [json.loads(row)["micro_batch"] for row in metrics.read_text().splitlines()] == [3, 3]
    assert "report" in output
