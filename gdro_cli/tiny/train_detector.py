"""Train the embedded world's detector and measure how often it finds the objects that were drawn.

    python -m gdro_cli.tiny.train_detector --out detector

Images are drawn during training. Most pass through the autoencoder with some noise on the latents, because the detector
is used on generated images. The mixture also has signs and bare backgrounds, which contain no object.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from safetensors.torch import save_file
from scipy import ndimage
from torch import Tensor
from torch.nn import functional
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from gdro_cli.core.geneval import TAGS
from gdro_cli.core.seeds import seed_for
from gdro_cli.embedded import tiny_model_path
from gdro_cli.files import write_json
from gdro_cli.rewards.geneval.palette import PaletteColours
from gdro_cli.rewards.geneval.segmenter import MARGIN, SegmentationNetwork, SegmenterDetector
from gdro_cli.rewards.layers import scale_pixels, to_pixels
from gdro_cli.tiny.autoencoder import PatchAutoencoder, decode_pixels, encode_mean
from gdro_cli.tiny.backgrounds import BACKGROUNDS, SIZE
from gdro_cli.tiny.world import (
    CHALK,
    COLOURS,
    GRID,
    INK,
    SHAPES,
    Thing,
    draw_things,
    random_scene,
    random_sign,
    thing_mask,
)

BATCH = 32
WIDTHS = (32, 64, 96)
LEARNING_RATE = 2e-3
MOST_THINGS = 9
SIGN_SHARE, CROWD_SHARE = 0.15, 0.5
CLEAN_SHARE = 0.3  # images that do not pass through the autoencoder
LATENT_NOISE = 0.25  # largest standard deviation of the noise on the latents
SHIFT = 2  # pixels by which an image may be shifted off the grid
PALETTE_FILE = "palette.json"


@dataclass(frozen=True, slots=True)
class Example:
    """An image with the class of each pixel: 0 background, else 1 + index in SHAPES."""

    pixels: NDArray[np.uint8]
    labels: NDArray[np.int64]


def pixel_labels(things: tuple[Thing, ...]) -> NDArray[np.int64]:
    """Class of each pixel [64, 64]; the things' masks, smaller by ``MARGIN`` pixels."""
    labels = np.zeros((SIZE, SIZE), np.int64)
    for thing in things:
        core = ndimage.binary_erosion(thing_mask(thing), ndimage.generate_binary_structure(2, 2), iterations=MARGIN)
        labels[core] = 1 + SHAPES.index(thing.shape)
    return labels


def draw_example(rng: np.random.Generator) -> Example:
    """A random training image."""
    kind = rng.random()
    if kind < SIGN_SHARE:
        drawing = random_sign(rng)
        image, things = drawing.image, drawing.things
    elif kind < SIGN_SHARE + CROWD_SHARE:
        cells = rng.permutation(GRID * GRID)[: rng.integers(0, MOST_THINGS + 1)]
        colours = list(COLOURS)
        things = tuple(
            Thing(SHAPES[rng.integers(len(SHAPES))], colours[rng.integers(len(colours))], *divmod(int(cell), GRID))
            for cell in cells
        )
        background = list(BACKGROUNDS)[rng.integers(len(BACKGROUNDS))]
        image = draw_things(things, background=background, rng=rng)
    else:
        drawing = random_scene(rng)
        image, things = drawing.image, drawing.things
    down, right = (int(shift) for shift in rng.integers(-SHIFT, SHIFT + 1, 2))
    return Example(
        np.roll(np.asarray(image), (down, right), (0, 1)), np.roll(pixel_labels(things), (down, right), (0, 1))
    )


