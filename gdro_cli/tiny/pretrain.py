"""Pretrain the embedded model: ``python -m gdro_cli.tiny.pretrain --out pretraining``.

This makes a FluxPipeline folder from scratch: autoencoder, images, flow model. Every part is kept in ``--out``, and a
second call continues where the first stopped; ``--steps`` may be raised later. The learning rate is constant after the
warm-up and falls linearly to zero over the last ``--decay-steps``. The folder contains:

    vae/               the autoencoder
    images/            the drawn set
    checkpoint/        weights, averaged weights and optimizer (safetensors)
    log.jsonl          losses
    step-NNNNNN/       the pipeline with averaged weights, and samples.png
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from gdro_cli.core.seeds import generator, seed_for
from gdro_cli.errors import UserError
from gdro_cli.files import write_json
from gdro_cli.identity import differences
from gdro_cli.tiny.autoencoder import PatchAutoencoder
from gdro_cli.tiny.flow_model import TinyFlux, build_pipeline, save_pipeline
from gdro_cli.tiny.pretrain_autoencoder import train_autoencoder
from gdro_cli.tiny.pretraining_set import CHUNK, load_set, make_set

DRAWN_SIGN_SHARE = 0.6
BATCH = 64
LEARNING_RATE, WARMUP, WEIGHT_DECAY, BETAS, MAX_NORM = 1.5e-3, 200, 0.01, (0.9, 0.99), 1.0
SIGMA_SPREAD, SIGMA_SHIFT = 1.1, 0.3  # sigma = sigmoid(spread * N + shift): slightly more noisy images
SAMPLE_STEPS = 8
FIXED = ("seed", "images", "autoencoder_steps")  # arguments that a continued pretraining must keep
SAMPLE_PROMPTS = (
    'a red sign that says "HELLO" on a brick background',
    'a yellow sign that says "OPEN" on a starry background',
    'a blue sign that says "ORANGE WINDOW" on a sandy background',
    'a green sign that says "FRESH BREAD" on a wooden background',
    'a pink sign that says "HOTEL" on a grassy background',
    'a brown sign that says "GARDEN" on a plain background',
    'a purple sign that says "WINTER SALE" on a plain background',
    'a orange sign that says "MUSIC" on a starry background',
    "a photo of a star on a grassy background",
    "a photo of a blue heart on a sandy background",
    "a photo of three circles on a plain background",
    "a photo of four rings on a brick background",
    "a photo of a square and a star on a starry background",
    "a photo of a heart left of a ring on a wooden background",
    "a photo of a circle above a triangle on a plain background",
    "a photo of a red circle and a green square on a sandy background",
)


def learning_rate(step: int, *, steps: int, decay_steps: int) -> float:
    """Learning rate of ``step`` (from 0): linear warm-up, constant, linear fall to 0 at ``steps``."""
    warm = min(1.0, (step + 1) / WARMUP)
    fall = min(1.0, (steps - step) / max(1, decay_steps))
    return LEARNING_RATE * min(warm, fall)


def average_decay(step: int) -> float:
    """Decay of the averaged weights at ``step``: a short memory at first."""
    return min(0.999, step / (step + 50))


class Trainer:
    """Weights, averaged weights and optimizer of the flow model, saved and restored together."""

    def __init__(self, folder: Path, *, seed: int) -> None:
        torch.manual_seed(seed_for(seed, "tiny-weights"))
        self.folder, self.seed, self.step = folder, seed, 0
        self.model = TinyFlux()
        self.model.eval()  # without dropout
        self.parameters = dict(self.model.named_parameters())
        self.average = {name: value.detach().clone() for name, value in self.parameters.items()}
        self.optimizer = torch.optim.AdamW(
            self.parameters.values(), lr=LEARNING_RATE, betas=BETAS, weight_decay=WEIGHT_DECAY, fused=True
        )
        if (folder / "checkpoint" / "state.json").exists():
            self._restore()

    def update(self, batch: dict[str, Tensor], *, rate: float, forward: object) -> dict[str, Tensor]:
        """Take one optimizer step; return the detached losses."""
        stream = generator(self.seed, "tiny-step", self.step)
        noise = torch.randn(batch["latents"].shape, generator=stream)
        sigma = torch.sigmoid(SIGMA_SPREAD * torch.randn(len(noise), generator=stream) + SIGMA_SHIFT)
        losses: dict[str, Tensor] = forward(batch, noise, sigma)  # type: ignore[operator]
        losses["total"].backward()
        torch.nn.utils.clip_grad_norm_(self.parameters.values(), MAX_NORM)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.step += 1
        decay = average_decay(self.step)
        torch._foreach_lerp_(
            list(self.average.values()), [value.detach() for value in self.parameters.values()], 1 - decay
        )
        return {name: value.detach() for name, value in losses.items()}

    def save(self) -> None:
        """Write the checkpoint; the state file comes last and atomically."""
        folder = self.folder / "checkpoint"
        folder.mkdir(parents=True, exist_ok=True)
        tensors = {f"weights/{name}": value.detach() for name, value in self.parameters.items()}
        tensors |= {f"average/{name}": value for name, value in self.average.items()}
        for name, value in self.parameters.items():
            state = self.optimizer.state[value]
            tensors |= {f"first/{name}": state["exp_avg"], f"second/{name}": state["exp_avg_sq"]}
        name = f"tensors-{self.step}.safetensors"
        save_file({key: value.contiguous() for key, value in tensors.items()}, folder / name)
        temporary = folder / "state.json.tmp"
        temporary.write_text(json.dumps({"step": self.step, "file": name}))
        temporary.replace(folder / "state.json")
        for old in folder.glob("tensors-*.safetensors"):
            if old.name != name:
                old.unlink()

    def _restore(self) -> None:
        folder = self.folder / "checkpoint"
        state = json.loads((folder / "state.json").read_text())
        tensors = load_file(folder / state["file"])
        self.step = state["step"]
        for name, value in self.parameters.items():
            value.data.copy_(tensors[f"weights/{name}"])
            self.average[name].copy_(tensors[f"average/{name}"])
            self.optimizer.state[value] = {
                "step": torch.tensor(float(self.step)),
                "exp_avg": tensors[f"first/{name}"],
                "exp_avg_sq": tensors[f"second/{name}"],
            }

    def export(self, autoencoder: PatchAutoencoder) -> Path:
        """Save the pipeline with averaged weights and a sheet of samples."""
        averaged = TinyFlux()
        with torch.no_grad():
            for name, value in averaged.named_parameters():
                value.copy_(self.average[name])
        averaged.eval()
        folder = self.folder / f"step-{self.step:06d}"
        save_pipeline(averaged, autoencoder, folder)
        draw_samples(averaged, autoencoder, folder / "samples.png")
        return folder


def draw_samples(model: TinyFlux, autoencoder: PatchAutoencoder, path: Path) -> None:
    """Save a sheet with four images for each of 16 prompts; each half of a row shows one prompt."""
    from PIL import Image

    pipeline = build_pipeline(model, autoencoder)
    sheet = Image.new("RGB", (8 * 66, 8 * 66), "white")
    for number, prompt in enumerate(SAMPLE_PROMPTS):
        streams = [torch.Generator().manual_seed(i) for i in range(4)]
        images = pipeline(
            prompt,
            num_images_per_prompt=4,
            generator=streams,
            num_inference_steps=SAMPLE_STEPS,
            height=64,
            width=64,
            max_sequence_length=pipeline.tokenizer_2.model_max_length,
        ).images
        for i, image in enumerate(images):
            sheet.paste(image, ((number // 8 * 4 + i) * 66, number % 8 * 66))
    sheet.resize((sheet.width * 2, sheet.height * 2), Image.Resampling.NEAREST).save(path)


def draw_batch(data: dict[str, Tensor], step: int, *, seed: int, sign_share: float) -> dict[str, Tensor]:
    """The batch of ``step``: signs and shapes in fixed shares, each from a fresh permutation per pass."""
    is_sign = (data["places"] >= 0).any(dim=1)
    signs = round(BATCH * sign_share)
    picks = []
    for name, kind, share in (("signs", is_sign, signs), ("shapes", ~is_sign, BATCH - signs)):
        if share:
            members = kind.nonzero().flatten()
            per_pass = len(members) // share
            order = torch.randperm(len(members), generator=generator(seed, "tiny-order", name, step // per_pass))
            start = step % per_pass * share
            picks.append(members[order[start : start + share]])
    pick = torch.cat(picks)
    return {name: column[pick] for name, column in data.items()}


def keep_arguments(path: Path, arguments: dict[str, int]) -> None:
    """Write the arguments that later calls must not change, or compare them with those of the first call.

    Raises:
        UserError: the arguments differ.
    """
    if not path.exists():
        write_json(path, arguments)
    elif changed := differences(json.loads(path.read_text()), arguments):
        listed = "; ".join(map(str, changed))
        raise UserError(f"{path.parent} was started with other arguments ({listed}): use those, or another --out")


def pretrain(arguments: argparse.Namespace) -> None:
    """Run all parts that are still missing."""
    out: Path = arguments.out
    out.mkdir(parents=True, exist_ok=True)
    start = time.monotonic()

    def log(row: dict[str, float]) -> None:
        with (out / "log.jsonl").open("a") as file:
            file.write(json.dumps({**row, "seconds": round(time.monotonic() - start, 1)}) + "\n")

    keep_arguments(out / "arguments.json", {name: getattr(arguments, name) for name in FIXED})
    if not (out / "vae").exists():
        autoencoder = train_autoencoder(steps=arguments.autoencoder_steps, seed=arguments.seed, log=log)
        autoencoder.save_pretrained(out / "vae.partial")
        (out / "vae.partial").rename(out / "vae")
    autoencoder = PatchAutoencoder.from_pretrained(out / "vae").eval()
    make_set(
        out / "images",
        chunks=-(-arguments.images // CHUNK),
        seed=arguments.seed,
        sign_share=DRAWN_SIGN_SHARE,
        workers=arguments.workers,
    )
    data = load_set(out / "images")
    trainer = Trainer(out, seed=arguments.seed)
    forward = torch.compile(trainer.model.losses) if arguments.compile else trainer.model.losses
    while trainer.step < arguments.steps:
        batch = draw_batch(data, trainer.step, seed=arguments.seed, sign_share=arguments.sign_share)
        rate = learning_rate(trainer.step, steps=arguments.steps, decay_steps=arguments.decay_steps)
        losses = trainer.update(batch, rate=rate, forward=forward)
        if trainer.step % arguments.log_every == 0:
            log({"step": trainer.step, "lr": rate, **{name: value.item() for name, value in losses.items()}})
        if trainer.step % arguments.save_every == 0 or trainer.step == arguments.steps:
            trainer.save()
        if trainer.step % arguments.export_every == 0 or trainer.step == arguments.steps:
            trainer.export(autoencoder)


def main() -> None:
    """Read the command line and pretrain."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder for all parts; created or continued")
    parser.add_argument("--steps", type=int, default=10_000, help="steps of 64 images")
    parser.add_argument("--decay-steps", type=int, default=2_500, help="steps over which the learning rate falls")
    parser.add_argument("--sign-share", type=float, default=0.6, help="share of signs in a batch; the rest are shapes")
    parser.add_argument("--images", type=int, default=120_000, help="images drawn in advance")
    parser.add_argument("--autoencoder-steps", type=int, default=2_000)
    parser.add_argument("--workers", type=int, default=2, help="drawing processes")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--log-every", type=int, default=20)
    parser.add_argument("--save-every", type=int, default=200)
    parser.add_argument("--export-every", type=int, default=1_000)
    parser.add_argument("--compile", action="store_true", help="use torch.compile: twice as fast, needs a C++ compiler")
    try:
        pretrain(parser.parse_args())
    except UserError as error:
        parser.error(str(error))


if __name__ == "__main__":
    main()
