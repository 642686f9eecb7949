"""A few real pretraining steps of the embedded model."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import FluxPipeline
from safetensors.torch import load_file

from gdro_cli.rewards.layers import to_pixels
from gdro_cli.tiny.autoencoder import PatchAutoencoder, decode_pixels, encode_mean
from gdro_cli.tiny.pretrain import average_decay, learning_rate, main
from gdro_cli.tiny.pretraining_set import random_drawing
from gdro_cli.tiny.tokenizers import CLIP_LENGTH, T5_LENGTH, build_clip_tokenizer, build_t5_tokenizer

pytestmark = pytest.mark.slow

LONGEST = 'a purple sign that says "ORANGE WINDOW" on a sandy background'


def test_learning_rate_warms_up_and_falls() -> None:
    """Warm-up of 200 steps to 1.5e-3; over the last 100 of 1000 steps the rate falls linearly to 0."""
    assert learning_rate(0, steps=1000, decay_steps=100) == pytest.approx(1.5e-3 / 200)
    assert learning_rate(500, steps=1000, decay_steps=100) == 1.5e-3
    assert learning_rate(950, steps=1000, decay_steps=100) == pytest.approx(0.75e-3)
    assert average_decay(50) == 0.5


def test_tokenizers_split_quoted_text_into_letters() -> None:
    t5 = build_t5_tokenizer()
    tokens = t5.tokenize('a red sign that says "HELLO YOU" on a brick background')
    assert tokens[:6] == ["▁a", "▁red", "▁sign", "▁that", "▁says", '▁"']
    assert tokens[6:] == [*"HELLO", "▁", *"YOU", '"', "▁on", "▁a", "▁brick", "▁background"]
    assert len(t5(LONGEST).input_ids) <= T5_LENGTH
    assert len(build_clip_tokenizer()(LONGEST).input_ids) <= CLIP_LENGTH


def test_an_autoencoder_from_pca_preserves_images() -> None:
    """32 of 192 components of 8 x 8 patches preserve at least 96 % of the variance (measured: 97.2 %)."""
    rng = np.random.default_rng(0)
    pixels = to_pixels([random_drawing(rng, sign_share=0.5).image for _ in range(200)])
    autoencoder = PatchAutoencoder()
    autoencoder.start_from_pca(pixels)
    with torch.no_grad():
        latents = encode_mean(autoencoder, pixels)
        error = (decode_pixels(autoencoder, latents) - pixels).square().mean()
    assert latents.shape == (200, 32, 8, 8)
    assert latents.std() == pytest.approx(1, abs=0.01)
    assert error < 0.04 * float(pixels.var())


@pytest.fixture(scope="module")
def pretrained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three steps, then two more in a second call."""
    out = tmp_path_factory.mktemp("pretraining")
    common = ["--out", str(out), "--images", "2000", "--autoencoder-steps", "3", "--workers", "1", "--log-every", "1"]
    with pytest.MonkeyPatch.context() as patch:
        for steps in ("3", "5"):
            patch.setattr("sys.argv", ["pretrain", *common, "--steps", steps, "--decay-steps", "0"])
            main()
    return out


def test_a_second_call_continues(pretrained: Path, tmp_path: Path) -> None:
    """Steps 4 and 5 after a restart equal those of an uninterrupted run, bit by bit."""
    for part in ("vae", "images"):
        shutil.copytree(pretrained / part, tmp_path / part)
    with pytest.MonkeyPatch.context() as patch:
        argv = ["pretrain", "--out", str(tmp_path), "--images", "2000", "--workers", "1", "--steps", "5"]
        patch.setattr("sys.argv", [*argv, "--decay-steps", "0"])
        main()
    weights = [load_file(out / "checkpoint" / "tensors-5.safetensors") for out in (pretrained, tmp_path)]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])
    steps = [json.loads(line).get("step") for line in (pretrained / "log.jsonl").read_text().splitlines()]
    assert steps[-5:] == [1, 2, 3, 4, 5]


def test_the_result_is_a_flux_pipeline(pretrained: Path) -> None:
    pipeline = FluxPipeline.from_pretrained(pretrained / "step-000005", dtype=torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    images = pipeline(
        LONGEST, height=64, width=64, num_inference_steps=2, max_sequence_length=T5_LENGTH, output_type="pt"
    ).images
    assert images.shape == (1, 3, 64, 64)
    assert bool(images.isfinite().all())
    assert (pretrained / "step-000005" / "samples.png").stat().st_size > 10_000


def test_other_arguments_in_the_same_folder_are_refused(
    pretrained: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.argv", ["pretrain", "--out", str(pretrained), "--images", "4000", "--seed", "1"])
    with pytest.raises(SystemExit) as caught:
        main()
    assert caught.value.code == 2
    message = capsys.readouterr().err
    assert "images: 2000 -> 4000" in message
    assert "seed: 0 -> 1" in message
