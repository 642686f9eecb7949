"""A few real training steps of the embedded world's judge."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from gdro_cli.core.seeds import seed_for
from gdro_cli.rewards.judge.base import AXES
from gdro_cli.rewards.judge.embedded import ANCHOR, EmbeddedJudge, JudgeNetwork
from gdro_cli.rewards.layers import scale_pixels
from gdro_cli.tiny import train_judge
from gdro_cli.tiny.degrade import COHERENCE, STYLE
from gdro_cli.tiny.judge_data import draw_example, judge_vocabulary
from gdro_cli.tiny.train_judge import Examples, Teacher, collate, main, measure, save, train

pytestmark = pytest.mark.slow

STEPS = 3
WORDS = max(judge_vocabulary().values()) + 1


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> JudgeNetwork:
    return train(steps=STEPS, seed=3, workers=0, out=tmp_path_factory.mktemp("training"))


def held_out_losses(judge: JudgeNetwork) -> dict[str, float]:
    rng = np.random.default_rng(99)
    batch = collate([draw_example(rng) for _ in range(32)], judge_vocabulary())
    teacher = Teacher(WORDS)
    teacher.judge = judge
    with torch.inference_mode():
        losses = teacher.losses(scale_pixels(batch["pixels"]), batch)
    return {name: float(value) for name, value in losses.items()}


def test_a_few_steps_lower_the_loss_on_held_out_images(trained: JudgeNetwork) -> None:
    """A constant quality of 1/2 has a loss of log 2 on each axis; the initial weights are near that."""
    torch.manual_seed(seed_for(3, "tiny-judge-weights"))
    before, after = held_out_losses(Teacher(WORDS).judge), held_out_losses(trained)
    first, last = (sum(losses[axis] for axis in AXES) for losses in (before, after))
    assert first == pytest.approx(3 * math.log(2), abs=0.6)
    assert last < first
    assert set(before) == {*AXES, "letters", "things"}


def test_batches_are_a_function_of_the_seed() -> None:
    one, again, other = (next(iter(Examples(seed, judge_vocabulary()))) for seed in (1, 1, 2))
    assert {name: tuple(value.shape) for name, value in one.items()} == {
        "pixels": (32, 64, 64, 3), "words": (32, 28), "qualities": (32, 3), "letters": (32, 64), "things": (32, 64)
    }  # fmt: skip
    assert all(torch.equal(one[name], again[name]) for name in one)
    assert not torch.equal(one["pixels"], other["pixels"])


def test_saved_weights_give_the_same_qualities_as_the_network(trained: JudgeNetwork, tmp_path: Path) -> None:
    """Weights are stored in half precision, 11 bits each."""
    save(trained, tmp_path)
    rng = np.random.default_rng(4)
    examples = [draw_example(rng) for _ in range(8)]
    batch = collate(examples, judge_vocabulary())
    with torch.inference_mode():
        expected = trained(scale_pixels(batch["pixels"]), batch["words"]).sigmoid()
    images = [Image.fromarray(example.pixels) for example in examples]
    qualities = EmbeddedJudge(tmp_path).qualities(images, [example.prompt for example in examples])
    torch.testing.assert_close(qualities, expected, atol=5e-3, rtol=0)


def test_the_report_covers_every_fault_and_kind(trained: JudgeNetwork, tmp_path: Path) -> None:
    save(trained, tmp_path)
    report = measure(tmp_path, images=6, seed=0)
    assert set(report) == {
        *(f"coherence: {fault}" for fault in COHERENCE),
        *(f"style: {fault}" for fault in STYLE),
        "alignment: signs",
        "alignment: shapes",
    }
    for name, correlations in report.items():
        kinds = {"across images"} if name.startswith("alignment") else {"across images", "within an image"}
        assert set(correlations) == kinds
        assert all(-1 <= value <= 1 for value in correlations.values())
    assert measure(tmp_path, images=6, seed=0) == report


def test_calibration_gives_the_base_models_images_the_mean_of_the_anchor(
    trained: JudgeNetwork, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With two prompts per reward; the weights do not change."""
    monkeypatch.setattr(train_judge, "CALIBRATION", 2)
    save(trained, tmp_path)
    before = (tmp_path / "model.safetensors").read_bytes()
    images, prompts = train_judge.base_images()
    assert [image.size for image in images] == [(64, 64)] * 4
    assert ['"' in prompt for prompt in prompts] == [True, True, False, False]
    shifts = train_judge.calibrate(tmp_path)
    judgements = EmbeddedJudge(tmp_path).judge(images, prompts)
    for axis in AXES:
        assert np.mean([judgement.axes[axis] for judgement in judgements]) == pytest.approx(ANCHOR, abs=2e-3)  # type: ignore[misc]
    assert json.loads((tmp_path / "config.json").read_text())["calibration"] == shifts
    assert (tmp_path / "model.safetensors").read_bytes() == before


def test_the_command_reports_on_existing_weights(
    trained: JudgeNetwork, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    save(trained, tmp_path)
    before = (tmp_path / "model.safetensors").read_bytes()
    monkeypatch.setattr("sys.argv", ["train_judge", "--out", str(tmp_path), "--images", "4", "--only-report"])
    main()
    report = json.loads((tmp_path / "report.json").read_text())
    assert report == json.loads(capsys.readouterr().out)
    assert (tmp_path / "model.safetensors").read_bytes() == before
