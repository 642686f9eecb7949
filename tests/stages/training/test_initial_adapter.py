"""A training that starts from an adapter: its images, its reference, its saved file, and its name."""

from __future__ import annotations

import importlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from gdro_cli.config.recipe import Recipe
from gdro_cli.config.sweep import plan_sweep
from gdro_cli.data.records import PromptRecord
from gdro_cli.data.store import GroupStore
from gdro_cli.embedded import tiny_model_path
from gdro_cli.errors import GdroError, PrerequisiteError, UserError
from gdro_cli.models.adapters import LORA_FILE
from gdro_cli.runtime.checkpoint import latest_checkpoint, load_checkpoint
from gdro_cli.runtime.metrics import train_rows
from gdro_cli.runtime.progress import Reporter
from gdro_cli.runtime.run import RunFolder
from gdro_cli.stages.ablation import ablate
from gdro_cli.stages.evaluation import evaluate
from gdro_cli.stages.exporting import export
from gdro_cli.stages.planning import dry_run as plan
from gdro_cli.stages.runs.identity import run_path
from gdro_cli.stages.setup.session import Session
from gdro_cli.stages.setup.store import evaluation_plan, open_store, open_training_store, stores_folder, training_plan
from gdro_cli.stages.training import train
from tests.support.shared import shared

from .test_two_processes import carried_out, same_stores, same_training

pytestmark = pytest.mark.slow

MakeRecipe = Callable[..., Recipe]
Started = tuple[Path, Path, Path]
"""The folder of the first run, and a workspace with the run that started from it."""


def starting(make: MakeRecipe, first: Path, **train: Any) -> Recipe:
    """A small recipe that starts from a run; its own adapter has other layers, another rank and another scale."""
    lora = {"init": str(first), "rank": 2, "alpha": 5, "targets": ["attn.to_q", "attn.to_v"]}
    return make(train={"lr": 0.01, "lora": lora, **train})


@pytest.fixture(scope="module")
def started(
    make_recipe: MakeRecipe, make_run: Callable[..., Path], quiet: Reporter, tmp_path_factory: pytest.TempPathFactory
) -> Started:
    def job(folder: Path) -> Started:
        first = make_run(folder / "first")
        recipe = starting(make_recipe, first)
        trained = train.run(Session(recipe, folder / "out", quiet))
        evaluate.run(Session(recipe, folder / "out", quiet))
        return first, folder / "out", trained.run.path

    return shared(tmp_path_factory, "started-from-an-adapter", job)


def drawn(prompt: PromptRecord, seed: int, *, lora: Path | None = None, folder: Path | None = None) -> Any:
    """The image of diffusers' own pipeline."""
    from diffusers import FluxPipeline

    importlib.import_module("gdro_cli.tiny.autoencoder")  # where diffusers looks for the class
    pipe = FluxPipeline.from_pretrained(folder or tiny_model_path(), dtype=torch.float32, local_files_only=True)
    pipe.set_progress_bar_config(disable=True)
    if lora is not None:
        pipe.load_lora_weights(lora)
    options = {"num_inference_steps": 3, "height": 64, "width": 64, "max_sequence_length": 26}
    image = pipe(prompt.prompt, generator=torch.Generator().manual_seed(seed), **options).images[0]
    return np.asarray(image).astype(int)


def pixels(path: Path) -> Any:
    with Image.open(path) as image:
        return np.asarray(image).astype(int)


def test_stores_and_both_columns_of_the_evaluation_are_what_diffusers_draws(
    started: Started, make_recipe: MakeRecipe, tmp_path: Path, quiet: Reporter
) -> None:
    first, workspace, run = started
    session = Session(starting(make_recipe, first), workspace)
    training, of_training = open_training_store(session), training_plan(session)
    of_evaluation = evaluation_plan(session, images_per_prompt=2)
    base = open_store(session, stores_folder(workspace), of_evaluation, session.prompts("eval"))
    (trained,) = map(GroupStore.open, (run / "evaluations").glob("flux-*"))
    images = []
    for store, its_plan, lora in (
        (training, of_training, first),
        (base, of_evaluation, first),
        (trained, of_evaluation, run),
    ):
        image = next(iter(store.images(0)))
        seed = its_plan.image_seed(image.prompt.id, image.index)
        assert np.abs(pixels(image.path) - drawn(image.prompt, seed, lora=lora)).max() <= 1
        assert np.abs(pixels(image.path) - drawn(image.prompt, seed)).max() > 10
        images.append(pixels(image.path))
    assert np.abs(images[1] - images[2]).max() > 10
    export.run(export.Export(run.name, adapter=tmp_path / "lora", merge=tmp_path / "merged"), workspace, quiet)
    for others in (
        drawn(image.prompt, seed, lora=tmp_path / "lora"),
        drawn(image.prompt, seed, folder=tmp_path / "merged"),
    ):
        assert np.abs(images[2] - others).max() <= 1


