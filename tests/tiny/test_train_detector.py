"""A few real training steps of the embedded world's detector."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch.nn import functional

from gdro_cli.core.geneval import TAGS
from gdro_cli.core.seeds import seed_for
from gdro_cli.embedded import tiny_model_path
from gdro_cli.rewards.geneval.palette import PaletteColours
from gdro_cli.rewards.geneval.segmenter import SegmentationNetwork, SegmenterDetector
from gdro_cli.rewards.layers import to_pixels
from gdro_cli.tiny.autoencoder import PatchAutoencoder
from gdro_cli.tiny.train_detector import (
    PALETTE_FILE,
    WIDTHS,
    Agreement,
    Examples,
    as_generated,
    draw_example,
    main,
    measure,
    passed_through,
    pixel_labels,
    save,
    train,
)
from gdro_cli.tiny.world import COLOURS, SHAPES, Thing, random_scene, thing_mask

pytestmark = pytest.mark.slow

STEPS = 8


@pytest.fixture(scope="module")
def network(tmp_path_factory: pytest.TempPathFactory) -> SegmentationNetwork:
    return train(steps=STEPS, seed=3, workers=0, log=tmp_path_factory.mktemp("training") / "log.jsonl")


def held_out_loss(network: SegmentationNetwork) -> float:
    rng = np.random.default_rng(99)
    examples = [draw_example(rng) for _ in range(32)]
    pixels = to_pixels([Image.fromarray(example.pixels) for example in examples])
    labels = torch.from_numpy(np.stack([example.labels for example in examples]))
    with torch.inference_mode():
        return float(functional.cross_entropy(network(pixels), labels))


def test_a_few_steps_lower_the_loss_on_held_out_images(network: SegmentationNetwork) -> None:
    """The same initial weights, with and without training; guessing among 7 classes gives log 7 = 1.95."""
    torch.manual_seed(seed_for(3, "tiny-detector-weights"))
    before = held_out_loss(SegmentationNetwork(len(SHAPES), WIDTHS))
    assert before == pytest.approx(np.log(7), abs=0.5)
    assert held_out_loss(network) < 0.6 * before


def test_the_detector_loads_the_saved_weights(network: SegmentationNetwork, tmp_path: Path) -> None:
    save(network, tmp_path)
    detector = SegmenterDetector(tmp_path)
    rng = np.random.default_rng(4)
    images = [random_scene(rng, "counting").image for _ in range(4)]
    pixels = to_pixels(images)
    with torch.inference_mode():
        assert torch.equal(detector._loaded()(pixels), network(pixels))
    assert tuple(detector.classes) == SHAPES
    assert set(PaletteColours.read(tmp_path / PALETTE_FILE).version["palette"]) == set(COLOURS)


def test_pixel_labels_are_the_masks_without_their_rim() -> None:
    """A square covers 14 x 14 pixels, 12 x 12 without the rim; in token (1, 2) that is x 34..45, y 18..29.

    Classes: background 0, then SHAPES from 1: square 2, ring 6. The hole of a ring is part of it.
    """
    square, ring = Thing("square", "red", 1, 2), Thing("ring", "blue", 3, 3)
    assert thing_mask(square).sum() == 14 * 14
    labels = pixel_labels((square, ring))
    assert labels.shape == (64, 64) and labels.dtype == np.int64
    assert np.unique(labels).tolist() == [0, 2, 6]
    expected = np.zeros((64, 64), bool)
    expected[18:30, 34:46] = True
    assert np.array_equal(labels == 2, expected)
    assert labels[56, 56] == 6  # the middle of the ring
    assert not ((labels == 6) & ~thing_mask(ring)).any()
    assert not pixel_labels(()).any()


def test_neighbours_are_separated_by_background_in_the_labels() -> None:
    labels = pixel_labels((Thing("square", "red", 0, 0), Thing("square", "red", 0, 1)))
    (gap,) = np.nonzero(~(labels[8] > 0)[2:30])
    assert len(gap) >= 3  # a pixel of each rim, and the gap between the tokens


def test_labels_move_with_the_image() -> None:
    """The pixels that are labelled as a shape have one of the world's colours, outline or chalk, not a background's."""
    rng = np.random.default_rng(8)
    colours = PaletteColours.read(tiny_model_path().parent / "detector" / PALETTE_FILE).version
    points = np.array([*colours["palette"].values(), *colours["neutral"]], float)
    shifted = 0
    for _ in range(40):
        example = draw_example(rng)
        inside = example.pixels[example.labels > 0].astype(float)
        if not len(inside):
            continue
        shifted += 1
        distance = np.sqrt(np.square(inside[:, None] - points).sum(-1)).min(-1)
        assert np.median(distance) < 3
        assert (distance < 60).mean() > 0.8
    assert shifted > 20


def test_examples_are_a_function_of_the_seed() -> None:
    (first, labels), (again, _), (other, _) = (next(iter(Examples(seed))) for seed in (1, 1, 2))
    assert first.shape == (32, 64, 64, 3) and labels.shape == (32, 64, 64)
    assert torch.equal(first, again) and not torch.equal(first, other)


def test_most_images_pass_through_the_autoencoder_and_some_remain_unchanged() -> None:
    autoencoder = PatchAutoencoder.from_pretrained(tiny_model_path() / "vae").eval()
    rng = np.random.default_rng(1)
    pixels = to_pixels([random_scene(rng).image for _ in range(40)])
    mixed = as_generated(pixels, autoencoder, torch.Generator().manual_seed(0))
    errors = (mixed - pixels).square().mean(dim=(1, 2, 3))
    clean = int((errors == 0).sum())
    assert 4 <= clean <= 20  # 12 of 40 expected, standard deviation 2.9
    assert float(errors[errors > 0].mean()) < 0.05
    assert float(mixed.abs().max()) <= 1


def test_passing_through_hardly_changes_an_image() -> None:
    autoencoder = PatchAutoencoder.from_pretrained(tiny_model_path() / "vae").eval()
    image = random_scene(np.random.default_rng(2), "two_object").image
    (after,) = passed_through([image], autoencoder)
    difference = np.abs(np.asarray(after).astype(int) - np.asarray(image))
    assert after.size == image.size and 0 < difference.mean() < 12


def test_a_network_without_training_has_no_agreement(tmp_path: Path) -> None:
    """All weights are 0: all classes are equally likely, so the whole image is one object."""
    blind = SegmentationNetwork(len(SHAPES), WIDTHS)
    for parameter in blind.parameters():
        torch.nn.init.zeros_(parameter)
    save(blind, tmp_path)
    assert measure(tmp_path, images=2, seed=0, minimum=0.1) == dict.fromkeys(TAGS, Agreement(2, 0.0, 0.0))


def test_the_command_trains_saves_and_reports(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "detector"
    common = ["train_detector", "--out", str(out), "--images", "1"]
    monkeypatch.setattr("sys.argv", [*common, "--steps", "2", "--workers", "0"])
    main()
    assert {path.name for path in out.iterdir()} >= {"config.json", "model.safetensors", "palette.json", "report.json"}
    report = json.loads((out / "report.json").read_text())
    assert set(report) == {"drawn", "through the autoencoder"} and set(report["drawn"]) == set(TAGS)
    weights = (out / "model.safetensors").stat().st_mtime_ns
    monkeypatch.setattr("sys.argv", [*common, "--only-report"])
    main()
    assert json.loads((out / "report.json").read_text()) == report
    assert (out / "model.safetensors").stat().st_mtime_ns == weights
