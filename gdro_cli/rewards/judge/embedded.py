"""The embedded world's judge: a small network that sees an image and its prompt, and nothing else.

Coherence (is it drawn well?) and style (does it have background detail and colour?) are read from the image alone;
alignment (does it fit its prompt?) from image and prompt together. Weights lie in a folder with ``config.json`` and
``model.safetensors``; ``python -m gdro_cli.tiny.train_judge`` makes them.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional

from gdro_cli.errors import PrerequisiteError
from gdro_cli.files import sha256_file
from gdro_cli.rewards.base import ImageSource, UnreadableImageError, read_rgb
from gdro_cli.rewards.judge.base import AXES, HIGHEST, LOWEST, Judgement
from gdro_cli.rewards.layers import ResidualBlock

SIZE = 64  # pixels per side that the judge was trained on
CELLS = 8  # image tokens per side, of 8 pixels each: one letter of the world's signs
TEXT_LENGTH = 28
ANCHOR = 3.4
"""The mean score of the base model's own images on each axis, as FLUX.1's in the paper."""
_WORD = re.compile(r'"[^"]*"?|[A-Za-z]+')
_QUOTES = dict.fromkeys(map(ord, "\u201c\u201d\u201e\u201f"), '"')
PADDING, UNKNOWN, SPACE = 0, 1, 2


class JudgeNetwork(nn.Module):
    """Pixels [N, 3, 64, 64] in [-1, 1] and word numbers [N, 28] -> qualities [N, 3] in [0, 1], in the order of AXES.

    A convolutional image encoder gives 64 tokens; a transformer reads them together with the prompt's words.
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

    def forward(self, pixels: Tensor, words: Tensor) -> Tensor:
        """Logits [N, 3] of the qualities; their sigmoid is the quality."""
        tokens = self.image_tokens(pixels)
        looks = self.looks(torch.cat([tokens.mean(dim=1), tokens.amax(dim=1)], dim=1))
        fit = self.fit(self.read(tokens, words)[:, 0])
        return torch.cat([fit, looks], dim=1)


def word_numbers(prompt: str, vocabulary: Mapping[str, int]) -> list[int]:
    """The prompt as ``TEXT_LENGTH`` numbers: a word each, inside double quotes a letter each."""
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
        batch_size: images per forward pass.

    Raises:
        PrerequisiteError: the folder is missing or incomplete.
    """

    def __init__(self, folder: Path, *, batch_size: int = 32) -> None:
        config, weights = folder / "config.json", folder / "model.safetensors"
        try:
            content = json.loads(config.read_text(encoding="utf-8"))
            self._vocabulary = {str(word): int(number) for word, number in content["vocabulary"].items()}
            self._words = max(self._vocabulary.values()) + 1
            self._shifts = tuple(float(content["calibration"][axis]) for axis in AXES)
            digests = {path.name: sha256_file(path) for path in (config, weights)}
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise PrerequisiteError(f"the judge in {folder} is missing or incomplete: reinstall gdro_cli") from error
        self._weights, self._batch_size = weights, batch_size
        self._version = {"judge": "embedded", "files": digests}
        self._network: JudgeNetwork | None = None

    @property
    def version(self) -> Mapping[str, Any]:
        """Digests of the weights and the calibration."""
        return self._version

    def load(self) -> None:
        """Load the network; a second call does nothing. Raises ``PrerequisiteError`` for weights that do not fit."""
        self._loaded()

    def _loaded(self) -> JudgeNetwork:
        if self._network is None:
            network = JudgeNetwork(self._words)
            try:
                network.load_state_dict(load_file(self._weights))
            except (OSError, SafetensorError, RuntimeError) as error:
                raise PrerequisiteError(
                    f"the judge's weights {self._weights} are damaged: reinstall gdro_cli"
                ) from error
            self._network = network.eval()
        return self._network

    def judge(self, images: Sequence[ImageSource], prompts: Sequence[str]) -> list[Judgement]:
        """One judgement per image. Images of another size are brought to 64 x 64 pixels."""
        judgements: dict[int, Judgement] = {}
        readable: dict[int, Image.Image] = {}
        for number, source in enumerate(images):
            try:
                readable[number] = _fitted(read_rgb(source))
            except UnreadableImageError as error:
                judgements[number] = Judgement.missing(str(error))
        waiting = list(readable)
        for start in range(0, len(waiting), self._batch_size):
            batch = waiting[start : start + self._batch_size]
            axes = self.qualities([readable[i] for i in batch], [prompts[i] for i in batch])
            columns = [scaled(column, shift) for column, shift in zip(axes.T, self._shifts, strict=True)]
            for number, *row in zip(batch, *columns, strict=True):
                judgements[number] = Judgement(dict(zip(AXES, row, strict=True)))
        return [judgements[number] for number in range(len(images))]

    def qualities(self, images: Sequence[Image.Image], prompts: Sequence[str]) -> Tensor:
        """What the network says before calibration, [N, 3] in [0, 1], of RGB images of 64 x 64 pixels."""
        stack = torch.from_numpy(np.stack([np.asarray(image) for image in images]))
        pixels = stack.permute(0, 3, 1, 2).float() / 127.5 - 1
        words = torch.tensor([word_numbers(prompt, self._vocabulary) for prompt in prompts])
        with torch.inference_mode():
            return torch.as_tensor(self._loaded()(pixels, words).sigmoid())

    def __getstate__(self) -> dict[str, Any]:
        """Everything but the loaded network, so that it can be sent to a worker process."""
        return {**self.__dict__, "_network": None}


def scaled(qualities: Tensor, shift: float) -> list[float]:
    """Qualities [N] in [0, 1] as scores from 1 to 5: their log-odds less ``shift``; 0 stays 1, 1 stays 5."""
    odds = torch.logit(qualities.double(), eps=1e-9) - shift
    return [round(value, 4) for value in (LOWEST + (HIGHEST - LOWEST) * odds.sigmoid()).tolist()]


def _fitted(image: Image.Image) -> Image.Image:
    return image if image.size == (SIZE, SIZE) else image.resize((SIZE, SIZE), Image.Resampling.BOX)