def test_the_card_and_the_report_say_what_the_base_is(started: Started) -> None:
    first, _, run = started
    digest = json.loads((run / "adapter.json").read_text())["model"]["adapter"]
    card = (run / "README.md").read_text()
    assert "started from the adapter first, which this one contains" in card and digest in card
    assert str(first.parent) not in card
    assert "Base: the base model with the adapter first" in (run / "report.html").read_text()


def test_the_first_step_starts_from_the_reference(started: Started) -> None:
    steps = [row.to_json() for row in train_rows(RunFolder(started[2]).metrics())]
    assert steps[0]["s_rank_1"] == 0 and abs(steps[3]["s_rank_1"]) > 0


def test_a_continued_run_has_the_same_bits(
    started: Started, make_recipe: MakeRecipe, tmp_path: Path, quiet: Reporter
) -> None:
    first, workspace, run = started
    copy = shutil.copytree(workspace, tmp_path / "out") / "runs" / run.name
    for step in ("step-000003", "step-000004"):
        shutil.rmtree(copy / "checkpoints" / step)
    again = train.run(Session(starting(make_recipe, first), tmp_path / "out", quiet))
    assert (again.run.path, again.resumed_from) == (copy, 2)
    straight, resumed = (load_checkpoint(latest_checkpoint(path)) for path in (run, copy))  # type: ignore[arg-type]
    assert all(
        torch.equal(value, resumed.tensors["adapter"][key]) for key, value in straight.tensors["adapter"].items()
    )
    assert {key.split(".lora_")[0].split(".", 2)[2] for key in straight.tensors["adapter"]} == {
        "attn.to_q",
        "attn.to_v",
    }
    assert (copy / LORA_FILE).read_bytes() == (run / LORA_FILE).read_bytes()


def test_a_run_without_checkpoints_is_evaluated_from_its_file(
    started: Started, make_recipe: MakeRecipe, tmp_path: Path, quiet: Reporter
) -> None:
    first, workspace, run = started
    copy = shutil.copytree(workspace, tmp_path / "out") / "runs" / run.name
    for part in ("checkpoints", "best"):
        shutil.rmtree(copy / part)
    results = json.loads((run / "results.json").read_text())
    again = evaluate.run(Session(starting(make_recipe, first), tmp_path / "out", quiet), path=copy).results.to_json()
    for side in ("base", "trained"):
        mean = again["measures"]["corrected"][side]["mean"]
        assert mean == pytest.approx(results["measures"]["corrected"][side]["mean"], abs=0.02)
    stores = [GroupStore.open(path) for path in sorted((copy / "evaluations").glob("flux-*"))]
    assert len(stores) == 2
    one, other = ([pixels(image.path) for image in store.images(0)] for store in stores)
    assert max(np.abs(a - b).max() for a, b in zip(one, other, strict=True)) <= 1


def test_another_file_at_the_same_path_is_another_start(
    started: Started, make_recipe: MakeRecipe, make_online: MakeRecipe, tmp_path: Path, quiet: Reporter
) -> None:
    first, workspace, run = started
    moved = shutil.copytree(first, tmp_path / "first")
    out = shutil.copytree(workspace, tmp_path / "out")

    def names(first: Path, make: MakeRecipe) -> tuple[str, str]:
        session = Session(starting(make, first), out)
        online = session.recipe.online_method is not None
        return run_path(session).name, "" if online else open_training_store(session).path.name

    assert names(first, make_recipe)[0] == run.name
    before, online = names(moved, make_recipe), names(moved, make_online)
    assert before[1] == names(first, make_recipe)[1]  # the same images, whatever the path
    make_file(moved / LORA_FILE, load_file(first / LORA_FILE), scale=0.5)
    assert all(one != other for one, other in zip(names(moved, make_recipe), before, strict=True))
    assert names(moved, make_online)[0] != online[0]
    changed = Session(starting(make_recipe, moved), out, quiet)
    refused(
        PrerequisiteError, "did not start from the adapter", lambda: evaluate.run(changed, path=out / "runs" / run.name)
    )
    without = Session(make_recipe(), out, quiet)
    refused(
        PrerequisiteError, "did not start from the adapter", lambda: evaluate.run(without, path=out / "runs" / run.name)
    )


