"""CLIP, PickScore, HPSv2 and the aesthetic reward: tiny random networks of the real classes, by the published rules."""

from __future__ import annotations

import json
import pickle
import shutil
from collections import OrderedDict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from gdro_cli.data.records import PromptRecord
from gdro_cli.errors import PrerequisiteError, UserError
from gdro_cli.rewards.base import UNIT, Reward
from gdro_cli.rewards.clip.rewards import AestheticReward, ClipReward, HpsReward, PickScoreReward
from gdro_cli.rewards.pool import ScoringPool
from gdro_cli.rewards.registry import provenance, reward_class
from tests.support.tiny_clip import SIZE, tiny_clip

MEAN = torch.tensor([0.48145466, 0.4578275, 0.40821073])
STD = torch.tensor([0.26862954, 0.26130258, 0.27577711])
TEXTS = ["a red star", "two blue signs on a wall", "z"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_clip(tmp_path_factory.mktemp("clip") / "model")


@pytest.fixture(scope="module")
def images() -> list[Image.Image]:
    """Coloured noise of three shapes."""
    random = np.random.default_rng(5)
    sizes = [(64, 64), (48, 80), (100, 60)]
    return [
        Image.fromarray(random.integers(0, 256, (6, 6, 3), dtype=np.uint8)).resize(size, Image.Resampling.NEAREST)
        for size in sizes
    ]


@pytest.fixture(scope="module")
def prompts() -> list[PromptRecord]:
    return [PromptRecord(id=str(i), prompt=text) for i, text in enumerate(TEXTS)]


def logits(folder: Path, images: list[Image.Image]) -> tuple[Tensor, float]:
    """What the class's own forward pass gives for each pair, as its processor prepares it, and its temperature."""
    from transformers import CLIPModel, CLIPTokenizer
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    model = CLIPModel.from_pretrained(folder).eval()
    tokens = CLIPTokenizer.from_pretrained(folder)(TEXTS, padding=True, return_tensors="pt")
    processor: Any = CLIPImageProcessorPil.from_pretrained(folder)
    pixels = torch.cat([processor(images=image, return_tensors="pt")["pixel_values"] for image in images])
    with torch.no_grad():
        output = model(pixel_values=pixels, **tokens)
    return output.logits_per_image.diagonal(), float(model.logit_scale.detach().exp())


def values(reward: Reward, images: list[Image.Image], prompts: list[PromptRecord]) -> list[float]:
    return [score.value for score in reward.score(images, prompts) if score.value is not None]


def test_clip_is_a_hundred_times_the_cosine(
    folder: Path, images: list[Image.Image], prompts: list[PromptRecord]
) -> None:
    expected, temperature = logits(folder, images)
    found = values(ClipReward(ClipReward.Settings(model=str(folder))), images, prompts)
    assert found == pytest.approx((100 * expected / temperature).tolist(), rel=1e-4)
    assert np.ptp(found) > 1


def test_pickscore_is_the_networks_logit(
    folder: Path, tmp_path: Path, images: list[Image.Image], prompts: list[PromptRecord]
) -> None:
    """Its own repository has no processor; that of the CLIP it was made from is used."""
    own = tmp_path / "pickscore"
    own.mkdir()
    weights = load_file(folder / "model.safetensors")
    weights["logit_scale"] = torch.tensor(4.5)
    save_file(weights, own / "model.safetensors", {"format": "pt"})
    shutil.copy(folder / "config.json", own)
    base, temperature = logits(folder, images)
    settings = PickScoreReward.Settings(model=str(own), processor=str(folder))
    found = values(PickScoreReward(settings), images, prompts)
    assert found == pytest.approx((np.exp(4.5) * base / temperature).tolist(), rel=1e-4)


class Block(nn.Module):
    """A residual block as OpenCLIP builds it, of torch's own attention."""

    def __init__(self, width: int, heads: int, inner: int) -> None:
        super().__init__()
        self.ln_1, self.attn, self.ln_2 = nn.LayerNorm(width), nn.MultiheadAttention(width, heads), nn.LayerNorm(width)
        layers = {"c_fc": nn.Linear(width, inner), "gelu": nn.GELU(), "c_proj": nn.Linear(inner, width)}
        self.mlp = nn.Sequential(OrderedDict(layers))

    def forward(self, x: Tensor, mask: Tensor | None) -> Tensor:
        """[L, N, D]."""
        normed = self.ln_1(x)
        x = x + self.attn(normed, normed, normed, need_weights=False, attn_mask=mask)[0]
        return x + self.mlp(self.ln_2(x))


class Tower(nn.Module):
    def __init__(self, width: int, heads: int, inner: int, depth: int) -> None:
        super().__init__()
        self.resblocks = nn.ModuleList(Block(width, heads, inner) for _ in range(depth))

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """[N, L, D]."""
        x = x.transpose(0, 1)
        for block in self.resblocks:
            x = block(x, mask)
        return x.transpose(0, 1)


class Vision(nn.Module):
    def __init__(self, width: int, heads: int, inner: int, depth: int, out: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, width, 8, stride=8, bias=False)
        self.class_embedding = nn.Parameter(torch.randn(width))
        self.positional_embedding = nn.Parameter(torch.randn((SIZE // 8) ** 2 + 1, width))
        self.ln_pre, self.ln_post = nn.LayerNorm(width), nn.LayerNorm(width)
        self.transformer = Tower(width, heads, inner, depth)
        self.proj = nn.Parameter(torch.randn(width, out))

    def forward(self, pixels: Tensor) -> Tensor:
        patches = self.conv1(pixels).flatten(2).transpose(1, 2)
        tokens = torch.cat([self.class_embedding.expand(len(pixels), 1, -1), patches], dim=1)
        hidden = self.transformer(self.ln_pre(tokens + self.positional_embedding))
        return self.ln_post(hidden[:, 0]) @ self.proj


class OpenClip(nn.Module):
    """CLIP in OpenCLIP's layout and with its names of weights."""

    def __init__(self, config: dict[str, Any]) -> None:
        super().__init__()
        text, out = config["text_config"], config["projection_dim"]
        width, heads, inner, depth = (
            text[key] for key in ("hidden_size", "num_attention_heads", "intermediate_size", "num_hidden_layers")
        )
        self.visual = Vision(width, heads, inner, depth, out)
        self.transformer = Tower(width, heads, inner, depth)
        self.token_embedding = nn.Embedding(text["vocab_size"], width)
        self.positional_embedding = nn.Parameter(torch.randn(text["max_position_embeddings"], width))
        self.ln_final = nn.LayerNorm(width)
        self.text_projection = nn.Parameter(torch.randn(width, out))
        self.logit_scale = nn.Parameter(torch.tensor(2.0))

    def encode_text(self, ids: Tensor) -> Tensor:
        """Pooled at the end token, which has the highest number."""
        length = ids.shape[1]
        mask = torch.full((length, length), -torch.inf).triu(1)
        hidden = self.transformer(self.token_embedding(ids) + self.positional_embedding[:length], mask)
        return self.ln_final(hidden)[torch.arange(len(ids)), ids.argmax(dim=-1)] @ self.text_projection


@pytest.fixture(scope="module")
def open_clip(folder: Path) -> OpenClip:
    config = json.loads((folder / "config.json").read_text())
    with torch.random.fork_rng():
        torch.manual_seed(3)
        return OpenClip(config).eval()


@pytest.fixture(scope="module")
def base(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The CLIP that HPSv2 was made from: no weights are needed. ViT-H has the exact GELU, as OpenCLIP."""
    path = tmp_path_factory.mktemp("hps") / "base"
    shutil.copytree(folder, path, ignore=shutil.ignore_patterns("*.safetensors"))
    config = json.loads((path / "config.json").read_text())
    config["text_config"]["hidden_act"] = config["vision_config"]["hidden_act"] = "gelu"
    (path / "config.json").write_text(json.dumps(config))
    return path


@pytest.mark.parametrize("prefix", ["", "model."])
def test_hpsv2_is_the_cosine_of_open_clips_network(
    base: Path,
    tmp_path: Path,
    open_clip: OpenClip,
    images: list[Image.Image],
    prompts: list[PromptRecord],
    prefix: str,
) -> None:
    """With the longer side resized and black bars, as HPSv2's code prepares images."""
    from transformers import CLIPTokenizer

    save_file(
        {prefix + name: each.clone() for name, each in open_clip.state_dict().items()}, tmp_path / "hps.safetensors"
    )
    found = values(HpsReward(HpsReward.Settings(model=str(tmp_path), base=str(base))), images, prompts)
    ids = CLIPTokenizer.from_pretrained(base)(TEXTS, padding=True, return_tensors="pt").input_ids
    with torch.no_grad():
        pictures = open_clip.visual(torch.stack([by_hand(image) for image in images]))
        texts = open_clip.encode_text(ids)
    assert found == pytest.approx(torch.cosine_similarity(pictures, texts).tolist(), abs=1e-5)
    assert np.ptp(found) > 0.05


def by_hand(image: Image.Image) -> Tensor:
    """The image fitted into a black square, normalised."""
    scale = SIZE / max(image.size)
    width, height = round(image.width * scale), round(image.height * scale)
    small = np.asarray(image.resize((width, height), Image.Resampling.BICUBIC), dtype=np.float32) / 255
    square = np.zeros((SIZE, SIZE, 3), dtype=np.float32)
    top, left = (SIZE - height) // 2, (SIZE - width) // 2
    square[top : top + height, left : left + width] = small
    return ((torch.from_numpy(square) - MEAN) / STD).permute(2, 0, 1)


def head(directions: int) -> nn.Sequential:
    """The layers of improved-aesthetic-predictor."""
    with torch.random.fork_rng():
        torch.manual_seed(4)
        return nn.Sequential(
            nn.Linear(directions, 32), nn.Dropout(0.2), nn.Linear(32, 16), nn.Dropout(0.2),
            nn.Linear(16, 8), nn.Dropout(0.1), nn.Linear(8, 4), nn.Linear(4, 1),
        ).eval()  # fmt: skip


@pytest.mark.parametrize("prefix", ["", "mlp."])
def test_aesthetic_score_is_the_head_on_the_images_direction(
    folder: Path, tmp_path: Path, images: list[Image.Image], prompts: list[PromptRecord], prefix: str
) -> None:
    layers = head(16)
    weights = {f"{prefix}layers.{name}": tensor.clone() for name, tensor in layers.state_dict().items()}
    save_file({**weights, "clip.other": torch.zeros(2)}, tmp_path / "model.safetensors")
    reward = AestheticReward(AestheticReward.Settings(model=str(folder), head=str(tmp_path)))
    found = values(reward, images, prompts)
    with torch.no_grad():
        expected = layers(reward.network.embed_images(images)).squeeze(1)
    assert found == pytest.approx(expected.tolist(), abs=1e-5)
    assert values(reward, images, prompts[::-1]) == found  # whatever the prompts


@pytest.mark.slow
def test_scoring_processes_give_the_same_scores(
    folder: Path, images: list[Image.Image], prompts: list[PromptRecord]
) -> None:
    """Also from a reward that has been loaded."""
    reward = ClipReward(ClipReward.Settings(model=str(folder)))
    alone = reward.score(images, prompts)
    assert len(pickle.dumps(reward)) < 10_000
    with ScoringPool(reward, workers=1) as pool:
        assert [score.value for score in pool.score(images, prompts)] == pytest.approx(
            [score.value for score in alone], rel=1e-5
        )


def test_one_bad_image_is_one_missing_score(
    folder: Path, images: list[Image.Image], prompts: list[PromptRecord], monkeypatch: pytest.MonkeyPatch
) -> None:
    reward = ClipReward(ClipReward.Settings(model=str(folder)))
    embed = type(reward.network).embed_images

    def fails(network: Any, some: list[Image.Image]) -> Tensor:
        if any(image.size == images[1].size for image in some):
            raise RuntimeError("out of luck")
        return embed(network, some)

    monkeypatch.setattr(type(reward.network), "embed_images", fails)
    scores = reward.score([*images, Path("missing.png")], [*prompts, prompts[0]])
    assert [score.value is None for score in scores] == [False, True, False, True]
    assert scores[1].reason == "the reward clip failed on this image: RuntimeError: out of luck"
    assert scores[3].reason is not None and "cannot be decoded" in scores[3].reason


def test_versions_name_every_file_and_rule(folder: Path, base: Path, tmp_path: Path, open_clip: OpenClip) -> None:
    save_file({name: each.clone() for name, each in open_clip.state_dict().items()}, tmp_path / "hps.safetensors")
    version = HpsReward(HpsReward.Settings(model=str(tmp_path), base=str(base))).version
    assert version["reward"] == "hpsv2" and version["rule"] == "hpsv2-1"
    assert len(version["sha256"]) == len(version["base"]["sha256"]) == 64
    save_file({name: each + 1 for name, each in open_clip.state_dict().items()}, tmp_path / "hps.safetensors")
    changed = HpsReward(HpsReward.Settings(model=str(tmp_path), base=str(base))).version
    assert changed["sha256"] != version["sha256"] and changed["base"] == version["base"]


@pytest.mark.parametrize(
    ("name", "settings", "sentence"),
    [
        ("clip", {"model": "nowhere"}, r"the model folder nowhere does not exist: set reward\.clip\.model to a folder"),
        (
            "pickscore",
            {},
            r"model yuvalkirstain/PickScore_v1 is neither .*hf download yuvalkirstain/Pick",
        ),
        ("hpsv2", {"base": "FOLDER"}, r"model RE-N-Y/hpsv21 is neither .*reward\.hpsv2\.model=FOLDER"),
        ("aesthetic", {"model": "FOLDER"}, r"model RE-N-Y/laion-aesthetic is neither .*reward\.aesthetic\.head=FOLDER"),
        ("aesthetic", {"model": "FOLDER", "head": "FOLDER"}, r"model .* is not LAION's aesthetic head: fetch"),
        ("hpsv2", {"model": "FOLDER", "base": "EMPTY"}, r"model .* has no config\.json"),
    ],
)
def test_what_is_missing_is_named(
    folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    name: str,
    settings: dict[str, str],
    sentence: str,
) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    paths = {"FOLDER": str(folder), "EMPTY": str(tmp_path)}
    cls = reward_class(name)
    reward = cls(cls.Settings(**{key: paths.get(value, value) for key, value in settings.items()}))
    with pytest.raises(PrerequisiteError, match=sentence):
        reward.version, reward.load()


def test_weights_of_another_size_are_refused(folder: Path, tmp_path: Path, base: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    del weights["visual_projection.weight"]
    save_file(weights, tmp_path / "model.safetensors")
    reward = HpsReward(HpsReward.Settings(model=str(tmp_path), base=str(base)))
    with pytest.raises(PrerequisiteError, match=r"lacks the weight visual_projection\.weight"):
        reward.load()


def test_a_head_for_other_directions_is_refused(folder: Path, tmp_path: Path) -> None:
    """Once, and not as a missing score for every image."""
    weights = {f"layers.{name}": tensor.clone() for name, tensor in head(24).state_dict().items()}
    save_file(weights, tmp_path / "model.safetensors")
    reward = AestheticReward(AestheticReward.Settings(model=str(folder), head=str(tmp_path)))
    with pytest.raises(PrerequisiteError, match=r"for directions of 24 numbers, and those of .* have 16: set it to"):
        reward.load()


def test_the_same_files_elsewhere_have_the_same_provenance(folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder, tmp_path / "moved")
    here, there = (ClipReward(ClipReward.Settings(model=str(each))) for each in (folder, tmp_path / "moved"))
    assert provenance(here) == provenance(there)


def test_another_kind_of_model_is_refused(folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder, tmp_path / "other")
    (tmp_path / "other" / "config.json").write_text('{"model_type": "bert"}')
    reward = ClipReward(ClipReward.Settings(model=str(tmp_path / "other")))
    with pytest.raises(UserError, match=r"`reward\.clip\.model` names .* a model of the type bert"):
        reward.load()


def test_only_rewards_from_0_to_1_have_a_corrected_score() -> None:
    """None of these has."""
    assert UNIT not in [reward_class(name).scale for name in ("clip", "pickscore", "hpsv2", "aesthetic")]
