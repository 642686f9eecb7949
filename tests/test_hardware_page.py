"""docs/hardware.md agrees with the estimate for each card."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from gdro_cli.config.load import load_recipe, shipped_recipes
from gdro_cli.core.footprint import CARDS, SUSTAINED_TFLOPS, USABLE, fits
from gdro_cli.stages.planning.needs import gigabytes
from gdro_cli.stages.training.estimate import Estimate

pytestmark = pytest.mark.slow

PAGE = (Path(__file__).parents[1] / "docs/hardware.md").read_text(encoding="utf-8")
ROWS = re.findall(r"^\| `([\w`, -]+)` \| (\d+) GB \| (.*?) \| ([\d.]+) \| ([\d.]+) \|$", PAGE, flags=re.MULTILINE)


def test_every_recipe_for_gpus_has_every_card() -> None:
    named = {(name, int(card)) for names, card, *_ in ROWS for name in names.split("`, `")}
    recipes = [name for name in shipped_recipes() if name.startswith(("flux-", "sd35-"))]
    assert {(name, card) for name in recipes for card in CARDS} <= named


@pytest.mark.parametrize(("names", "card", "settings", "sampling", "training"), ROWS)
def test_a_row_is_the_estimate(names: str, card: str, settings: str, sampling: str, training: str) -> None:
    """The job also fits the card. The recipes of a row need the same memory."""
    estimates = set()
    for name in names.split("`, `"):
        estimate = Estimate(load_recipe(name, overrides=re.findall(r"`([\w.]+=[\w.]+)`", settings)))
        assert int(card) in fits(max(estimate.sampling_bytes, estimate.training_bytes))
        estimates.add((gigabytes(estimate.sampling_bytes), gigabytes(estimate.training_bytes)))
    assert estimates == {(sampling, training)}


def test_the_page_has_the_constants_of_the_code() -> None:
    assert f"{SUSTAINED_TFLOPS:g} TFLOP/s" in PAGE and f"at most {100 * USABLE:.0f} % are" in PAGE
    usable = [f"{USABLE * card * 2**30 / 1e9:.1f}" for card in CARDS]
    assert f"{usable[0]},\n{usable[1]} and {usable[2]} GB" in PAGE
