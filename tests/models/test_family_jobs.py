"""The whole job on each family's tiny random model: sample, score, train, evaluate, and the adapter in the pipeline."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from gdro_cli.config.layers import merge_layers
from gdro_cli.config.load import build_recipe
from gdro_cli.config.recipe import Recipe
from gdro_cli.core.sde import log_prob
from gdro_cli.data.records import PromptRecord
from gdro_cli.data.scores import ScoreRow
from gdro_cli.errors import UserError
from gdro_cli.models.adapters import load_lora_state
from gdro_cli.models.base import FlowModel
from gdro_cli.runtime.progress import Reporter
from gdro_cli.stages.evaluation import evaluate
from gdro_cli.stages.exporting import export
from gdro_cli.stages.planning import dry_run as plan
from gdro_cli.stages.reporting.image_sheet import CELL, LINE, MARGIN
from gdro_cli.stages.runs.weights import applied, trained_run
from gdro_cli.stages.sampling import sample
from gdro_cli.stages.sampling.fill_store import sample_groups
from gdro_cli.stages.scoring import exchange, score
from gdro_cli.stages.setup.model import attach_adapter, open_model
from gdro_cli.stages.setup.scorers import open_reward_table
from gdro_cli.stages.setup.session import Session
from gdro_cli.stages.setup.store import evaluation_plan
from gdro_cli.stages.training import train
from gdro_cli.stages.training.rollout import Policy, RolloutImage, policy_guidance, roll_out
from tests.support.tiny_families import open_pipeline, sources

pytestmark = pytest.mark.slow

STEPS, GUIDANCE, TEXT = 2, 2.0, 64

PIPELINE_OPTIONS: dict[str, dict[str, Any]] = {
    "flux-kontext": {"guidance_scale": GUIDANCE, "max_area": 32 * 48, "_auto_resize": False},
    "sd3": {"guidance_scale": GUIDANCE},
    "qwen-image": {"true_cfg_scale": GUIDANCE, "negative_prompt": " "},
    "qwen-image-edit": {"true_cfg_scale": GUIDANCE, "negative_prompt": " "},
    "qwen-image-edit-plus": {"true_cfg_scale": GUIDANCE, "negative_prompt": " "},
    "z-image": {"guidance_scale": GUIDANCE - 1.0},
    "flux2": {"guidance_scale": GUIDANCE},
    "flux2-klein": {"guidance_scale": GUIDANCE},
    "chroma": {"guidance_scale": GUIDANCE},
    "lumina2": {"guidance_scale": GUIDANCE},
    "sana": {"guidance_scale": GUIDANCE, "use_resolution_binning": False},
    "hidream": {"guidance_scale": GUIDANCE},
}


EDITING = ("flux-kontext", "qwen-image-edit", "qwen-image-edit-plus")


def edit_prompts(folder: Path, split: str, count: int) -> dict[str, Any]:
    """A prompt file, each of whose prompts edits an image of its own, larger than those that are drawn."""
    lines = []
    for number, (image, word) in enumerate(zip(sources(count), ("ONE", "TWO"), strict=False)):
        image.resize((70, 40)).rotate(90 * number).save(folder / f"{split}-{number}.png")
        lines.append({"prompt": f'write "{word}" for {split}', "image": f"{split}-{number}.png"})
    (folder / f"{split}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return {"builtin": None, "count": None, "file": str(folder / f"{split}.jsonl")}


def recipe_of(name: str, folder: Path, workspace: Path) -> Recipe:
    """The small recipe, with images to edit if the family edits images."""
    recipe = tiny_recipe(folder)
    if name not in EDITING:
        return recipe
    counts = {"train": 2, "validation": 1, "eval": 2}
    prompts = {split: edit_prompts(workspace, split, count) for split, count in counts.items()}
    changes = {"prompts": prompts, "train": {"eval_every": 3 if name == "flux-kontext" else 0}}
    return build_recipe(merge_layers([recipe.resolved(), changes]))


def tiny_recipe(folder: Path) -> Recipe:
    return build_recipe(
        {
            "name": "tiny-family",
            "model": {"path": str(folder), "max_sequence_length": TEXT},
            "prompts": {
                "train": {"builtin": "ocr-train", "count": 2},
                "validation": {"builtin": "ocr-validation", "count": 1},
                "eval": {"builtin": "ocr-test", "count": 2},
            },
            "sample": {
                "images_per_prompt": 2,
                "steps": STEPS,
                "guidance": GUIDANCE,
                "height": 32,
                "width": 48,
                "prompts_per_shard": 2,
            },
            "reward": {"workers": 1},
            "method": {"name": "gdro", "k": 2},
            "train": {
                "steps": 3,
                "groups_per_step": 2,
                "micro_batch": 1,
                "lr": 0.01,
                "eval_every": 0,
                "lora": {"rank": 2, "alpha": 4, "targets": "auto"},
            },
            "eval": {"images_per_prompt": 1, "bootstrap": 100, "grid_prompts": 1, "weights": "raw"},
        }
    )


def give_order(recipe: Recipe, sampled: sample.SampleResult) -> None:
    """Score the second image of each pair higher: the OCR reads nothing in noise, and equal scores teach nothing."""
    table = open_reward_table(Session(recipe, Path("unused")), sampled.store)
    for number in range(len(sampled.store.shards)):
        images = sampled.store.images(number)
        table.write_shard(number, [ScoreRow(i.prompt.id, i.index, 0.5 * i.index, None, {}) for i in images])


def check_that_sources_are_shown(recipe: Recipe, evaluated: evaluate.EvalResult, workspace: Path) -> None:
    """In the sheets, in the report, in the card's code and in the list of images for other programs."""
    assert evaluated.grid is not None
    point = evaluated.run / "validation" / "step-000003.png"
    for sheet, rows in ((evaluated.grid, 3), *([(point, 2)] if recipe.train.eval_every else [])):
        with Image.open(sheet) as image:
            assert image.height == 2 * LINE + MARGIN + rows * (CELL + 2 * LINE + MARGIN)
            shown = image.crop((60, 2 * LINE + MARGIN, 60 + CELL, 2 * LINE + MARGIN + CELL))
        prompt = Session(recipe, workspace).prompts("eval" if rows == 3 else "validation").records[0]
        assert prompt.source is not None
        assert shown.tobytes() == prompt.source.resize((CELL, CELL), Image.Resampling.NEAREST).tobytes()
    judged = Session(build_recipe(merge_layers([recipe.resolved(), {"judge": {"kind": "embedded"}}])), workspace)
    assert judged.judge is not None and judged.judge.version["axes"] == ["coherence", "style"]
    page = evaluated.page.read_text(encoding="utf-8")
    assert page.index('alt="the image to edit: ') < page.index('alt="base model') < page.index('alt="trained model')
    card = (evaluated.run / "README.md").read_text(encoding="utf-8")
    assert (
        "source = ImageOps.fit(Image.open('image.png').convert('RGB'), (48, 32), " in card and "pipe(source, '" in card
    )
    assert ("calculate_dimensions = lambda area, ratio: (48, 32, None)" in card) == ("QwenImageEditPipeline" in card)
    assert ("own(area, ratio) if area == edit_plus.CONDITION_IMAGE_SIZE else (48, 32) " in card) == ("EditPlus" in card)
    assert "pipeline_tag: image-to-image" in card
    exchange.export_images(Session(recipe, workspace, Reporter(quiet=True)), workspace / "images.jsonl")
    lines = [json.loads(line) for line in (workspace / "images.jsonl").read_text().splitlines()]
    assert len({line["source"] for line in lines}) == 2 and all(Path(line["source"]).is_file() for line in lines)


