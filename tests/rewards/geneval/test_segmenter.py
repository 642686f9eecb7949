"""The embedded world's detector with the weights that are shipped, against pictures whose content is known."""

from __future__ import annotations

import json
import pickle
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from scipy import ndimage

from gdro_cli.core.geneval import SHAPES, TAGS
from gdro_cli.embedded import tiny_detector_path
from gdro_cli.errors import PrerequisiteError
from gdro_cli.files import sha256_file
from gdro_cli.rewards.geneval.detection import Detection, Mask, mask_box
from gdro_cli.rewards.geneval.palette import PaletteColours
from gdro_cli.rewards.geneval.reward import GenEvalReward
from gdro_cli.rewards.geneval.segmenter import SegmenterDetector
from gdro_cli.tiny.backgrounds import BACKGROUNDS
from gdro_cli.tiny.train_detector import measure
from gdro_cli.tiny.world import Thing, draw_things, random_scene, random_sign, thing_mask
from tests.support.ocr_signs import Prompt

MINIMUM = 0.3


@pytest.fixture(scope="module")
def detector() -> SegmenterDetector:
    made = SegmenterDetector(tiny_detector_path())
    made.load()
    return made


def draw(*things: Thing, background: str = "plain", seed: int = 0) -> Image.Image:
    return draw_things(things, background=background, rng=np.random.default_rng(seed))


def scenes(count: int) -> list[Image.Image]:
    rng = np.random.default_rng(5)
    return [random_scene(rng).image for _ in range(count)]


def overlap(one: Mask, other: Mask) -> float:
    return float((one & other).sum() / (one | other).sum())


def same(first: list[list[Detection]], second: list[list[Detection]]) -> None:
    """Equal but for the last digits of the confidences, which depend on how many images share a product."""
    assert [len(objects) for objects in first] == [len(objects) for objects in second]
    for one, other in zip([o for f in first for o in f], [o for s in second for o in s], strict=True):
        assert (one.label, one.box) == (other.label, other.box)
        assert one.confidence == pytest.approx(other.confidence, abs=1e-5)
        assert np.array_equal(one.mask, other.mask)


@pytest.mark.slow
@pytest.mark.parametrize("generated", [False, True], ids=["drawn", "through the autoencoder"])
def test_it_sees_fresh_pictures_as_they_were_drawn(generated: bool) -> None:
    """The report gives 1.000 of the drawn ones and 0.990 to 0.999 of those through the autoencoder, by tag."""
    found = measure(
        tiny_detector_path(), pictures=30 if generated else 60, seed=2027, minimum=MINIMUM, generated=generated
    )
    assert tuple(found) == TAGS
    for tag, agreement in found.items():
        assert agreement.objects >= (0.96 if generated else 0.98), (tag, agreement)
        assert agreement.masks > 0.93, (tag, agreement)
    assert np.mean([agreement.objects for agreement in found.values()]) >= 0.98


def test_the_shipped_report_covers_every_tag_and_holds_what_the_reward_needs() -> None:
    report = json.loads((tiny_detector_path() / "report.json").read_text())
    for found in report.values():
        assert set(found) == set(TAGS)
        assert all(row["objects"] >= 0.98 and row["pictures"] >= 1000 for row in found.values())


@pytest.mark.parametrize("shape", SHAPES)
def test_box_and_mask_are_those_of_the_drawn_shape(detector: SegmenterDetector, shape: str) -> None:
    """Made smaller and grown back by a pixel, a shape loses what is narrower than three: the tips of star and heart.

    The tips of the star are three pixels long at the top.
    """
    thing = Thing(shape, "green", 2, 1)
    ((found,),) = detector.detect([draw(thing)], minimum=MINIMUM)
    truth = thing_mask(thing)
    assert found.label == shape
    assert found.confidence > 0.9
    assert found.mask.shape == (64, 64) and found.mask.dtype == np.bool_
    assert overlap(found.mask, truth) > 0.8
    assert overlap(found.mask, ndimage.binary_opening(truth, np.ones((3, 3)))) > 0.97
    assert found.box == mask_box(found.mask)
    drawn = mask_box(truth)
    assert drawn is not None
    assert max(abs(edge - true) for edge, true in zip(found.box, drawn, strict=True)) <= 3


def test_neighbours_of_one_shape_and_colour_stay_apart(detector: SegmenterDetector) -> None:
    """Shapes in neighbouring tokens have two pixels between them; the masks must not share any."""
    things = [Thing("square", "red", row, column) for row in (1, 2) for column in (0, 1, 2)]
    (found,) = detector.detect([draw(*things)], minimum=MINIMUM)
    assert [each.label for each in found] == ["square"] * 6
    assert sum(each.mask.astype(int) for each in found).max() == 1  # type: ignore[union-attr]
    for thing in things:
        assert max(overlap(each.mask, thing_mask(thing)) for each in found) > 0.9


def test_signs_and_bare_backgrounds_hold_no_objects(detector: SegmenterDetector) -> None:
    rng = np.random.default_rng(6)
    bare = [draw(background=name, seed=seed) for name in BACKGROUNDS for seed in range(5)]
    signs = [random_sign(rng).image for _ in range(60)]
    assert [objects for objects in detector.detect(bare + signs, minimum=MINIMUM) if objects] == []


