"""Every shipped recipe described without weights and without a network."""

from __future__ import annotations

import socket
from pathlib import Path
from typing import Any

import pytest

from gdro_cli.config.load import load_recipe, shipped_recipes
from gdro_cli.core.footprint import CARDS, adapter_bytes, group_step_flops, usable_bytes, weight_bytes
from gdro_cli.errors import PrerequisiteError
from gdro_cli.models.published import published_name
from gdro_cli.runtime.progress import Reporter
from gdro_cli.stages.planning import dry_run as plan
from gdro_cli.stages.planning.needs import cards, gigabytes, hours
from gdro_cli.stages.sampling import sample
from gdro_cli.stages.setup.session import Session
from gdro_cli.stages.training.batch_sizes import micro_batches, with_micro_batch
from gdro_cli.stages.training.estimate import Estimate

pytestmark = pytest.mark.slow

REAL = ("flux-geneval", "flux-ocr", "sd35-geneval", "sd35-ocr")


@pytest.fixture(autouse=True)
def no_network(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The Hub's cache is empty, and opening a connection fails the test."""

    def refuse(*arguments: Any, **options: Any) -> None:
        raise AssertionError("a connection was opened")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "empty"))


@pytest.mark.parametrize("name", sorted(name for name in shipped_recipes() if name.startswith("own-")))
def test_a_recipe_of_imported_data_needs_the_data(name: str, tmp_path: Path) -> None:
    with pytest.raises(PrerequisiteError, match=f"has no data of the name {name}: run gdro import DATA"):
        plan.describe(load_recipe(name), "train", tmp_path / "out")


@pytest.mark.parametrize("name", sorted(name for name in shipped_recipes() if not name.startswith("own-")))
def test_every_shipped_recipe_is_described_and_makes_nothing(name: str, tmp_path: Path) -> None:
    out = tmp_path / "out"
    rows = dict(plan.describe(load_recipe(name), "train", out))
    assert {"memory, training", "adapter", "operations", "GPU hours"} <= rows.keys()
    assert ("weights" in rows) == name.startswith(("flux-", "sd35-"))
    scorer = next((reward for reward in ("geneval", "pickscore") if name.endswith(f"-{reward}")), None)
    scoring = rows.get("memory, scoring")
    assert (scoring is None) if scorer is None else (f"reward {scorer} also take the GPU" in str(scoring))
    evaluated = dict(plan.describe(load_recipe(name), "eval", out))
    assert {"held-out prompts", "memory, sampling", "GPU hours"} <= evaluated.keys()
    assert not out.exists()


@pytest.mark.parametrize("name", REAL)
def test_recipes_of_real_models_follow_the_paper(name: str) -> None:
    recipe = load_recipe(name)
    method, train, lora = recipe.group_method, recipe.train, recipe.train.lora
    assert published_name(recipe.model.path) is not None
    assert (method.name, method.k, recipe.resolved()["method"]["tau"]) == ("gdro", 6, 0.05)
    settings = {"ocr": (12, 0.5, 300), "geneval": (6, 1, 700)}[recipe.reward.kind]
    assert (method.beta, method.gamma, train.steps) == settings
    assert (train.lr, lora.rank, train.ema.rate, train.ema.max_decay) == (3e-4, 32, 0.001, 0.5)
    assert abs(train.groups_per_step - 512 / method.k) < 4 and train.groups_per_step % 8 == 0
    assert (recipe.sample.images_per_prompt, recipe.sample.height, recipe.sample.width) == (16, 512, 512)
    assert recipe.sample.guidance == (3.5 if name.startswith("flux") else 4.5)


@pytest.mark.parametrize("name", REAL)
def test_headers_describe_other_machines(name: str) -> None:
    """Every change in a header is valid, and the file says that it was never run."""
    text = shipped_recipes()[name].read_text(encoding="utf-8")
    assert "Never run:" in text and "not measured" in text and "not ours" in text
    header = text.split("\n\n")[0].replace("\n#  ", " ").replace("\n# ", "\n")
    lines = [line for line in header.splitlines() if "--set" in line and ".txt" not in line and ".jsonl" not in line]
    assert len(lines) >= 3
    for line in lines:
        words = line.replace("HOST:PORT", "h:1").split()
        changes = [words[i + 1].rstrip(",;") for i, word in enumerate(words) if word == "--set"]
        if "model.path=FOLDER" not in changes:
            load_recipe(name, overrides=changes)


