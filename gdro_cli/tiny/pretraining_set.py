"""The pretraining set: drawings of the world as latents with token ids and labels, on disk as plain arrays."""

from __future__ import annotations

from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import torch
from numpy.lib.format import open_memmap
from numpy.typing import NDArray
from torch import Tensor

from gdro_cli.core.seeds import seed_for
from gdro_cli.rewards.layers import to_pixels
from gdro_cli.tiny.autoencoder import PatchAutoencoder, encode_mean
from gdro_cli.tiny.world import (
    ALPHABET,
    COLOURS,
    GRID,
    LETTER,
    MAX_LETTERS,
    SHAPES,
    TOKEN,
    Drawing,
    random_scene,
    random_sign,
)

TOKENS = GRID * GRID
CHUNK = 2000  # images per unit of work; an image depends only on the seed, its chunk and its index in the chunk
LETTERS_PER_TOKEN = TOKEN // LETTER
NO_LABEL = -1


@dataclass(frozen=True, slots=True)
class Labels:
    """What the auxiliary heads learn from one drawing; -1 for nothing.

    letters: [16, 2] letter (0-25) of each half of each token. shapes, colours: [16].
    """

    letters: NDArray[np.int8]
    shapes: NDArray[np.int8]
    colours: NDArray[np.int8]


def random_drawing(rng: np.random.Generator, *, sign_share: float) -> Drawing:
    """A drawing of the pretraining mixture."""
    return random_sign(rng) if rng.random() < sign_share else random_scene(rng)


def token_labels(drawing: Drawing) -> Labels:
    """Labels of a drawing's tokens."""
    letters = np.full((TOKENS, LETTERS_PER_TOKEN), NO_LABEL, np.int8)
    shapes, colours = np.full((2, TOKENS), NO_LABEL, np.int8)
    for (row, column), letter in drawing.letters.items():
        token, half = row * GRID + column // LETTERS_PER_TOKEN, column % LETTERS_PER_TOKEN
        letters[token, half] = ALPHABET.index(letter)
    for thing in drawing.things:
        token = thing.row * GRID + thing.column
        shapes[token], colours[token] = SHAPES.index(thing.shape), list(COLOURS).index(thing.colour)
    return Labels(letters, shapes, colours)


def pack_latents(latents: Tensor) -> Tensor:
    """[N, C, h, w] -> [N, h/2 * w/2, 4C], the order of FluxPipeline's packing."""
    n, c, h, w = latents.shape
    return latents.view(n, c, h // 2, 2, w // 2, 2).permute(0, 2, 4, 1, 3, 5).reshape(n, h * w // 4, c * 4)


def letter_places(ids: list[int], letter_ids: frozenset[int], break_id: int) -> NDArray[np.int8]:
    """Index of each quoted letter in its sign (line * 6 + position in the line); -1 for other tokens."""
    places = np.full(len(ids), NO_LABEL, np.int8)
    line, column = 0, 0
    for i, token in enumerate(ids):
        if token in letter_ids:
            places[i] = line * MAX_LETTERS + column
            column += 1
        elif token == break_id:
            line, column = line + 1, 0
    return places


def _draw_chunk(folder: Path, chunk: int, seed: int, sign_share: float) -> int:
    """Draw one chunk and write it into the arrays."""
    from gdro_cli.tiny.tokenizers import CLIP_LENGTH, T5_LENGTH, build_clip_tokenizer, build_t5_tokenizer

    torch.set_num_threads(1)
    rng = np.random.default_rng(seed_for(seed, "tiny-pictures", chunk))
    drawings = [random_drawing(rng, sign_share=sign_share) for _ in range(CHUNK)]
    autoencoder = PatchAutoencoder.from_pretrained(folder.parent / "vae")
    with torch.no_grad():
        pixels = to_pixels([drawing.image for drawing in drawings])
        latents = pack_latents(encode_mean(autoencoder, pixels)).half().numpy()
    t5, clip = build_t5_tokenizer(), build_clip_tokenizer()
    vocabulary = t5.get_vocab()
    letter_ids, break_id = frozenset(vocabulary[letter] for letter in ALPHABET), vocabulary["▁"]
    prompts = [drawing.prompt for drawing in drawings]
    t5_ids = t5(prompts, padding="max_length", max_length=T5_LENGTH).input_ids
    labels = [token_labels(drawing) for drawing in drawings]
    columns = {
        "latents": latents,
        "t5_ids": t5_ids,
        "clip_ids": clip(prompts, padding="max_length", max_length=CLIP_LENGTH).input_ids,
        "places": [letter_places(ids, letter_ids, break_id) for ids in t5_ids],
        "letters": [label.letters for label in labels],
        "shapes": [label.shapes for label in labels],
        "colours": [label.colours for label in labels],
    }
    for name, column in columns.items():
        array = np.lib.format.open_memmap(folder / f"{name}.npy", mode="r+")
        array[chunk * CHUNK : (chunk + 1) * CHUNK] = np.asarray(column)
        array.flush()
    return chunk


def make_set(folder: Path, *, chunks: int, seed: int, sign_share: float, workers: int) -> None:
    """Draw ``chunks * CHUNK`` images into ``folder``, except chunks that are already drawn.

    The autoencoder must be in ``folder/../vae``.
    """
    from gdro_cli.tiny.tokenizers import CLIP_LENGTH, T5_LENGTH

    folder.mkdir(parents=True, exist_ok=True)
    count = chunks * CHUNK
    shapes: dict[str, tuple[type, tuple[int, ...]]] = {
        "latents": (np.float16, (TOKENS, 128)),
        "t5_ids": (np.int16, (T5_LENGTH,)),
        "clip_ids": (np.int16, (CLIP_LENGTH,)),
        "places": (np.int8, (T5_LENGTH,)),
        "letters": (np.int8, (TOKENS, LETTERS_PER_TOKEN)),
        "shapes": (np.int8, (TOKENS,)),
        "colours": (np.int8, (TOKENS,)),
    }
    for name, (dtype, shape) in shapes.items():
        if not (folder / f"{name}.npy").exists():
            open_memmap(folder / f"{name}.npy", mode="w+", dtype=dtype, shape=(count, *shape)).flush()
    done = folder / "done"
    done.mkdir(exist_ok=True)
    missing = [chunk for chunk in range(chunks) if not (done / str(chunk)).exists()]
    with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool:
        futures = [pool.submit(_draw_chunk, folder, chunk, seed, sign_share) for chunk in missing]
        for future in futures:
            (done / str(future.result())).touch()


def load_set(folder: Path) -> dict[str, Tensor]:
    """All arrays of ``folder`` by name, in memory."""
    return {path.stem: torch.from_numpy(np.load(path)) for path in sorted(folder.glob("*.npy"))}
