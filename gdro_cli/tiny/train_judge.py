"""Train the embedded world's judge and report how its scores follow graded faults.

    python -m gdro_cli.tiny.train_judge --out judge

It learns from drawn images with known faults and a known fit to a prompt, most of them passed through the autoencoder.
It never sees a reward. The report has the rank correlation of severity and score for each fault.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from safetensors.torch import load_file, save_file
from scipy import stats
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from gdro_cli.core.seeds import seed_for
from gdro_cli.data.builtin import ocr_prompts
from gdro_cli.data.geneval_prompts import geneval_prompts
from gdro_cli.embedded import tiny_model_path
from gdro_cli.files import write_json
from gdro_cli.models.diffusers_flow import load_flow_model
from gdro_cli.models.latents import complete
from gdro_cli.models.sampling import sample_latents
from gdro_cli.rewards.judge.base import AXES
from gdro_cli.rewards.judge.embedded import ANCHOR, EmbeddedJudge, JudgeNetwork, scaled, word_numbers
from gdro_cli.rewards.layers import scale_pixels
from gdro_cli.tiny.autoencoder import PatchAutoencoder
from gdro_cli.tiny.degrade import COHERENCE, STYLE, UNTEXTURED, degrade
from gdro_cli.tiny.judge_data import Example, draw_example, judge_vocabulary
from gdro_cli.tiny.pretraining_set import random_drawing
from gdro_cli.tiny.train_detector import as_generated
from gdro_cli.tiny.world import ALPHABET, COLOURS, SHAPES, foreground_mask

BATCH = 32
LEARNING_RATE = 1e-3
CALIBRATION = 120  # validation prompts of each task
OCR_STEPS, GENEVAL_STEPS = 5, 3  # those of the shipped recipes
GRADES = tuple(grade / 8 for grade in range(9))  # severities of one image in the report
AUXILIARY = 0.2  # weight of the losses for the content of each cell


class Examples(IterableDataset[dict[str, Tensor]]):
    """Endless batches of 32 examples; each worker draws its own."""

    def __init__(self, seed: int, vocabulary: dict[str, int]) -> None:
        self._seed, self._vocabulary = seed, vocabulary

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        """Draw batches."""
        worker = get_worker_info()
        if worker is not None:
            torch.set_num_threads(1)
        rng = np.random.default_rng(seed_for(self._seed, "tiny-judge", 0 if worker is None else worker.id))
        while True:
            yield collate([draw_example(rng) for _ in range(BATCH)], self._vocabulary)


def collate(examples: list[Example], vocabulary: dict[str, int]) -> dict[str, Tensor]:
    """Stack examples: pixels uint8, words, qualities in [0, 1], and the cells' labels."""
    return {
        "pixels": torch.from_numpy(np.stack([example.pixels for example in examples])),
        "words": torch.tensor([word_numbers(example.prompt, vocabulary) for example in examples]),
        "qualities": torch.tensor([example.qualities for example in examples], dtype=torch.float32),
        "letters": torch.from_numpy(np.stack([example.letters for example in examples])),
        "things": torch.from_numpy(np.stack([example.things for example in examples])),
    }