def pipeline_image(folder: Path, name: str, run: Path | None, prompt: PromptRecord, seed: int) -> np.ndarray[Any, Any]:
    pipe = open_pipeline(folder, dtype=torch.float32)
    if run is not None:
        pipe.load_lora_weights(run)
    generator = torch.Generator().manual_seed(seed)
    options = {"num_inference_steps": STEPS, "max_sequence_length": TEXT, "height": 32, "width": 48}
    edited = {} if prompt.source is None else {"image": prompt.source}
    given: dict[str, Any] = {"prompt": prompt.prompt, **edited, **options, **PIPELINE_OPTIONS[name]}
    image = pipe(generator=generator, **given).images[0]
    return np.asarray(image).astype(int)


@pytest.mark.parametrize("name", list(PIPELINE_OPTIONS))
def test_job_from_sampling_to_the_adapter_in_the_pipeline(
    name: str, family_folder: Callable[[str], Path], tmp_path: Path
) -> None:
    folder, quiet = family_folder(name), Reporter(quiet=True)
    recipe = recipe_of(name, folder, tmp_path)
    rows = dict(plan.describe(recipe, "train", tmp_path))
    embedded = name in ("flux2", "flux-kontext")
    assert rows["model"].startswith(f"{folder} ({name})")
    assert ("2 passes each" in rows["forward passes"]) != embedded
    kind = "an input of the model" if embedded else "classifier-free, in sampling only"
    assert rows["guidance"].startswith(f"2, {kind}")
    give_order(recipe, sample.run(Session(recipe, tmp_path, quiet)))
    assert score.run(Session(recipe, tmp_path, quiet)).shards_made == 0
    trained = train.run(Session(recipe, tmp_path, quiet))
    losses = [row["loss"] for row in trained.run.metrics() if row["kind"] == "train"]
    assert len(losses) == 3 and np.isfinite(losses).all() and losses[0] != losses[2]
    evaluated = evaluate.run(Session(recipe, tmp_path, quiet))  # with the real OCR
    assert next(iter(evaluated.results.measures.values())).trained.images == 2

    if name in EDITING:
        check_that_sources_are_shown(recipe, evaluated, tmp_path)

    session = Session(recipe, tmp_path)
    model: FlowModel = session.model
    prompt = session.prompts("eval").records[0]
    _, weights = trained_run(session)
    with applied(session, weights):
        load_lora_state(model, weights.adapter)
        (group,) = sample_groups(model, (prompt,), evaluation_plan(session, images_per_prompt=1), batch_size=1)
    base, adapted = (
        pipeline_image(folder, name, run, prompt, group.origins[0]["seed"]) for run in (None, trained.run.path)
    )
    assert np.abs(adapted - np.asarray(group.images[0])).max() <= 1
    assert np.abs(adapted - base).max() > 1

    called = {"num_inference_steps": STEPS, "max_sequence_length": TEXT, "height": 32, "width": 48}
    call = model.pipeline_call(steps=STEPS, guidance=GUIDANCE, height=32, width=48)
    assert call == {**called, **PIPELINE_OPTIONS[name]}
    card = (trained.run.path / "README.md").read_text()
    assert f"LoRA adapter for the model {folder.name}" in card and "$height" not in card
    export.run(export.Export(trained.run.path.name, merge=tmp_path / "merged"), tmp_path, quiet)
    merged = pipeline_image(tmp_path / "merged", name, None, prompt, group.origins[0]["seed"])
    assert np.abs(merged - adapted).max() <= 1


