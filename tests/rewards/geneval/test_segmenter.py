"""The embedded world's detector with its shipped weights, on images whose content is known."""

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
    return SegmenterDetector(tiny_detector_path())


def draw(*things: Thing, background: str = "plain", seed: int = 0) -> Image.Image:
    return draw_things(things, background=background, rng=np.random.default_rng(seed))


def scenes(count: int) -> list[Image.Image]:
    rng = np.random.default_rng(5)
    return [random_scene(rng).image for _ in range(count)]


def overlap(one: Mask, other: Mask) -> float:
    return float((one & other).sum() / (one | other).sum())


def same(first: list[list[Detection]], second: list[list[Detection]]) -> None:
    """Equal except for the last digits of the confidences, which depend on the size of the batch."""
    assert [len(objects) for objects in first] == [len(objects) for objects in second]
    for one, other in zip([o for f in first for o in f], [o for s in second for o in s], strict=True):
        assert (one.label, one.box) == (other.label, other.box)
        assert one.confidence == pytest.approx(other.confidence, abs=1e-5)
        assert np.array_equal(one.mask, other.mask)


@pytest.mark.slow
@pytest.mark.parametrize("generated", [False, True], ids=["drawn", "through the autoencoder"])
def test_it_detects_the_objects_of_fresh_images_as_they_were_drawn(generated: bool) -> None:
    """The report has 1.000 for drawn images and 0.990 to 0.999 for those through the autoencoder, by tag."""
    report = measure(
        tiny_detector_path(), images=30 if generated else 60, seed=2027, minimum=MINIMUM, generated=generated
    )
    assert tuple(report) == TAGS
    for tag, agreement in report.items():
        assert agreement.objects >= (0.96 if generated else 0.98), (tag, agreement)
        assert agreement.masks > 0.93, (tag, agreement)
    assert np.mean([agreement.objects for agreement in report.values()]) >= 0.98


def test_the_shipped_report_covers_every_tag_with_high_agreement() -> None:
    report = json.loads((tiny_detector_path() / "report.json").read_text())
    for by_tag in report.values():
        assert set(by_tag) == set(TAGS)
        assert all(row["objects"] >= 0.98 and row["images"] >= 1000 for row in by_tag.values())


@pytest.mark.parametrize("shape", SHAPES)
def test_box_and_mask_are_those_of_the_drawn_shape(detector: SegmenterDetector, shape: str) -> None:
    """A shape that is shrunk and grown by a pixel loses parts narrower than three: the tips of star and heart.

    The tips of the star are three pixels long at the top.
    """
    thing = Thing(shape, "green", 2, 1)
    ((item,),) = detector.detect([draw(thing)], minimum=MINIMUM)
    truth = thing_mask(thing)
    assert item.label == shape
    assert item.confidence > 0.9
    assert item.mask.shape == (64, 64) and item.mask.dtype == np.bool_
    assert overlap(item.mask, truth) > 0.8
    assert overlap(item.mask, ndimage.binary_opening(truth, np.ones((3, 3)))) > 0.97
    assert item.box == mask_box(item.mask)
    drawn = mask_box(truth)
    assert drawn is not None
    assert max(abs(edge - true) for edge, true in zip(item.box, drawn, strict=True)) <= 3


def test_neighbours_of_one_shape_and_colour_stay_apart(detector: SegmenterDetector) -> None:
    """Shapes in neighbouring tokens have two pixels between them; their masks must not overlap."""
    things = [Thing("square", "red", row, column) for row in (1, 2) for column in (0, 1, 2)]
    (objects,) = detector.detect([draw(*things)], minimum=MINIMUM)
    assert [item.label for item in objects] == ["square"] * 6
    assert sum(item.mask.astype(int) for item in objects).max() == 1  # type: ignore[union-attr]
    for thing in things:
        assert max(overlap(item.mask, thing_mask(thing)) for item in objects) > 0.9


def test_signs_and_bare_backgrounds_contain_no_objects(detector: SegmenterDetector) -> None:
    rng = np.random.default_rng(6)
    bare = [draw(background=name, seed=seed) for name in BACKGROUNDS for seed in range(5)]
    signs = [random_sign(rng).image for _ in range(60)]
    assert [objects for objects in detector.detect(bare + signs, minimum=MINIMUM) if objects] == []


def test_the_most_confident_come_first_and_all_are_above_the_minimum(detector: SegmenterDetector) -> None:
    image = draw(*(Thing(shape, "pink", i // 3, i % 3) for i, shape in enumerate(SHAPES)))
    (objects,) = detector.detect([image], minimum=0)
    confidences = [item.confidence for item in objects]
    assert len(objects) == 6
    assert confidences == sorted(confidences, reverse=True)
    (confident,) = detector.detect([image], minimum=confidences[3])
    assert [item.label for item in confident] == [item.label for item in objects[:3]]  # strictly above


def test_detections_do_not_depend_on_the_batch(detector: SegmenterDetector) -> None:
    images = scenes(40)  # more than one batch
    together = detector.detect(images, minimum=MINIMUM)
    assert sum(map(len, together)) > 40
    same(together, [detector.detect([image], minimum=MINIMUM)[0] for image in images])
    same(together[::-1], detector.detect(images[::-1], minimum=MINIMUM))
    assert detector.detect([], minimum=MINIMUM) == []


def test_images_of_several_sizes_in_one_call(detector: SegmenterDetector) -> None:
    """An image pasted into a wider one: the star moves 32 pixels to the right."""
    small = draw(Thing("star", "yellow", 1, 1))
    wide = Image.new("RGB", (128, 64), small.getpixel((0, 0)))
    wide.paste(small, (32, 0))
    first, (star,), last = detector.detect([small, wide, small], minimum=MINIMUM)
    same([first], [last])
    assert star.label == "star"
    assert star.mask.shape == (64, 128)
    assert np.allclose(star.box, np.add(first[0].box, (32, 0, 32, 0)), atol=1)


CIRCLE: dict[str, Any] = {"tag": "single_object", "include": [{"class": "circle", "count": 1}]}


def test_an_image_whose_sides_are_not_multiples_of_8_is_missing(detector: SegmenterDetector) -> None:
    good, bad = draw(Thing("circle", "blue", 0, 0)), Image.new("RGB", (64, 60))
    with pytest.raises(ValueError, match=r"multiples of 8, not \(64, 60\)"):
        detector.detect([good, bad], minimum=MINIMUM)
    reward = GenEvalReward(detector=detector, colours=PaletteColours.read(tiny_detector_path() / "palette.json"))
    scores = reward.score([good, bad, good], [Prompt("a circle", None, CIRCLE)] * 3)
    assert [score.value for score in scores] == [1.0, None, 1.0]
    assert "multiples of 8" in str(scores[1].reason)


def test_the_version_holds_the_digests_of_the_files(tmp_path: Path) -> None:
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


def test_a_detector_is_pickled_without_its_network(detector: SegmenterDetector) -> None:
    images = scenes(3)
    detections = detector.detect(images, minimum=MINIMUM)
    pickled = pickle.dumps(detector)
    assert len(pickled) < 5_000  # the weights are 2.4 MB
    copy: SegmenterDetector = pickle.loads(pickled)
    assert copy.version == detector.version
    same(copy.detect(images, minimum=MINIMUM), detections)