class Teacher(nn.Module):
    """The judge, with heads that only training needs."""

    def __init__(self, words: int) -> None:
        super().__init__()
        self.judge = JudgeNetwork(words)
        width = self.judge.words.embedding_dim
        self.letter, self.thing = nn.Linear(width, len(ALPHABET)), nn.Linear(width, len(SHAPES) * len(COLOURS))

    def losses(self, pixels: Tensor, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """Cross-entropy of the three qualities, and of the letters and things in cells that have one."""
        tokens = self.judge.image_tokens(pixels)
        logits = self.judge.logits(tokens, batch["words"])
        by_axis = functional.binary_cross_entropy_with_logits(logits, batch["qualities"], reduction="none").mean(dim=0)
        losses = dict(zip(AXES, by_axis, strict=True))
        for name, head in (("letters", self.letter), ("things", self.thing)):
            labelled = batch[name] >= 0
            if labelled.any():
                losses[name] = functional.cross_entropy(head(tokens[labelled]), batch[name][labelled]) * AUXILIARY
        return losses


def train(
    *, steps: int, seed: int, workers: int, out: Path, rate: float = LEARNING_RATE, start: Path | None = None
) -> JudgeNetwork:
    """Train with a learning rate that rises to ``rate`` and falls to 0; ``start`` has weights to continue from."""
    torch.manual_seed(seed_for(seed, "tiny-judge-weights"))
    stream = torch.Generator().manual_seed(seed_for(seed, "tiny-judge-noise"))
    vocabulary = judge_vocabulary()
    autoencoder = PatchAutoencoder.from_pretrained(tiny_model_path() / "vae").eval()
    teacher = Teacher(max(vocabulary.values()) + 1)
    if start is not None:
        teacher.judge.load_state_dict(load_file(start / "model.safetensors"))
    optimizer = torch.optim.AdamW(teacher.parameters(), lr=rate, weight_decay=0.01, fused=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, total_steps=steps, pct_start=0.05)
    examples, prefetch = Examples(seed, vocabulary), 8 if workers else None
    batches = iter(DataLoader(examples, batch_size=None, num_workers=workers, prefetch_factor=prefetch))
    began, sums = time.monotonic(), dict.fromkeys((*AXES, "letters", "things"), 0.0)
    for step in range(1, steps + 1):
        batch = next(batches)
        losses = teacher.losses(as_generated(scale_pixels(batch["pixels"]), autoencoder, stream), batch)
        loss = torch.stack(list(losses.values())).sum()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(teacher.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        for name, value in losses.items():
            sums[name] += value.item() / 100
        if step % 100 == 0:
            row = {"step": step, **{name: round(value, 4) for name, value in sums.items()}}
            with (out / "log.jsonl").open("a") as file:
                file.write(json.dumps({**row, "seconds": round(time.monotonic() - began, 1)}) + "\n")
            sums = dict.fromkeys(sums, 0.0)
        if step % 500 == 0:
            save(teacher.judge, out / "unfinished")
    return teacher.judge.eval()


def save(network: JudgeNetwork, folder: Path, shifts: Mapping[str, float] | None = None) -> None:
    """Write the files that ``EmbeddedJudge`` reads; ``shifts`` are the calibration of each axis."""
    folder.mkdir(parents=True, exist_ok=True)
    calibration = dict(shifts or dict.fromkeys(AXES, 0.0))
    write_json(folder / "config.json", {"vocabulary": judge_vocabulary(), "calibration": calibration})
    tensors = {name: value.contiguous().half() for name, value in network.state_dict().items()}  # half the size
    save_file(tensors, folder / "model.safetensors")


def base_images() -> tuple[list[Image.Image], list[str]]:
    """Images of the base model for validation prompts, sampled as in the shipped recipes, with their prompts."""
    model = load_flow_model(str(tiny_model_path()))
    height, width = model.default_size
    images: list[Image.Image] = []
    prompts: list[str] = []
    for texts, steps in (
        (ocr_prompts("ocr-validation", count=CALIBRATION), OCR_STEPS),
        ([record.prompt for record in geneval_prompts("geneval-validation", count=CALIBRATION)], GENEVAL_STEPS),
    ):
        noise = model.noise([seed_for(0, "tiny-judge-calibration", text) for text in texts], height=height, width=width)
        latents = sample_latents(
            model,
            noise,
            model.encode(texts),
            steps=steps,
            guidance=1.0,
            height=height,
            width=width,
            batch_size=BATCH,
        )
        images += complete(model.decode(latents, height=height, width=width))
        prompts += texts
    return images, prompts


def calibrate(folder: Path) -> dict[str, float]:
    """Write the shifts into the judge's configuration that give the base model's images the mean ``ANCHOR``."""
    images, prompts = base_images()
    qualities = EmbeddedJudge(folder).qualities(images, prompts)
    shifts = {axis: round(shift_to(ANCHOR, column), 4) for axis, column in zip(AXES, qualities.T, strict=True)}
    write_json(folder / "config.json", {"vocabulary": judge_vocabulary(), "calibration": shifts})
    return shifts


def shift_to(mean: float, qualities: Tensor) -> float:
    """The shift of log-odds that makes ``mean`` the mean score of ``qualities`` [N]; scores fall as it grows."""
    low, high = -30.0, 30.0
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if np.mean(scaled(qualities, middle)) > mean else (low, middle)
    return (low + high) / 2


def measure(folder: Path, *, images: int, seed: int) -> dict[str, dict[str, float]]:
    """How the judge's scores follow graded faults and known fits, on fresh images.

    For each fault there are two rank correlations of severity and score: ``across images``, each with its own severity,
    and ``within an image``, the mean over a quarter as many images, each at nine severities. For alignment it is the
    correlation with the known fit of prompt and image across images, separately for signs and shapes.
    """
    judge = EmbeddedJudge(folder)
    report: dict[str, dict[str, float]] = {}
    for axis, faults in (("coherence", COHERENCE), ("style", STYLE)):
        for fault in faults:
            rng = np.random.default_rng(seed_for(seed, "tiny-judge-test", fault))
            severities = rng.uniform(0, 1, images)
            scores = _scores_of(judge, axis, [spoilt_images(fault, [severity], rng) for severity in severities])
            graded = [spoilt_images(fault, GRADES, rng) for _ in range(max(1, images // 4))]
            rows = _scores_of(judge, axis, graded).reshape(-1, len(GRADES))
            report[f"{axis}: {fault}"] = {
                "across images": -_correlation(severities, scores),
                "within an image": -float(np.mean([_correlation(GRADES, row) for row in rows])),
            }
    for kind in ("signs", "shapes"):
        rng = np.random.default_rng(seed_for(seed, "tiny-judge-test", kind))
        examples = [draw_example(rng, kind=kind, clean=True) for _ in range(images)]
        scores = _scores_of(judge, "alignment", [([example.pixels], example.prompt) for example in examples])
        fits = [example.qualities[0] for example in examples]
        report[f"alignment: {kind}"] = {"across images": _correlation(fits, scores)}
    return report


def spoilt_images(
    fault: str, severities: Sequence[float] | NDArray[np.float64], rng: np.random.Generator
) -> tuple[list[NDArray[np.uint8]], str]:
    """A fresh drawing with a fault at each severity, all from the same random numbers, and its prompt."""
    drawing = random_drawing(rng, sign_share=0.5)
    while fault == "flattened" and drawing.background in UNTEXTURED:
        drawing = random_drawing(rng, sign_share=0.5)
    clean, mask, seed = np.asarray(drawing.image), foreground_mask(drawing), int(rng.integers(2**32))
    versions = [
        degrade(clean, fault, float(severity), np.random.default_rng(seed), foreground=mask) for severity in severities
    ]
    return versions, drawing.prompt


def _scores_of(
    judge: EmbeddedJudge, axis: str, drawn: Sequence[tuple[Sequence[NDArray[np.uint8]], str]]
) -> NDArray[np.float32]:
    """The judge's scores for all versions of all drawings, in order."""
    images = [Image.fromarray(pixels) for versions, _ in drawn for pixels in versions]
    prompts = [prompt for versions, prompt in drawn for _ in versions]
    scores = [judge.qualities(images[i : i + 64], prompts[i : i + 64]).numpy() for i in range(0, len(images), 64)]
    return np.asarray(np.concatenate(scores)[:, AXES.index(axis)])


def _correlation(one: Sequence[float] | NDArray[Any], other: Sequence[float] | NDArray[Any]) -> float:
    return float(stats.spearmanr(one, other).statistic)


def main() -> None:
    """Read the command line, train, and write weights and report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder for weights and report")
    parser.add_argument("--steps", type=int, default=6_000, help="steps of 32 images")
    parser.add_argument("--rate", type=float, default=LEARNING_RATE, help="highest learning rate")
    parser.add_argument("--start", type=Path, help="folder with weights to continue from")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--workers", type=int, default=1, help="drawing processes")
    parser.add_argument("--images", type=int, default=600, help="fresh images per fault in the report")
    parser.add_argument("--only-report", action="store_true", help="measure the weights that are in --out")
    arguments = parser.parse_args()
    if not arguments.only_report:
        arguments.out.mkdir(parents=True, exist_ok=True)
        network = train(
            steps=arguments.steps,
            seed=arguments.seed,
            workers=arguments.workers,
            out=arguments.out,
            rate=arguments.rate,
            start=arguments.start,
        )
        save(network, arguments.out)
        calibrate(arguments.out)
    report = measure(arguments.out, images=arguments.images, seed=arguments.seed + 1)
    write_json(arguments.out / "report.json", report)
    print(json.dumps(report, indent=2))  # noqa: T201


if __name__ == "__main__":
    main()
