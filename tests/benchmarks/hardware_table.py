"""Print the table of docs/hardware.md: the estimated needs of the GPU recipes on cards of 24, 48 and 80 GB."""

from __future__ import annotations

from gdro_cli.config.load import load_recipe
from gdro_cli.core.footprint import fits
from gdro_cli.stages.planning.needs import gigabytes
from gdro_cli.stages.training.estimate import Estimate

SMALL_FLUX = (
    "model.quantization=int8",
    "model.offload=true",
    "sample.batch_size=4",
    "train.gradient_checkpointing=true",
)
LARGE_SD35 = ("train.gradient_checkpointing=false", "train.micro_batch=24", "sample.batch_size=32")
ROWS: tuple[tuple[tuple[str, ...], int, tuple[str, ...]], ...] = (
    (("flux-ocr", "flux-geneval", "flux-ocr-pickscore", "flux-pickscore"), 24, SMALL_FLUX),
    (("flux-ocr", "flux-geneval", "flux-ocr-pickscore", "flux-pickscore"), 48, ("train.gradient_checkpointing=0.75",)),
    (("flux-ocr", "flux-geneval", "flux-ocr-pickscore", "flux-pickscore"), 80, ()),
    (("sd35-ocr", "sd35-geneval"), 24, ()),
    (("sd35-ocr", "sd35-geneval"), 48, ("train.gradient_checkpointing=false",)),
    (("sd35-ocr", "sd35-geneval"), 80, LARGE_SD35),
)


def main() -> None:
    """Print the table."""
    print("| recipe | card | settings | sampling | training |\n|---|---|---|---|---|")
    for names, card, settings in ROWS:
        estimate = Estimate(load_recipe(names[0], overrides=settings))
        needed = estimate.sampling_bytes, estimate.training_bytes
        shown = ", ".join(f"`{setting}`" for setting in settings) or "none"
        recipes = ", ".join(f"`{name}`" for name in names)
        row = f"| {recipes} | {card} GB | {shown} | {gigabytes(needed[0])} | {gigabytes(needed[1])} |"
        print(row + ("" if card in fits(max(needed)) else " TOO MUCH"), flush=True)


if __name__ == "__main__":
    main()
