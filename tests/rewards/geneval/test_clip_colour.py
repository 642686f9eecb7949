"""The colour classifier: cut-outs by hand, and a tiny random CLIP of the real classes, sentence by sentence."""

from __future__ import annotations

import json
import pickle
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch.nn.functional import normalize

from gdro_cli.core.geneval import COLOURS
from gdro_cli.errors import PrerequisiteError, UserError
from gdro_cli.rewards.geneval.clip_colour import MODEL, ClipColours, cut_out
from gdro_cli.rewards.geneval.detection import Box, Detection, mask_box
from tests.support.tiny_clip import SIZE, tiny_clip


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_clip(tmp_path_factory.mktemp("colours") / "clip")


def thing(label: str, box: tuple[int, int, int, int], *, width: int, height: int) -> Detection:
    """A rectangle with one corner missing."""
    mask = np.zeros((height, width), dtype=np.bool_)
    mask[box[1] : box[3], box[0] : box[2]] = True
    mask[box[1], box[0]] = False
    outline = mask_box(mask)
    assert outline is not None
    return Detection(label, 0.9, outline, mask)


@pytest.fixture(scope="module")
def image() -> Image.Image:
    """Coloured noise, coarse enough to look different everywhere."""
    noise = np.random.default_rng(5).integers(0, 256, (6, 10, 3), dtype=np.uint8)
    return Image.fromarray(noise).resize((100, 60), Image.Resampling.NEAREST)