def make_file(path: Path, tensors: dict[str, torch.Tensor], *, scale: float) -> None:
    from safetensors import safe_open
    from safetensors.torch import save_file

    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    path.unlink()
    save_file({name: scale * value for name, value in tensors.items()}, path, metadata=metadata)


def refused(error: type[GdroError], words: str, call: Callable[[], object]) -> None:
    with pytest.raises(error, match=words):
        call()


def test_a_bad_adapter_is_refused_before_any_image_is_drawn(
    make_recipe: MakeRecipe, make_run: Callable[..., Path], tmp_path: Path, quiet: Reporter
) -> None:
    first = make_run(tmp_path / "first")
    tensors = load_file(first / LORA_FILE)
    make_file(
        first / LORA_FILE, {name.replace("proj_out", "proj_in"): value for name, value in tensors.items()}, scale=1
    )
    for path, error, words in (
        (first, UserError, "no such linear layer"),
        (tmp_path / "x", PrerequisiteError, "train.lora.init: there is no adapter"),
    ):
        recipe = starting(make_recipe, path)
        refused(error, words, lambda recipe=recipe: train.run(Session(recipe, tmp_path / "out", quiet)))  # type: ignore[misc]
        refused(error, words, lambda recipe=recipe: plan.describe(recipe, "train", tmp_path / "out"))  # type: ignore[misc]
    assert not (tmp_path / "out" / "stores").exists()


def test_the_plan_counts_it(started: Started, make_recipe: MakeRecipe) -> None:
    first, workspace, _ = started
    rows = dict(plan.describe(starting(make_recipe, first), "train", workspace))
    assert rows["starts from"].startswith(f"{first}, ")
    lora = {"rank": 2, "alpha": 5, "targets": ["attn.to_q", "attn.to_v"]}
    estimates = [plan.Estimate(recipe) for recipe in (starting(make_recipe, first), make_recipe(train={"lora": lora}))]
    size = sum(value.numel() for value in load_file(first / LORA_FILE).values())
    assert estimates[0].training_bytes - estimates[1].training_bytes == 4 * size
    assert estimates[0].sampling_bytes - estimates[1].sampling_bytes == 4 * size


@pytest.mark.parametrize("sharding", ["none", "fsdp"])
def test_two_processes_train_like_one(sharding: str, started: Started, make_recipe: MakeRecipe, tmp_path: Path) -> None:
    first, workspace, run = started
    recipe = starting(make_recipe, first)
    recipe = recipe.model_copy(update={"model": recipe.model.model_copy(update={"sharding": sharding})})
    carried_out("train", recipe, tmp_path / "out")
    same_stores(tmp_path / "out" / "stores", workspace / "stores", exact=False)
    same_training(tmp_path / "out" / "runs" / run.name, run)


def test_the_kl_of_an_online_method_begins_at_the_adapter(
    started: Started, make_online: MakeRecipe, tmp_path: Path, quiet: Reporter
) -> None:
    recipe = starting(make_online, started[0], eval_every=0)
    recipe = recipe.model_copy(update={"method": recipe.method.model_copy(update={"beta_kl": 0.1})})
    rows = train.run(Session(recipe, tmp_path, quiet)).run.metrics()
    kl = [row.to_json()["kl"] for row in train_rows(rows)]
    assert kl[0] == 0 and kl[-1] > 0


def test_an_ablation_draws_the_base_with_the_adapter(
    started: Started, make_recipe: MakeRecipe, tmp_path: Path, quiet: Reporter
) -> None:
    """Also after the file has changed, when the report has the same name."""
    first = shutil.copytree(started[0], tmp_path / "first")
    sweep = plan_sweep(starting(make_recipe, first, steps=2, eval_every=2), ["lr"], ["0.01,0.02"])
    images: set[Path] = set()
    for _ in range(2):
        session = Session(sweep.recipe, tmp_path / "out", quiet)
        done = ablate.run(session, sweep)
        assert not done.ablation.failed
        prompt = session.prompts("validation").records[0]
        expected = drawn(prompt, evaluation_plan(session, images_per_prompt=1).image_seed(prompt.id, 0), lora=first)
        new = set((done.page.parent / "images").glob(f"*-{prompt.id}.png")) - images
        assert sorted(np.abs(pixels(path) - expected).max() > 1 for path in new) == [False, True, True]
        images |= new
        make_file(first / LORA_FILE, load_file(first / LORA_FILE), scale=0.8)