class Examples(IterableDataset[tuple[Tensor, Tensor]]):
    """Endless batches of pixels [32, 64, 64, 3] and labels [32, 64, 64]; each worker draws its own."""

    def __init__(self, seed: int) -> None:
        self._seed = seed

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Draw batches."""
        worker = get_worker_info()
        if worker is not None:
            torch.set_num_threads(1)
        rng = np.random.default_rng(seed_for(self._seed, "tiny-detector", 0 if worker is None else worker.id))
        while True:
            examples = [draw_example(rng) for _ in range(BATCH)]
            yield (
                torch.from_numpy(np.stack([example.pixels for example in examples])),
                torch.from_numpy(np.stack([example.labels for example in examples])),
            )


def as_generated(pixels: Tensor, autoencoder: PatchAutoencoder, stream: torch.Generator) -> Tensor:
    """Pass most images [N, 3, H, W] through the autoencoder, each with its own amount of noise."""
    with torch.no_grad():
        latents = encode_mean(autoencoder, pixels)
        amount = torch.rand(len(latents), 1, 1, 1, generator=stream) * LATENT_NOISE
        noisy = latents + amount * torch.randn(latents.shape, generator=stream)
        decoded = decode_pixels(autoencoder, noisy).clamp(-1, 1)
    keep = torch.rand(len(pixels), generator=stream) < CLEAN_SHARE
    mixed: Tensor = torch.where(keep[:, None, None, None], pixels, decoded)
    return mixed


def train(*, steps: int, seed: int, workers: int, log: Path) -> SegmentationNetwork:
    """Train from scratch with a learning rate that rises and falls to 0."""
    torch.manual_seed(seed_for(seed, "tiny-detector-weights"))
    stream = torch.Generator().manual_seed(seed_for(seed, "tiny-detector-noise"))
    autoencoder = PatchAutoencoder.from_pretrained(tiny_model_path() / "vae").eval()
    network = SegmentationNetwork(len(SHAPES), WIDTHS)
    optimizer = torch.optim.AdamW(network.parameters(), lr=LEARNING_RATE, weight_decay=0.01, fused=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, LEARNING_RATE, total_steps=steps, pct_start=0.05)
    batches = iter(
        DataLoader(Examples(seed), batch_size=None, num_workers=workers, prefetch_factor=8 if workers else None)
    )
    start = time.monotonic()
    for step in range(1, steps + 1):
        drawn, labels = next(batches)
        pixels = as_generated(scale_pixels(drawn), autoencoder, stream)
        loss = functional.cross_entropy(network(pixels), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        if step % 50 == 0:
            row = {"step": step, "loss": loss.item(), "seconds": round(time.monotonic() - start, 1)}
            with log.open("a") as file:
                file.write(json.dumps(row) + "\n")
    return network.eval()


def save(network: SegmentationNetwork, folder: Path) -> None:
    """Write the files that ``SegmenterDetector`` and ``PaletteColours`` read."""
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / "config.json", {"classes": SHAPES, "widths": WIDTHS})
    write_json(folder / PALETTE_FILE, {"palette": COLOURS, "neutral": [INK, CHALK]})
    save_file({name: value.contiguous() for name, value in network.state_dict().items()}, folder / "model.safetensors")


@dataclass(frozen=True, slots=True)
class Agreement:
    """How often the detector finds the objects that were drawn."""

    images: int
    objects: float
    """Share of the images in which all classes, colours and positions are right and nothing else is found."""
    masks: float
    """Mean overlap (intersection over union) of detected and drawn masks, in the images with the right objects."""


def measure(folder: Path, *, images: int, seed: int, minimum: float, generated: bool = False) -> dict[str, Agreement]:
    """Agreement per tag on freshly drawn images; ``generated`` passes them through the autoencoder first."""
    detector, colours = SegmenterDetector(folder), PaletteColours.read(folder / PALETTE_FILE)
    autoencoder = PatchAutoencoder.from_pretrained(tiny_model_path() / "vae").eval() if generated else None
    agreements = {}
    for tag in TAGS:
        rng = np.random.default_rng(seed_for(seed, "tiny-detector-test", tag))
        scenes = [random_scene(rng, tag) for _ in range(images)]
        drawn = [scene.image for scene in scenes]
        if autoencoder is not None:
            drawn = passed_through(drawn, autoencoder)
        right, overlaps = 0, []
        for scene, image, objects in zip(scenes, drawn, detector.detect(drawn, minimum=minimum), strict=True):
            names = colours.classify(image, objects)
            masks = {(item.label, name, *_cell(item.box)): item.mask for item, name in zip(objects, names, strict=True)}
            truth = {(thing.shape, thing.colour, thing.row, thing.column): thing_mask(thing) for thing in scene.things}
            if len(masks) == len(objects) and masks.keys() == truth.keys():
                right += 1
                overlaps += [float((masks[key] & truth[key]).sum() / (masks[key] | truth[key]).sum()) for key in truth]
        agreements[tag] = Agreement(images, right / images, float(np.mean(overlaps)) if overlaps else 0.0)
    return agreements


def passed_through(images: list[Image.Image], autoencoder: PatchAutoencoder) -> list[Image.Image]:
    """Encode and decode images."""
    with torch.no_grad():
        pixels = decode_pixels(autoencoder, encode_mean(autoencoder, to_pixels(images))).clamp(-1, 1)
    array = ((pixels + 1) * 127.5).round().to(torch.uint8).permute(0, 2, 3, 1).numpy()
    return [Image.fromarray(pixels_of_image) for pixels_of_image in array]


def _cell(box: tuple[float, float, float, float]) -> tuple[int, int]:
    """Row and column of the token that contains the middle of a box."""
    return int((box[1] + box[3]) / 2 * GRID / SIZE), int((box[0] + box[2]) / 2 * GRID / SIZE)


def main() -> None:
    """Read the command line, train, and write weights and report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder for weights and report")
    parser.add_argument("--steps", type=int, default=4_000, help="steps of 32 images")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--workers", type=int, default=1, help="drawing processes")
    parser.add_argument("--images", type=int, default=1_000, help="freshly drawn images per tag in the report")
    parser.add_argument("--only-report", action="store_true", help="measure the weights that are in --out")
    arguments = parser.parse_args()
    if not arguments.only_report:
        arguments.out.mkdir(parents=True, exist_ok=True)
        network = train(
            steps=arguments.steps, seed=arguments.seed, workers=arguments.workers, log=arguments.out / "log.jsonl"
        )
        save(network, arguments.out)
    report = {}
    for name, generated in (("drawn", False), ("through the autoencoder", True)):
        agreements = measure(
            arguments.out, images=arguments.images, seed=arguments.seed + 1, minimum=0.3, generated=generated
        )
        report[name] = {tag: asdict(agreement) for tag, agreement in agreements.items()}
    write_json(arguments.out / "report.json", report)
    print(json.dumps(report, indent=2))  # noqa: T201


if __name__ == "__main__":
    main()