def test_the_most_confident_come_first_and_the_minimum_is_kept(detector: SegmenterDetector) -> None:
    (everything,) = detector.detect([draw(*(Thing(s, "pink", i // 3, i % 3) for i, s in enumerate(SHAPES)))], minimum=0)
    confidences = [each.confidence for each in everything]
    assert len(everything) == 6
    assert confidences == sorted(confidences, reverse=True)
    (kept,) = detector.detect(
        [draw(*(Thing(s, "pink", i // 3, i % 3) for i, s in enumerate(SHAPES)))], minimum=confidences[3]
    )
    assert [each.label for each in kept] == [each.label for each in everything[:3]]  # strictly above


def test_what_is_found_does_not_depend_on_the_batch(detector: SegmenterDetector) -> None:
    images = scenes(12)
    alone = SegmenterDetector(tiny_detector_path(), batch_size=1)
    thirds = SegmenterDetector(tiny_detector_path(), batch_size=3)
    whole = detector.detect(images, minimum=MINIMUM)
    assert sum(map(len, whole)) > 12
    same(whole, alone.detect(images, minimum=MINIMUM))
    same(whole, thirds.detect(images, minimum=MINIMUM))
    same(whole[::-1], detector.detect(images[::-1], minimum=MINIMUM))
    assert detector.detect([], minimum=MINIMUM) == []


def test_images_of_several_sizes_in_one_call(detector: SegmenterDetector) -> None:
    """A picture put into a wider one of its own background: the star moves 32 pixels to the right."""
    small = draw(Thing("star", "yellow", 1, 1))
    wide = Image.new("RGB", (128, 64), small.getpixel((0, 0)))
    wide.paste(small, (32, 0))
    first, (star,), last = detector.detect([small, wide, small], minimum=MINIMUM)
    same([first], [last])
    assert star.label == "star"
    assert star.mask.shape == (64, 128)
    assert np.allclose(star.box, np.add(first[0].box, (32, 0, 32, 0)), atol=1)


CIRCLE: dict[str, Any] = {"tag": "single_object", "include": [{"class": "circle", "count": 1}]}


def test_a_size_that_cannot_be_halved_thrice_is_refused_and_costs_only_its_image(detector: SegmenterDetector) -> None:
    good, bad = draw(Thing("circle", "blue", 0, 0)), Image.new("RGB", (64, 60))
    with pytest.raises(ValueError, match=r"multiples of 8, not \(64, 60\)"):
        detector.detect([good, bad], minimum=MINIMUM)
    reward = GenEvalReward(detector=detector, colours=PaletteColours.read(tiny_detector_path() / "palette.json"))
    scores = reward.score([good, bad, good], [Prompt("a circle", None, CIRCLE)] * 3)
    assert [score.value for score in scores] == [1.0, None, 1.0]
    assert "multiples of 8" in str(scores[1].reason)


@pytest.mark.parametrize("missing", ["config.json", "model.safetensors", None])
def test_missing_weights_are_one_sentence_before_anything_is_loaded(tmp_path: Path, missing: str | None) -> None:
    folder = tmp_path / "detector"
    if missing is not None:
        shutil.copytree(tiny_detector_path(), folder)
        (folder / missing).unlink()
    with pytest.raises(PrerequisiteError, match="is missing or incomplete: reinstall") as caught:
        SegmenterDetector(folder)
    assert str(folder) in str(caught.value)


@pytest.mark.parametrize("config", ["{", "[]", "{}", '{"classes": ["circle"], "widths": ["wide"]}'])
def test_a_damaged_configuration_is_one_sentence(tmp_path: Path, config: str) -> None:
    shutil.copytree(tiny_detector_path(), tmp_path / "detector")
    (tmp_path / "detector" / "config.json").write_text(config)
    with pytest.raises(PrerequisiteError, match="incomplete"):
        SegmenterDetector(tmp_path / "detector")


@pytest.mark.parametrize("damage", ["cut", "other sizes"])
def test_damaged_weights_are_one_sentence(tmp_path: Path, damage: str) -> None:
    shutil.copytree(tiny_detector_path(), tmp_path / "detector")
    if damage == "cut":
        path = tmp_path / "detector" / "model.safetensors"
        path.write_bytes(path.read_bytes()[:-100])
    else:
        (tmp_path / "detector" / "config.json").write_text('{"classes": ["circle"], "widths": [32, 64, 96]}')
    with pytest.raises(PrerequisiteError, match=r"model\.safetensors are damaged"):
        SegmenterDetector(tmp_path / "detector").load()


def test_the_version_names_the_bytes_of_the_weights(tmp_path: Path) -> None:
    shutil.copytree(tiny_detector_path(), tmp_path / "detector")
    before = SegmenterDetector(tmp_path / "detector")
    assert before.version == SegmenterDetector(tiny_detector_path()).version
    assert before.version["files"] == {
        name: sha256_file(tiny_detector_path() / name) for name in ("config.json", "model.safetensors")
    }
    assert tuple(before.classes) == SHAPES
    with (tmp_path / "detector" / "model.safetensors").open("ab") as file:
        file.write(b"\0")
    assert SegmenterDetector(tmp_path / "detector").version != before.version


def test_a_pickled_detector_leaves_its_network_behind_and_finds_the_same(detector: SegmenterDetector) -> None:
    images = scenes(3)
    before = detector.detect(images, minimum=MINIMUM)
    sent = pickle.dumps(detector)
    assert len(sent) < 5_000  # the weights are 2.4 MB
    copy: SegmenterDetector = pickle.loads(sent)
    assert copy.version == detector.version
    same(copy.detect(images, minimum=MINIMUM), before)