def test_a_schedule_without_noise_levels_ends_the_job_before_a_network_is_loaded(
    family_folder: Callable[[str], Path], tmp_path: Path
) -> None:
    recipe = build_recipe(merge_layers([tiny_recipe(family_folder("qwen-image")).resolved(), {"sample": {"steps": 1}}]))
    session = Session(recipe, tmp_path)
    with pytest.raises(UserError, match="no noise levels for 1 sampling step"):
        sample.run(session)
    assert set(session.model._loaded) == {"scheduler"}


@pytest.mark.parametrize("name", [name for name in PIPELINE_OPTIONS if name not in ("flux2", *EDITING)])
def test_online_steps_are_those_of_sampling_with_both_passes_and_have_a_gradient(
    name: str, family_folder: Callable[[str], Path]
) -> None:
    online = {"method": {"name": "flow-grpo", "train_sample_steps": 3}, "model": {"max_sequence_length": 256}}
    recipe = build_recipe(merge_layers([tiny_recipe(family_folder(name)).resolved(), online]))
    method = recipe.online_method
    assert method is not None
    model = open_model(recipe)
    guidance = policy_guidance(recipe, method)
    assert guidance == GUIDANCE
    assert "classifier-free, in rounds and updates" in dict(plan.describe(recipe, "train", Path("out")))["guidance"]
    parameters = attach_adapter(recipe, model)
    policy = Policy(model, method, guidance, (32, 48))
    names = [RolloutImage(prompt, 0, 0) for prompt in Session(recipe, Path()).prompts("train").records]
    text = model.encode([name.prompt.prompt for name in names])
    rollout = roll_out(policy, names, text, seed=1)
    batched, steps = model.batch_conditioning(text), torch.tensor([0, 1])
    chosen = torch.arange(2), steps
    step = policy.step(rollout.states[chosen], steps, batched)
    after = rollout.states[torch.arange(2), steps + 1]
    torch.testing.assert_close(log_prob(after, step), rollout.log_probs[chosen])
    log_prob(after, step).sum().backward()
    assert any(parameter.grad is not None and parameter.grad.abs().max() > 0 for parameter in parameters)
    single = Policy(model, method, 1.0, (32, 48)).step(rollout.states[chosen], steps, batched)
    assert (single.mean - step.mean).abs().max() > 1e-4
