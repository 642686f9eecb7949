"""The embedded world's judge: a small network that sees only an image and its prompt.

Coherence (is it drawn well?) and style (does it have background detail and colour?) depend on the image alone;
alignment (does it fit its prompt?) on image and prompt. A judge is a folder with ``config.json`` and
``model.safetensors``; ``python -m gdro_cli.tiny.train_judge`` makes one.
"""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional

from gdro_cli.files import sha256_file
from gdro_cli.rewards.base import ImageSource, Resources, read_all
from gdro_cli.rewards.judge.base import AXES, HIGHEST, LOWEST, Judgement
from gdro_cli.rewards.layers import ResidualBlock, to_pixels

SIZE = 64  # pixels per side that the judge was trained on
CELLS = 8  # image tokens per side, of 8 pixels each: one letter of the world's signs
TEXT_LENGTH = 28
ANCHOR = 3.4
"""The mean score of the base model's own images on each axis, the same as FLUX.1's in the paper."""
_WORD = re.compile(r'"[^"]*"?|[A-Za-z]+')
_QUOTES = dict.fromkeys(map(ord, "\u201c\u201d\u201e\u201f"), '"')
PADDING, UNKNOWN, SPACE = 0, 1, 2


class JudgeNetwork(nn.Module):
    """Pixels [N, 3, 64, 64] in [-1, 1] and word numbers [N, 28] -> logits [N, 3] of the qualities, ordered as AXES.

    A convolutional encoder turns the image into 64 tokens; a transformer reads them together with the prompt's words.
    """

    def __init__(self, words: int, *, width: int = 128, layers: int = 3) -> None:
        super().__init__()
        half = width // 2
        self.stem = nn.Conv2d(3 * 16, half, 3, padding=1)
        self.fine = nn.Sequential(ResidualBlock(half), ResidualBlock(half))
        self.merge = nn.Conv2d(half * 4, width, 1)
        self.coarse = nn.Sequential(ResidualBlock(width), ResidualBlock(width))
        self.looks = nn.Sequential(nn.LayerNorm(2 * width), nn.Linear(2 * width, width), nn.SiLU(), nn.Linear(width, 2))
        self.words = nn.Embedding(words, width)
        self.places = nn.Parameter(torch.randn(1 + TEXT_LENGTH + CELLS * CELLS, width) * 0.02)
        self.summary = nn.Parameter(torch.zeros(width))
        layer = nn.TransformerEncoderLayer(
            width, 4, 4 * width, dropout=0.0, activation="gelu", batch_first=True, norm_first=True
        )
        self.reader = nn.TransformerEncoder(layer, layers, enable_nested_tensor=False)
        self.fit = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, 1))

    def image_tokens(self, pixels: Tensor) -> Tensor:
        """[N, 3, 64, 64] -> [N, 64, width], row by row."""
        fine = self.fine(self.stem(functional.pixel_unshuffle(pixels, 4)))
        coarse: Tensor = self.coarse(self.merge(functional.pixel_unshuffle(fine, 2)))
        return coarse.flatten(2).transpose(1, 2)

    def read(self, tokens: Tensor, words: Tensor) -> Tensor:
        """Image tokens [N, 64, width] and words [N, 28] -> [N, 1 + 28 + 64, width]."""
        head = self.summary.expand(len(words), 1, -1)
        sequence = torch.cat([head, self.words(words), tokens], dim=1) + self.places
        ignored = torch.zeros(sequence.shape[:2], dtype=torch.bool, device=words.device)
        ignored[:, 1 : 1 + TEXT_LENGTH] = words == PADDING
        result: Tensor = self.reader(sequence, src_key_padding_mask=ignored)
        return result

    def logits(self, tokens: Tensor, words: Tensor) -> Tensor:
        """Image tokens [N, 64, width] and words [N, 28] -> logits [N, 3]; a quality is the sigmoid of its logit."""
        looks = self.looks(torch.cat([tokens.mean(dim=1), tokens.amax(dim=1)], dim=1))
        fit = self.fit(self.read(tokens, words)[:, 0])
        return torch.cat([fit, looks], dim=1)

    def forward(self, pixels: Tensor, words: Tensor) -> Tensor:
        """The logits [N, 3] of images and prompts."""
        return self.logits(self.image_tokens(pixels), words)


