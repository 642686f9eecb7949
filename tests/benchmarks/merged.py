"""What merging an adapter costs in bfloat16: errors of the velocity as shares of the adapter's effect in float32.

    python -m tests.benchmarks.merged RUN/pytorch_lora_weights.safetensors [--size 0.1]

Both have the rounding of bfloat16's activations, and the merged adapter also that of W + s B A.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from contextlib import nullcontext
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

from gdro_cli.config.load import load_recipe
from gdro_cli.models.adapters import load_lora_state, merged, reference
from gdro_cli.models.base import FlowModel
from gdro_cli.stages.setup.model import attach_adapter, open_model
from tests.benchmarks.ratios import SIDE, random_batch

SIGMAS = (0.9, 0.6, 0.3)


def adapted(dtype: str, weights: Mapping[str, Tensor]) -> FlowModel:
    """The embedded model with the adapter."""
    recipe = load_recipe("ocr", overrides=[f"model.dtype={dtype}"])
    model = open_model(recipe)
    attach_adapter(recipe, model)
    load_lora_state(model, weights)
    return model


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("adapter", type=Path, help="adapter of a run on the embedded model")
    parser.add_argument("--size", type=float, default=1.0, help="factor of the adapter")
    options = parser.parse_args()
    weights = {
        name.removeprefix("transformer."): tensor * (options.size if ".lora_B." in name else 1.0)
        for name, tensor in load_file(options.adapter).items()
    }
    exact, rounded = adapted("float32", weights), adapted("bfloat16", weights)
    batch = random_batch(load_recipe("ocr"), exact, groups=8, k=6)
    latents, texts = batch.latents.flatten(0, 1), [text for text in batch.conditioning for _ in range(6)]

    def velocity(model: FlowModel, sigma: float) -> Tensor:
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=model is rounded):
            levels = torch.full((len(latents),), sigma)
            return model.velocity(latents, levels, texts, guidance=1.0, height=SIDE, width=SIDE).float()

    print("| sigma | attached | merged |\n|---|---|---|")
    for sigma in SIGMAS:
        trained = velocity(exact, sigma)
        with reference(exact):
            effect = (trained - velocity(exact, sigma)).norm()
        errors = []
        for context in (nullcontext(), merged(rounded)):
            with context:
                errors.append(float((velocity(rounded, sigma) - trained).norm() / effect))
        print(f"| {sigma} | {errors[0]:.2f} | {errors[1]:.2f} |")


if __name__ == "__main__":
    main()
