"""The detector: its processing by hand-made numbers, and a tiny random Mask2Former of the real class."""

from __future__ import annotations

import json
import math
import pickle
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor

from gdro_cli.core.geneval import COCO_CLASSES, RENAMED, parse_task
from gdro_cli.errors import PrerequisiteError, UserError
from gdro_cli.rewards.geneval.detection import Detection, mask_box
from gdro_cli.rewards.geneval.mask2former import MODEL, Frame, Mask2FormerDetector, class_names, instances

SIDES = (64, 96)
ORIGINAL = {new: old for old, new in RENAMED.items()}
COCO_NAMES = {number: ORIGINAL.get(name, name) for number, name in enumerate(COCO_CLASSES)}


def save_tiny(folder: Path, names: dict[int, str]) -> None:
    """A Mask2Former with 118 thousand random weights, its class scores spread out so that some are confident."""
    from transformers import Mask2FormerConfig, Mask2FormerForUniversalSegmentation, SwinConfig
    from transformers.models.mask2former.image_processing_pil_mask2former import Mask2FormerImageProcessorPil

    stages = ["stage1", "stage2", "stage3", "stage4"]
    backbone = SwinConfig(embed_dim=8, depths=[1] * 4, num_heads=[1, 1, 2, 2], window_size=4, out_features=stages)
    config = Mask2FormerConfig(
        backbone_config=backbone,
        feature_size=32,
        mask_feature_size=32,
        hidden_dim=32,
        encoder_feedforward_dim=32,
        dim_feedforward=32,
        encoder_layers=1,
        decoder_layers=2,
        num_attention_heads=2,
        num_queries=6,
        id2label=names,
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = Mask2FormerForUniversalSegmentation(config)
    model.class_predictor.weight.data *= 40.0
    model.save_pretrained(folder)
    Mask2FormerImageProcessorPil().save_pretrained(folder)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("detector") / "coco"
    save_tiny(path, COCO_NAMES)
    return path


@pytest.fixture(scope="module")
def images() -> list[Image.Image]:
    """Images of three sizes, one of them twice, full of rectangles."""
    generator = np.random.default_rng(0)
    drawn = []
    for width, height in ((60, 60), (90, 60), (60, 60), (40, 70)):
        pixels = np.full((height, width, 3), 128, dtype=np.uint8)
        for _ in range(6):
            x, y = generator.integers(0, width - 10), generator.integers(0, height - 10)
            pixels[y : y + 20, x : x + 20] = generator.integers(0, 256, 3)
        drawn.append(Image.fromarray(pixels))
    return drawn


def logit(probability: float) -> float:
    return math.log(probability / (1 - probability))


def same(one: Detection, other: Detection) -> bool:
    return (
        one.label == other.label
        and one.box == other.box
        and one.confidence == pytest.approx(other.confidence, abs=1e-4)
        and bool((one.mask == other.mask).all())
    )


def test_classes_are_in_genevals_spelling(folder: Path) -> None:
    assert Mask2FormerDetector(str(folder)).classes == COCO_CLASSES


def test_score_mask_and_box_by_hand() -> None:
    """Input and image of 8 x 8 pixels, so no mask is resized.

    Query 0: class probabilities 0.6, 0.3, 0.04 (0.06 for nothing); 2 rows of 3 pixels with 0.8, 2 more with 0.5
    exactly (logit 0, not above 0): confidences 0.6 * 0.8 = 0.48 and 0.3 * 0.8 = 0.24 with the same mask.
    Query 1: 0.9 for class 2; pixels of 0.6 and 0.9, mean 0.75: confidence 0.675. Query 2: 0.97, but an empty mask.
    """
    probabilities = torch.tensor([[0.6, 0.3, 0.04, 0.06], [0.02, 0.03, 0.9, 0.05], [0.97, 0.01, 0.01, 0.01]])
    masks = torch.full((3, 8, 8), -4.0)
    masks[0, 1:3, 2:5] = logit(0.8)
    masks[0, 1:3, 5] = 0.0
    masks[1, 7, 0], masks[1, 6, 1] = logit(0.6), logit(0.9)
    frame = Frame((8, 8), (8, 8), (8, 8))
    found = instances(probabilities.log(), masks, frame=frame, labels=("cat", "dog", "tv remote"), minimum=0.2)
    assert [item.label for item in found] == ["tv remote", "cat", "dog"]
    assert [item.confidence for item in found] == pytest.approx([0.675, 0.48, 0.24], abs=1e-5)
    assert [item.box for item in found] == [(0.0, 6.0, 2.0, 8.0), (2.0, 1.0, 5.0, 3.0), (2.0, 1.0, 5.0, 3.0)]
    assert [int(item.mask.sum()) for item in found] == [2, 6, 6]
    assert found[0].mask.dtype == np.bool_
    above = instances(probabilities.log(), masks, frame=frame, labels=("cat", "dog", "tv remote"), minimum=0.3)
    assert [item.label for item in above] == ["tv remote", "cat"]  # 0.3 * 0.8 is not above 0.3


def test_padding_is_cut_off_and_masks_are_computed_at_the_size_of_the_image() -> None:
    """Input 2 x 4, whose right half is padding; image 2 x 4.

    Without the padding the logits are -1 and 1; enlarged to 4 columns they are -1, -0.5, 0.5, 1. So the mask is the
    right half with probabilities 0.6225 and 0.7311, mean 0.6768. With the padding (logits 9) the box would differ. If
    the mask were computed first and then enlarged, the mean would be 0.7311.
    """
    masks = torch.tensor([[[-1.0, 1.0, 9.0, 9.0], [-1.0, 1.0, 9.0, 9.0]]])
    frame = Frame(image=(2, 4), scaled=(2, 2), padded=(2, 4))
    (item,) = instances(torch.tensor([[9.0, -9.0]]), masks, frame=frame, labels=("cat",), minimum=0.3)
    assert item.mask.tolist() == [[False, False, True, True]] * 2
    assert item.confidence == pytest.approx((0.62246 + 0.73106) / 2, abs=1e-4)
    assert item.box == (2.0, 0.0, 4.0, 2.0)


def test_equals_the_library_if_no_resizing_is_needed() -> None:
    """Unpadded input, image of 384 x 384: the library's objects are ours, scores and masks."""
    from transformers.models.mask2former.image_processing_pil_mask2former import Mask2FormerImageProcessorPil
    from transformers.models.mask2former.modeling_mask2former import Mask2FormerForUniversalSegmentationOutput

    generator = torch.Generator().manual_seed(3)
    classes = torch.randn(1, 30, 3, generator=generator) * 2
    masks = torch.randn(1, 30, 24, 24, generator=generator) * 3
    output = Mask2FormerForUniversalSegmentationOutput(class_queries_logits=classes, masks_queries_logits=masks)
    (theirs,) = Mask2FormerImageProcessorPil().post_process_instance_segmentation(
        output, threshold=0.4, target_sizes=[(384, 384)], return_binary_maps=True
    )
    size = (384, 384)
    ours = instances(classes[0], masks[0], frame=Frame(size, size, size), labels=("cat", "dog"), minimum=0.4)
    order = sorted(range(len(theirs["segments_info"])), key=lambda i: -theirs["segments_info"][i]["score"])
    assert len(ours) == len(order) > 10
    for item, index in zip(ours, order, strict=True):
        info = theirs["segments_info"][index]
        assert item.label == ("cat", "dog")[info["label_id"]]
        assert item.confidence == pytest.approx(info["score"], abs=2e-6)
        assert torch.equal(torch.from_numpy(item.mask), theirs["segmentation"][index].bool())


def test_at_most_a_hundred_pairs_are_objects() -> None:
    """2 queries of 80 equally likely classes are 160 pairs."""
    frame = Frame((4, 4), (4, 4), (4, 4))
    labels = COCO_CLASSES
    found = instances(torch.zeros(2, 81), torch.ones(2, 4, 4), frame=frame, labels=labels, minimum=0.0)
    assert len(found) == 100
    assert found[0].confidence == pytest.approx(0.7310586 / 81, abs=1e-6)
    assert instances(torch.zeros(2, 81), torch.ones(2, 4, 4), frame=frame, labels=labels, minimum=0.1) == []


@pytest.mark.parametrize(
    ("width", "height", "scaled", "padded"),
    [
        (512, 512, (800, 800), (800, 800)),
        (640, 480, (800, 1067), (800, 1088)),  # 640 * 800/480 = 1066.7
        (250, 1000, (1333, 333), (1344, 352)),  # the longer side is the limit: 250 * 1.333 = 333.25
        (1600, 1600, (800, 800), (800, 800)),
    ],
)
def test_sizes_of_the_input(width: int, height: int, scaled: tuple[int, int], padded: tuple[int, int]) -> None:
    frame = Frame.of(Image.new("RGB", (width, height)))
    assert frame == Frame((height, width), scaled, padded)


def test_input_is_rgb_normalised_then_padded_with_zeros(folder: Path) -> None:
    """Red, (1 - 0.485) / 0.229 = 2.2489, and no green, -0.456 / 0.224 = -2.0357; 80 x 64 is padded to 96 x 64."""
    detector = Mask2FormerDetector(str(folder), device="cpu", sides=SIDES)
    detector.load()
    seen: list[Tensor] = []
    network = detector._network()[0]
    network.register_forward_pre_hook(
        lambda _module, _args, given: seen.append(given["pixel_values"]), with_kwargs=True
    )
    detector.detect([Image.new("RGB", (50, 40), (255, 0, 0))], minimum=0.3)
    (pixels,) = seen
    assert pixels.shape == (1, 3, 64, 96)
    assert pixels[0, :, 10, 10].tolist() == pytest.approx([2.2489, -2.0357, (0 - 0.406) / 0.225], abs=1e-4)
    assert pixels[..., :80].abs().min() > 1.0
    assert not pixels[..., 80:].any()


def test_a_real_network_finds_the_same_objects_in_any_batch(folder: Path, images: list[Image.Image]) -> None:
    detector = Mask2FormerDetector(str(folder), device="cpu", sides=SIDES)
    together = detector.detect(images, minimum=0.02)
    alone = [detector.detect([image], minimum=0.02)[0] for image in images]
    assert [len(objects) for objects in alone] == [len(objects) for objects in together]
    assert min(len(objects) for objects in alone) >= 2
    for image, objects, others in zip(images, alone, together, strict=True):
        assert all(same(item, other) for item, other in zip(objects, others, strict=True))
        assert [item.confidence for item in objects] == sorted((item.confidence for item in objects), reverse=True)
        for item in objects:
            assert item.mask.shape == (image.height, image.width)
            assert item.box == mask_box(item.mask)
            assert 0.02 < item.confidence <= 1.0 and item.label in COCO_CLASSES
    assert not same(alone[0][0], alone[2][0])  # the network looks at the image
    assert detector.detect([], minimum=0.3) == []


def test_a_detector_is_pickled_without_its_weights(folder: Path, images: list[Image.Image]) -> None:
    detector = Mask2FormerDetector(str(folder), device="cpu", sides=SIDES)
    unloaded = pickle.dumps(detector)
    (objects,) = detector.detect(images[:1], minimum=0.02)
    assert abs(len(pickle.dumps(detector)) - len(unloaded)) < 100
    (others,) = pickle.loads(unloaded).detect(images[:1], minimum=0.02)
    assert objects and all(same(item, other) for item, other in zip(objects, others, strict=True))


def test_version_is_that_of_the_files_and_sizes(folder: Path, tmp_path: Path) -> None:
    version = Mask2FormerDetector(str(folder)).version
    moved = shutil.copytree(folder, tmp_path / "moved")
    assert Mask2FormerDetector(str(moved), device="cpu").version == version
    assert json.loads(json.dumps(version)) == version
    others = [Mask2FormerDetector(str(folder), sides=sides).version for sides in ((800, 1000), (600, 1333))]
    assert version not in others and others[0] != others[1]
    weights = load_file(moved / "model.safetensors")
    weights["class_predictor.bias"][0] += 1e-3
    save_file(weights, moved / "model.safetensors", metadata={"format": "pt"})
    assert Mask2FormerDetector(str(moved)).version != version


def test_incomplete_and_damaged_weights_are_refused(folder: Path, tmp_path: Path) -> None:
    broken = shutil.copytree(folder, tmp_path / "broken")
    weights = load_file(broken / "model.safetensors")
    del weights["class_predictor.weight"]
    save_file(weights, broken / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(PrerequisiteError, match=r"broken lacks the weight class_predictor\.weight: fetch the whole"):
        Mask2FormerDetector(str(broken)).load()
    (broken / "model.safetensors").write_bytes(b"not weights")
    with pytest.raises(PrerequisiteError, match=r"broken cannot be loaded \(Error while deserializing header"):
        Mask2FormerDetector(str(broken)).load()
    (broken / "model.safetensors").unlink()
    with pytest.raises(PrerequisiteError, match=r"broken has no \*\.safetensors"):
        Mask2FormerDetector(str(broken))


def test_weights_of_a_larger_model_than_the_configuration_says_are_refused(folder: Path, tmp_path: Path) -> None:
    """A part of the blocks would load, and find hardly anything."""
    larger = shutil.copytree(folder, tmp_path / "larger")
    weights = load_file(larger / "model.safetensors")
    more = {name.replace("decoder.layers.0.", "decoder.layers.1."): weight.clone() for name, weight in weights.items()}
    assert len(weights) < len(weights | more)
    save_file(weights | more, larger / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(PrerequisiteError, match=r"larger holds the weight .*\.layers\.1\..*, which its class does not"):
        Mask2FormerDetector(str(larger)).load()


def test_other_vocabulary() -> None:
    """A model with other classes than COCO's keeps its names, and a prompt with another class is refused."""
    names = class_names({"id2label": {"2": "gizmo", "0": "cat", "1": "mouse"}}, model="mine")
    assert names == ("cat", "computer mouse", "gizmo")
    metadata = {"tag": "single_object", "include": [{"class": "dog", "count": 1}]}
    with pytest.raises(ValueError, match="the class 'dog', which the detector does not know"):
        parse_task(metadata, classes=names)
    for config in ({}, {"id2label": {}}, {"id2label": {"1": "cat", "2": "dog"}}, {"id2label": ["cat"]}):
        with pytest.raises(
            UserError, match=r"`reward\.geneval\.detector_model` names mine, whose config\.json does not"
        ):
            class_names(config, model="mine")


def test_the_error_for_a_missing_model_names_the_remedy(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(PrerequisiteError) as caught:
        Mask2FormerDetector()
    assert f"run `hf download {MODEL}`" in str(caught.value)
    assert "set reward.geneval.detector_model=FOLDER" in str(caught.value)


def test_published_size_can_be_built() -> None:
    """Swin-S, 100 queries, 80 classes, from the published numbers: 69 M parameters (arXiv 2112.01527, table 1)."""
    from transformers import Mask2FormerConfig, Mask2FormerForUniversalSegmentation, SwinConfig

    backbone = SwinConfig(
        embed_dim=96,
        depths=[2, 2, 18, 2],
        num_heads=[3, 6, 12, 24],
        window_size=7,
        out_features=["stage1", "stage2", "stage3", "stage4"],
    )
    config = Mask2FormerConfig(
        backbone_config=backbone,
        hidden_dim=256,
        feature_size=256,
        mask_feature_size=256,
        encoder_feedforward_dim=1024,
        dim_feedforward=2048,
        encoder_layers=6,
        decoder_layers=10,
        num_attention_heads=8,
        num_queries=100,
        id2label=COCO_NAMES,
    )
    with torch.device("meta"):
        model = Mask2FormerForUniversalSegmentation(config)
    assert 68e6 < sum(parameter.numel() for parameter in model.parameters()) < 70e6
