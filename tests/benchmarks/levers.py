"""What the keys for speed gain on the embedded model: ratios, each measured in one run on one machine.

    python -m tests.benchmarks.levers            # the second table of docs/performance.md, about four minutes

See ``ratios`` for how a ratio is measured.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import count

import torch

from gdro_cli.config.load import load_recipe
from gdro_cli.config.recipe import Recipe
from gdro_cli.stages.setup.model import attach_adapter, open_model
from gdro_cli.stages.training.group_gradient import draw_noise, noisy_groups
from gdro_cli.stages.training.prefetch import Prefetch
from tests.benchmarks.ratios import group_gradient, random_batch, ratio

STEPS = 1000
"""More than any ratio needs."""


def step_of(recipe: Recipe, *, prefetch: bool = False, cached: bool = False) -> Callable[[], None]:
    """One whole training step on random groups, as in ``gdro train``."""
    model = open_model(recipe)
    optimizer = torch.optim.AdamW(attach_adapter(recipe, model), lr=1e-6)
    batch = random_batch(recipe, model, groups=recipe.train.groups_per_step, k=recipe.group_method.k)
    gradient = group_gradient(recipe, model, one_pass=True, micro_batch=None)
    drawing = Prefetch(lambda step: draw_noise(batch, recipe.group_method, seed=step), steps=STEPS if prefetch else 0)
    noise = draw_noise(batch, recipe.group_method, seed=0)
    errors = gradient.reference_errors(noisy_groups(model, batch, noise)) if cached else None
    numbers = count()

    def step() -> None:
        gradient(noisy_groups(model, batch, drawing.take(next(numbers))), errors)
        optimizer.step()
        optimizer.zero_grad()

    return step


def main() -> None:
    """Print the table."""
    recipe = load_recipe("ocr")
    compiled = load_recipe("ocr", overrides=["model.compile=true"])
    rows = {
        "train.cache_reference, all errors known": (step_of(recipe, cached=True), step_of(recipe)),
        "train.prefetch": (step_of(recipe, prefetch=True), step_of(recipe)),
        "model.compile": (step_of(compiled), step_of(recipe)),
    }
    print("| key | step with | step without | ratio |\n|---|---|---|---|")
    for name, (with_key_on, with_key_off) in rows.items():
        with_key, without, factor = ratio(with_key_on, with_key_off)
        print(f"| `{name}` | {with_key:.3f} s | {without:.3f} s | {factor:.2f} |")


if __name__ == "__main__":
    main()