def word_numbers(prompt: str, vocabulary: Mapping[str, int]) -> list[int]:
    """The prompt as ``TEXT_LENGTH`` numbers: one for each word, and inside double quotes one for each letter."""
    numbers: list[int] = []
    for piece in _WORD.findall(prompt.translate(_QUOTES)):
        if piece.startswith('"'):
            letters = piece.strip('"').upper()
            numbers += [SPACE if letter == " " else vocabulary.get(letter, UNKNOWN) for letter in letters]
        else:
            numbers.append(vocabulary.get(piece.lower(), UNKNOWN))
    return (numbers + [PADDING] * TEXT_LENGTH)[:TEXT_LENGTH]


class EmbeddedJudge:
    """Judges images of the embedded world.

    Args:
        folder: weights, vocabulary and calibration.
    """

    def __init__(self, folder: Path) -> None:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        self._vocabulary: dict[str, int] = config["vocabulary"]
        self._shifts = [config["calibration"][axis] for axis in AXES]
        self._folder = folder
        self._network: JudgeNetwork | None = None

    @functools.cached_property
    def version(self) -> Mapping[str, Any]:
        """Provenance: the digests of the weights and of the configuration with the calibration."""
        files = {name: sha256_file(self._folder / name) for name in ("config.json", "model.safetensors")}
        return {"judge": "embedded", "files": files}

    @property
    def resources(self) -> Resources:
        """A small network on the CPU."""
        return "cores"

    def load(self) -> None:
        """Load the network; a second call does nothing."""
        self._loaded()

    def _loaded(self) -> JudgeNetwork:
        if self._network is None:
            network = JudgeNetwork(max(self._vocabulary.values()) + 1)
            network.load_state_dict(load_file(self._folder / "model.safetensors"))
            self._network = network.eval()
        return self._network

    def judge(self, images: Sequence[ImageSource], prompts: Sequence[str]) -> list[Judgement]:
        """One judgement per image. Images of another size are resized to 64 x 64 pixels."""
        readable, reasons = read_all(images)
        judgements = {index: Judgement.missing(reason) for index, reason in reasons.items()}
        if readable:
            fitted = [_fitted(image) for image in readable.values()]
            qualities = self.qualities(fitted, [prompts[index] for index in readable])
            columns = [scaled(column, shift) for column, shift in zip(qualities.T, self._shifts, strict=True)]
            for index, *row in zip(readable, *columns, strict=True):
                judgements[index] = Judgement(dict(zip(AXES, row, strict=True)))
        return [judgements[index] for index in range(len(images))]

    def qualities(self, images: Sequence[Image.Image], prompts: Sequence[str]) -> Tensor:
        """The network's qualities before calibration, [N, 3] in [0, 1], of RGB images of 64 x 64 pixels."""
        words = torch.tensor([word_numbers(prompt, self._vocabulary) for prompt in prompts])
        with torch.inference_mode():
            return torch.as_tensor(self._loaded()(to_pixels(images), words).sigmoid())

    def __getstate__(self) -> dict[str, Any]:
        """Everything but the loaded network, so that a judge can be sent to a worker process."""
        return {**self.__dict__, "_network": None}


def scaled(qualities: Tensor, shift: float) -> list[float]:
    """Qualities [N] in [0, 1] as scores from 1 to 5: their log-odds minus ``shift``; 0 remains 1, and 1 remains 5."""
    odds = torch.logit(qualities.double(), eps=1e-9) - shift
    return [round(value, 4) for value in (LOWEST + (HIGHEST - LOWEST) * odds.sigmoid()).tolist()]


def _fitted(image: Image.Image) -> Image.Image:
    return image if image.size == (SIZE, SIZE) else image.resize((SIZE, SIZE), Image.Resampling.BOX)