@pytest.fixture(scope="module")
def things() -> list[Detection]:
    """More than one batch, of three classes, all over the image."""
    labels = ("dog", "tv remote", "cup")
    boxes = [(x, y, x + 20 + y // 3, y + 15) for x in range(0, 70, 12) for y in range(0, 45, 14)]
    return [thing(labels[i % 3], box, width=100, height=60) for i, box in enumerate(boxes)]


def test_cut_out_by_hand() -> None:
    """A 4 x 3 image, red 10 x column, green 10 x row; one of the box's 2 x 2 pixels does not belong to the object."""
    pixels = np.zeros((3, 4, 3), dtype=np.uint8)
    pixels[..., 0], pixels[..., 1] = np.arange(4) * 10, np.arange(3)[:, None] * 10
    mask = np.zeros((3, 4), dtype=np.bool_)
    mask[1, 2] = mask[2, 1] = mask[2, 2] = True
    cut = cut_out(Image.fromarray(pixels), Detection("dog", 0.9, (1.0, 1.0, 3.0, 3.0), mask))
    assert np.asarray(cut).tolist() == [[[0x99] * 3, [20, 10, 0]], [[10, 20, 0], [20, 20, 0]]]


@pytest.mark.parametrize(
    ("box", "size"),
    [
        ((-3.0, -1.0, 9.0, 9.0), (4, 3)),  # no wider than the image
        ((0.6, 0.4, 2.6, 2.4), (2, 2)),  # columns 1 and 2, rows 0 and 1
        ((2.0, 1.0, 2.2, 1.3), (1, 1)),  # never empty
        ((4.0, 3.0, 5.0, 4.0), (1, 1)),
    ],
)
def test_box_is_whole_pixels_inside_the_image(box: Box, size: tuple[int, int]) -> None:
    item = Detection("dog", 0.9, box, np.ones((3, 4), dtype=np.bool_))
    assert cut_out(Image.new("RGB", (4, 3)), item).size == size


def test_mask_of_another_size_is_refused() -> None:
    item = Detection("dog", 0.9, (0.0, 0.0, 1.0, 1.0), np.ones((4, 3), dtype=np.bool_))
    with pytest.raises(ValueError, match=r"the mask is \(4, 3\), the image \(3, 4\)"):
        cut_out(Image.new("RGB", (4, 3)), item)


def test_classifier_is_the_mean_direction_of_the_three_sentences(folder: Path) -> None:
    """Each sentence alone, padded to 77 tokens as in the original: length 1, mean of three, length 1 again."""
    colours = ClipColours(str(folder))
    directions = colours.classifier("tv remote")
    network, _, tokenizer = colours._network._network()
    assert directions.shape == (10, 16)
    for row, colour in enumerate(COLOURS):
        mean = torch.zeros(16)
        for sentence in (
            f"a photo of a {colour} tv remote",
            f"a photo of a {colour}-colored tv remote",
            f"a photo of a {colour} object",
        ):
            tokens = tokenizer([sentence], padding="max_length", max_length=77, return_tensors="pt")
            with torch.no_grad():
                mean += normalize(network.get_text_features(tokens["input_ids"]).pooler_output[0], dim=0) / 3
        torch.testing.assert_close(directions[row], mean / mean.norm(), atol=1e-5, rtol=1e-4)
    assert not torch.allclose(directions, colours.classifier("cup"), atol=1e-3)
    assert colours.classifier("tv remote") is directions


def test_the_colour_is_that_of_the_nearest_direction(folder: Path, image: Image.Image, things: list[Detection]) -> None:
    """Each object alone through CLIP's image processor; 24 objects are two batches."""
    colours = ClipColours(str(folder))
    names = colours.classify(image, things)
    network, processor, _ = colours._network._network()
    expected = []
    for item in things:
        left, top, right, bottom = (int(edge) for edge in item.box)
        grey = np.where(item.mask[..., None], np.asarray(image), 0x99).astype(np.uint8)
        cut = Image.fromarray(grey[top:bottom, left:right])
        with torch.no_grad():
            features = network.get_image_features(processor(cut, return_tensors="pt")["pixel_values"]).pooler_output[0]
        expected.append(COLOURS[int((colours.classifier(item.label) @ (features / features.norm())).argmax())])
    assert len(things) == 24 and names == expected
    assert len(set(names)) >= 3  # the random network distinguishes some objects
    assert colours.classify(image, []) == []


def test_only_the_object_counts(folder: Path, image: Image.Image, things: list[Detection]) -> None:
    colours = ClipColours(str(folder))
    item = things[10]
    outside = np.asarray(image).copy()
    outside[~item.mask] = 255 - outside[~item.mask]
    inside = np.where(item.mask[..., None], 255 - np.asarray(image), np.asarray(image)).astype(np.uint8)
    changed = colours._network.embed_images([cut_out(Image.fromarray(pixels), item) for pixels in (outside, inside)])
    own = colours._network.embed_images([cut_out(image, item)])[0]
    assert torch.allclose(changed[0], own, atol=1e-6)
    assert not torch.allclose(changed[1], own, atol=1e-2)


def test_thin_objects_look_like_thick_ones(folder: Path) -> None:
    """Cut-outs of one colour; one 3 pixels high could be mistaken for an array with its channels first."""
    cuts = [Image.new("RGB", size, (200, 30, 90)) for size in ((SIZE, SIZE), (40, 1), (40, 3), (3, 40))]
    embedded = ClipColours(str(folder))._network.embed_images(cuts)
    torch.testing.assert_close(embedded, embedded[:1].expand(4, -1), atol=1e-5, rtol=1e-4)


def test_a_classifier_is_pickled_without_its_weights(folder: Path, image: Image.Image, things: list[Detection]) -> None:
    colours = ClipColours(str(folder))
    unloaded = pickle.dumps(colours)
    names = colours.classify(image, things)
    assert abs(len(pickle.dumps(colours)) - len(unloaded)) < 100
    assert pickle.loads(unloaded).classify(image, things) == names


def test_version_is_that_of_the_files(folder: Path, tmp_path: Path) -> None:
    version = ClipColours(str(folder)).version
    moved = shutil.copytree(folder, tmp_path / "moved")
    assert ClipColours(str(moved)).version == version
    assert json.loads(json.dumps(version)) == version
    weights = load_file(moved / "model.safetensors")
    weights["logit_scale"] += 1.0
    save_file(weights, moved / "model.safetensors", metadata={"format": "pt"})
    changed = ClipColours(str(moved)).version
    assert changed != version
    settings = json.loads((moved / "preprocessor_config.json").read_text()) | {"resample": 0}
    (moved / "preprocessor_config.json").write_text(json.dumps(settings))
    assert ClipColours(str(moved)).version != changed


def test_missing_parts_are_named(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants

    copy = shutil.copytree(folder, tmp_path / "copy")
    (copy / "tokenizer.json").unlink()
    with pytest.raises(PrerequisiteError, match=r"copy has no tokenizer\.json or vocab\.json: fetch the whole folder"):
        ClipColours(str(copy))
    (copy / "config.json").write_text('{"model_type": "mask2former"}')
    (copy / "vocab.json").write_text("{}")
    with pytest.raises(UserError, match=r"`reward\.geneval\.colour_model` names .*of the type mask2former; it must be"):
        ClipColours(str(copy))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(PrerequisiteError) as caught:
        ClipColours()
    assert f"run `hf download {MODEL}`" in str(caught.value)
    assert "set reward.geneval.colour_model=FOLDER" in str(caught.value)


def test_published_size_can_be_built() -> None:
    """ViT-L/14 at 224 pixels with its text encoder, from the published numbers: 428 M parameters."""
    from transformers import CLIPConfig, CLIPModel

    text = {"hidden_size": 768, "intermediate_size": 3072, "num_attention_heads": 12, "num_hidden_layers": 12}
    vision = {"hidden_size": 1024, "intermediate_size": 4096, "num_attention_heads": 16, "num_hidden_layers": 24}
    config = CLIPConfig(
        text_config={**text, "vocab_size": 49408, "max_position_embeddings": 77},
        vision_config={**vision, "image_size": 224, "patch_size": 14},
        projection_dim=768,
    )
    with torch.device("meta"):
        model = CLIPModel(config)
    assert 427e6 < sum(parameter.numel() for parameter in model.parameters()) < 429e6