@pytest.mark.parametrize("name", REAL)
def test_sampling_names_what_to_download(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One sentence: accept the licence, fetch, or name a folder."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    recipe = load_recipe(name)
    with pytest.raises(PrerequisiteError) as caught:
        sample.run(Session(recipe, tmp_path, Reporter(quiet=True)))
    message = str(caught.value)
    assert f"accept its licence at https://huggingface.co/{recipe.model.path}" in message
    assert f"`hf download {recipe.model.path}`" in message and "set model.path=FOLDER" in message
    assert "\n" not in message


def test_an_estimate_adds_up() -> None:
    """The parts follow from the counts by the pure functions; quantisation and offload change only their own parts."""
    recipe = load_recipe("sd35-ocr")
    estimate = Estimate(recipe)
    transformer = estimate.model.transformer
    assert estimate.transformer_bytes == weight_bytes(transformer, width=2)
    assert 4.9e9 < estimate.transformer_bytes < 5.0e9
    assert estimate.adapter == adapter_bytes(18776064)
    weights = estimate.transformer_bytes + estimate.adapter.total
    assert estimate.training_bytes == max(
        weights + estimate.batch_bytes + estimate.update().peak + estimate.vae_bytes, weights + estimate.text_bytes
    )
    latents, noise = 88 * 6 * 16 * 64 * 64 * 4, 88 * 16 * 64 * 64 * 4  # a noise per group
    assert estimate.batch_bytes == 88 * estimate.text_per_prompt + latents + noise
    nft = Estimate(load_recipe("sd35-ocr", overrides=["method.name=nft"]))
    assert nft.batch_bytes == estimate.batch_bytes + latents  # the reference's velocities
    online = Estimate(load_recipe("sd35-ocr", overrides=["method.name=flow-grpo", "train.gradient_checkpointing=true"]))
    images, states = 48 * 24, 11  # ten noise levels and the finished latents
    assert online.batch_bytes == images * (online.text_per_prompt + states * 16 * 64 * 64 * 4)
    parts = estimate.text_bytes + estimate.transformer_bytes + estimate.vae_bytes
    assert estimate.sampling_bytes == parts + estimate.at_work
    assert estimate.passes == 2 and not estimate.two_pass and estimate.images_at_once == 12  # two groups of 6

    update, images = estimate.update(), estimate.images_at_once
    step = group_step_flops(
        images=528,
        reference=estimate.reference_flops,
        policy=update.forward / images,
        update=update.flops / images,
        two_pass=False,
    )
    assert estimate.step_flops == step
    split = Estimate(load_recipe("sd35-ocr", overrides=["train.micro_batch=4"]))
    assert split.two_pass and split.images_at_once == 4 and split.step_flops > 1.1 * step
    half = Estimate(load_recipe("sd35-ocr", overrides=["train.gradient_checkpointing=0.5"])).update()
    without = estimate.update(checkpointing=0)
    assert update.kept < half.kept < without.kept
    assert without.flops < half.flops < update.flops
    assert estimate.store_flops(10) > 160 * 40 * 2 * estimate.reference_flops

    smaller = Estimate(load_recipe("sd35-ocr", overrides=["model.quantization=nf4", "model.offload=true"]))
    assert smaller.transformer_bytes < 0.35 * estimate.transformer_bytes
    assert smaller.sampling_bytes == smaller.text_bytes + smaller.at_work  # the text encoders are the largest part
    assert smaller.update().kept == update.kept and smaller.update().peak > update.peak  # what it unpacks


def test_the_largest_micro_batch_that_fits_is_chosen() -> None:
    """Never one that does not fit, and the next larger one does not fit."""
    recipe = load_recipe("sd35-ocr", overrides=["train.micro_batch=auto", "model.quantization=fp8"])
    estimate = Estimate(recipe)
    sizes = micro_batches(recipe, 1)
    chosen = {card: estimate.largest_micro_batch(usable_bytes(card)) for card in CARDS}
    assert None not in chosen.values() and len(set(chosen.values())) == 3
    for card, size in chosen.items():
        larger = sizes[sizes.index(size) + 1]
        needed = [Estimate(with_micro_batch(recipe, one)).training_bytes for one in (size, larger)]
        assert needed[0] <= usable_bytes(card) < needed[1], (card, size, needed)
    beside = estimate.transformer_bytes + estimate.adapter.total
    assert estimate.largest_micro_batch(beside) is None
    assert estimate.largest_micro_batch(1e15) == sizes[-1] == 528
    online = Estimate(load_recipe("ocr-flow-grpo", overrides=["train.micro_batch=auto"]))
    assert online.largest_micro_batch(1e15) == online.images_at_once


def test_a_dry_run_shows_what_auto_would_take(tmp_path: Path) -> None:
    """The shipped numbers of FLUX are what it takes on 80 GB; with auto the page describes that card."""
    rows = [
        dict(plan.describe(load_recipe("flux-ocr", overrides=overrides), "train", tmp_path))
        for overrides in ([], ["train.micro_batch=auto"])
    ]
    label = "train.micro_batch=auto"
    assert rows[0][label] == rows[1][label] == "would take 2 images on a card of 48 GB, 6 images on a card of 80 GB"
    assert rows[0]["memory, training"] == rows[1]["memory, training"]
    assert rows[1]["step"].endswith("in micro-batches of 6")


def test_online_estimates_count_rollouts_and_updates() -> None:
    estimate = Estimate(load_recipe("ocr-flow-grpo"))
    rollouts, updates = estimate.online_flops
    assert 0 < rollouts < updates
    with pytest.raises(TypeError, match="gdro is not an online method"):
        _ = Estimate(load_recipe("ocr")).online_flops


def test_numbers_in_words() -> None:
    """125 TFLOP/s for an hour are 4.5e17 operations."""
    assert [hours(4.5e17 * n) for n in (0.01, 0.52, 23.4)] == ["under 0.1", "0.5", "23"]
    assert cards(20e9) == "fits cards of 24, 48, 80 GB" and cards(90e9) == "too much for a card of 80 GB"
    assert [gigabytes(size) for size in (23.84e9, 0.244e9, 0.0234e9)] == ["23.8", "0.24", "0.023"]
