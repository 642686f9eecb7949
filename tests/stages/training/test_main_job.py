"""The whole job on the embedded model: sample, score, train, evaluate, with the real OCR."""

from __future__ import annotations

import gc
import io
import json
import math
import shutil
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import FluxPipeline
from PIL import Image
from rich.console import Console
from torch import Tensor

from gdro_cli.config.recipe import Recipe
from gdro_cli.core.losses import group_loss
from gdro_cli.data.dataset import GroupDataset
from gdro_cli.data.scores import ScoreRow
from gdro_cli.embedded import tiny_model_path
from gdro_cli.errors import Interrupted, PrerequisiteError, StoreError, UserError
from gdro_cli.models.adapters import LORA_FILE
from gdro_cli.runtime.checkpoint import latest_checkpoint, load_checkpoint
from gdro_cli.runtime.interrupt import StopFlag
from gdro_cli.runtime.metrics import MetricsRow
from gdro_cli.runtime.progress import Reporter
from gdro_cli.stages.evaluation import evaluate
from gdro_cli.stages.planning import dry_run as plan
from gdro_cli.stages.runs.identity import run_path
from gdro_cli.stages.runs.weights import applied, trained_run
from gdro_cli.stages.sampling import sample
from gdro_cli.stages.sampling.fill_store import fill_store, sample_groups
from gdro_cli.stages.scoring import score
from gdro_cli.stages.scoring.score import make_scored_store
from gdro_cli.stages.setup.scorers import open_reward_table
from gdro_cli.stages.setup.session import Session
from gdro_cli.stages.setup.store import evaluation_plan, open_training_store, training_plan
from gdro_cli.stages.training import train
from gdro_cli.stages.training.group_gradient import GroupGradient
from gdro_cli.stages.training.offline import GroupSteps
from tests.support.rows import timeless

pytestmark = pytest.mark.slow

Finished = tuple[Path, train.TrainResult, evaluate.EvalResult]
MakeRecipe = Callable[..., Recipe]


def test_the_files_of_a_whole_job(finished: Finished) -> None:
    workspace, trained, evaluated = finished
    images = sorted(len(list(store.glob("shards/*/images/*.png"))) for store in (workspace / "stores").iterdir())
    assert images == [8, 16]  # the base model's evaluation, and the training groups
    run = trained.run.path
    assert {"recipe.json", "environment.json", "manifest.json", "metrics.jsonl", "results.json"} <= {
        path.name for path in run.iterdir()
    }
    assert (run / "pytorch_lora_weights.safetensors").is_file()
    kinds = [(row["kind"], row["step"]) for row in trained.run.metrics()]
    assert kinds == [("validation", 0), *(("train", step) for step in (1, 2, 3, 4)), ("validation", 4)]
    assert evaluated.grid is not None
    card = (run / "README.md").read_text()
    assert f"({evaluated.grid.relative_to(run)})" in card and f"# {run.name}" in card  # the evaluation writes it again
    with Image.open(evaluated.grid) as grid:
        assert grid.width > 2 * 160


def test_results_have_intervals_protocol_and_every_image(finished: Finished) -> None:
    _, _, evaluated = finished
    results = json.loads(evaluated.file.read_text())
    assert results["measures"]["reward"]["base"]["images"] == 8
    assert results["measures"]["reward"]["base"]["prompts"] == 4
    assert results["protocol"]["seed"] == 1000
    assert (results["weights"]["kind"], results["weights"]["step"]) == ("ema", 4)
    assert (evaluated.run / results["grid"]).is_file()
    assert results["protocol"]["reward"]["reward"] == "ocr"
    assert len(results["images"]["trained"]) == 8
    mean = sum(row["value"] for row in results["images"]["base"]) / 8
    assert results["measures"]["reward"]["base"]["mean"] == pytest.approx(mean)


def test_a_second_call_reuses_everything(
    finished: Finished, make_recipe: MakeRecipe, quiet: Reporter, tmp_path: Path
) -> None:
    _, trained, evaluated = finished
    workspace = shutil.copytree(finished[0], tmp_path / "out")
    before = {path: path.stat().st_mtime_ns for path in workspace.glob("stores/*/shards/**/*")}
    again = train.run(Session(make_recipe(), workspace, quiet))
    assert (again.run.path.name, again.resumed_from) == (trained.run.path.name, 4)
    assert evaluate.run(Session(make_recipe(), workspace, quiet)).results.measures == evaluated.results.measures
    assert before == {path: path.stat().st_mtime_ns for path in workspace.glob("stores/*/shards/**/*")}


@pytest.mark.parametrize(
    ("objective", "reward"),
    [
        ("confident", lambda row: row.value * (row.details["confidence"] or 0.0)),
        ("exact", lambda row: float(row.details["exact"])),
        ({"accuracy": 1, "similarity": 3}, lambda row: (row.value + 3 * row.details["similarity"]) / 4),
    ],
    ids=["confident", "exact", "mean"],
)
def test_another_objective_is_trained_on_without_new_scores(
    objective: str | dict[str, float],
    reward: Callable[[ScoreRow], float],
    finished: Finished,
    make_recipe: MakeRecipe,
    quiet: Reporter,
    tmp_path: Path,
) -> None:
    workspace = shutil.copytree(finished[0], tmp_path / "out")
    session = Session(make_recipe(reward={"ocr": {"objective": objective}}), workspace, quiet)
    assert score.run(session).shards_made == 0
    assert run_path(session).name != finished[1].run.path.name
    store = open_training_store(session)
    table = open_reward_table(session, store)
    trained_on = session.reward.trained_on
    for row in table.rows():
        assert row.measured(trained_on) == pytest.approx(reward(row), abs=1e-3)
    rewards = GroupDataset.load(store, table, k=2, detail=trained_on).rewards
    assert set(rewards.flatten().tolist()) <= {np.float32(row.measured(trained_on)) for row in table.rows()}


def test_changed_settings_get_their_own_store_or_run(
    finished: Finished, make_recipe: MakeRecipe, tmp_path: Path
) -> None:
    workspace, trained = shutil.copytree(finished[0], tmp_path / "out"), finished[1]
    same = open_training_store(Session(make_recipe(train={"lr": 1e-3}), workspace))
    other = open_training_store(Session(make_recipe(sample={"steps": 2}), workspace))
    assert same.path != other.path
    assert run_path(Session(make_recipe(), workspace)) == workspace / "runs" / trained.run.path.name
    paths = {
        run_path(Session(recipe, workspace))
        for recipe in (make_recipe(), make_recipe(train={"lr": 1e-3}), make_recipe(method={"tau": 0.1}))
    }
    assert len(paths) == 3
    shown = make_recipe(
        eval={"bootstrap": 200}, train={"keep_checkpoints": 2}, sample={"batch_size": 3, "prompts_per_shard": 1}
    )
    assert run_path(Session(shown, workspace)) == workspace / "runs" / trained.run.path.name


def test_more_steps_than_a_finished_run_begin_anew_and_say_so(
    finished: Finished, make_recipe: MakeRecipe, tmp_path: Path
) -> None:
    shutil.copytree(finished[0], tmp_path, dirs_exist_ok=True)
    console = Console(file=io.StringIO(), width=1000)
    result = train.run(Session(make_recipe(train={"steps": 5}), tmp_path, Reporter(console)))
    said = console.file.getvalue()  # type: ignore[attr-defined]
    sentence = f"{finished[1].run.path.name} is a finished run of this recipe with train.steps 4; another number"
    assert (result.resumed_from, said.count(sentence)) == (0, 1)
    again = Console(file=io.StringIO(), width=1000)
    train.run(Session(make_recipe(train={"lr": 0.002, "steps": 1}), tmp_path, Reporter(again)))
    assert "is a finished run" not in again.file.getvalue()  # type: ignore[attr-defined]


def test_images_do_not_depend_on_batches_and_shards(
    finished: Finished, make_recipe: MakeRecipe, tmp_path: Path
) -> None:
    """Batches of 3 and shards of one prompt against batches of 32 and shards of two."""
    workspace, _, _ = finished
    recipe = make_recipe(sample={"batch_size": 3, "prompts_per_shard": 1})
    first = open_training_store(Session(recipe, workspace))
    second = sample.run(Session(recipe, tmp_path, Reporter(quiet=True))).store
    assert second.identity == first.identity
    images = [image for number in range(len(first.shards)) for image in first.images(number)]
    others = [image for number in range(len(second.shards)) for image in second.images(number)]
    for one, other in zip(images, others, strict=True):
        assert (one.prompt.id, one.index) == (other.prompt.id, other.index)
        with Image.open(one.path) as left, Image.open(other.path) as right:
            assert np.abs(np.asarray(left).astype(int) - np.asarray(right)).max() <= 1
    for number in range(len(first.shards)):
        for position, group in enumerate(first.read_shard(number)):
            (again,) = second.read_shard(2 * number + position)
            torch.testing.assert_close(group.latents, again.latents, rtol=1e-4, atol=1e-4)


def test_resumed_training_equals_straight_training(finished: Finished, make_recipe: MakeRecipe, tmp_path: Path) -> None:
    """A run that has lost its last two checkpoints continues from step 2 and ends with the same bits."""
    workspace, trained, _ = finished
    shutil.copytree(workspace, tmp_path, dirs_exist_ok=True)
    copy = tmp_path / "runs" / trained.run.path.name
    for step in ("step-000003", "step-000004"):
        shutil.rmtree(copy / "checkpoints" / step)
    again = train.run(Session(make_recipe(), tmp_path, Reporter(quiet=True)))
    assert again.resumed_from == 2
    checkpoints = [load_checkpoint(latest_checkpoint(path)) for path in (trained.run.path, copy)]  # type: ignore[arg-type]
    for name, tensors in checkpoints[0].tensors.items():
        for key, value in tensors.items():
            assert torch.equal(value, checkpoints[1].tensors[name][key]), (name, key)

    def numbers(rows: list[MetricsRow]) -> list[dict[str, object]]:
        return [timeless(row.to_json()) for row in rows]

    assert numbers(again.run.metrics()) == numbers(trained.run.metrics())


def test_a_run_that_ran_out_of_memory_continues_with_smaller_batches(
    finished: Finished, make_recipe: MakeRecipe, tmp_path: Path
) -> None:
    """The second half with the settings that the message about memory advises: the same run, the same adapter."""
    workspace, trained, _ = finished
    shutil.copytree(workspace, tmp_path, dirs_exist_ok=True)
    copy = tmp_path / "runs" / trained.run.path.name
    for step in ("step-000003", "step-000004"):
        shutil.rmtree(copy / "checkpoints" / step)
    recipe = make_recipe(train={"micro_batch": 1, "group_gradient": "two_pass", "gradient_checkpointing": True})
    again = train.run(Session(recipe, tmp_path))
    assert (again.run.path, again.resumed_from) == (copy, 2)
    straight, resumed = (load_checkpoint(latest_checkpoint(path)) for path in (trained.run.path, copy))  # type: ignore[arg-type]
    assert resumed.step == straight.step == 4
    for name, value in straight.tensors["adapter"].items():
        torch.testing.assert_close(resumed.tensors["adapter"][name], value, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("at", [1, 9, 14])
def test_a_stop_in_the_middle_of_a_step_abandons_it(
    at: int, finished: Finished, make_recipe: MakeRecipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At most one more micro-batch is computed, and the continued run has the bits of an undisturbed one."""
    recipe = make_recipe(train={"micro_batch": 1, "group_gradient": "two_pass", "eval_every": 0, "steps": 2})
    compute, stop_at = GroupGradient._part_errors, [0]
    session: Session | None = None
    calls = 0

    def counted(*arguments: Any) -> Tensor:
        nonlocal calls
        calls += 1
        if session is not None and calls == stop_at[0]:
            session.stop.requested = True
        return compute(*arguments)

    monkeypatch.setattr(GroupGradient, "_part_errors", counted)
    runs = []
    for name, stopped in (("straight", False), ("stopped", True)):
        workspace = tmp_path / name
        shutil.copytree(finished[0] / "stores", workspace / "stores")
        if stopped:
            session = Session(recipe, workspace, Reporter(quiet=True))
            stop_at[0] = calls // 2 + at  # in the second step
            calls = 0
            with pytest.raises(Interrupted, match="stopped after step 1 of 2"):
                train.run(session)
            assert stop_at[0] <= calls <= stop_at[0] + 1
            session = None
        result = train.run(Session(recipe, workspace, Reporter(quiet=True)))
        assert result.resumed_from == (1 if stopped else 0)
        runs.append(result.run)
    adapters = [(run.path / LORA_FILE).read_bytes() for run in runs]
    assert adapters[0] == adapters[1]
    rows = [[timeless(row.to_json()) for row in run.metrics()] for run in runs]
    assert rows[0] == rows[1]


def test_a_closed_source_of_steps_frees_its_images_at_once(
    finished: Finished, make_recipe: MakeRecipe, tmp_path: Path
) -> None:
    """Without a collection: the next round, or the next trial, is loaded before one comes."""
    workspace = shutil.copytree(finished[0], tmp_path / "out")
    with Session(make_recipe(), workspace, Reporter(quiet=True)) as session:
        steps = GroupSteps(session, make_scored_store(session)[0])
        steps._prefetch.take(0)
        steps.close()
        alive = weakref.ref(steps)
        gc.collect()
        gc.disable()
        try:
            del steps
            assert alive() is None
        finally:
            gc.enable()


def test_the_pipeline_with_the_adapter_draws_the_evaluated_images(finished: Finished, make_recipe: MakeRecipe) -> None:
    """``pipe.load_lora_weights(run)`` on the untouched pipeline folder gives the evaluated images."""
    workspace, trained, _ = finished
    session = Session(make_recipe(), workspace)
    settings = evaluation_plan(session, images_per_prompt=1)
    prompt = session.prompts("eval").records[0]
    folder, weights = trained_run(session)
    assert (folder.path, weights.step) == (trained.run.path, 4)
    with applied(session, weights):
        (group,) = sample_groups(session.model, (prompt,), settings, batch_size=1)
    pipe = FluxPipeline.from_pretrained(tiny_model_path(), dtype=torch.float32)
    pipe.load_lora_weights(trained.run.path)
    pipe.set_progress_bar_config(disable=True)
    (image,) = pipe(
        prompt.prompt,
        height=64,
        width=64,
        num_inference_steps=3,
        max_sequence_length=pipe.tokenizer_2.model_max_length,
        generator=torch.Generator().manual_seed(group.origins[0]["seed"]),
    ).images
    assert np.abs(np.asarray(image).astype(int) - np.asarray(group.images[0])).max() <= 1


def test_one_pass_and_two_passes_train_the_same(finished: Finished, make_recipe: MakeRecipe, tmp_path: Path) -> None:
    workspace, trained, _ = finished
    shutil.copytree(workspace / "stores", tmp_path / "stores")
    recipe = make_recipe(train={"group_gradient": "two_pass", "micro_batch": 2, "eval_every": 0})
    two = train.run(Session(recipe, tmp_path, Reporter(quiet=True)))
    for one_row, two_row in zip(
        [row for row in trained.run.metrics() if row["kind"] == "train"], two.run.metrics(), strict=True
    ):
        for name in ("loss", "grad_norm", "implicit_accuracy"):
            assert two_row[name] == pytest.approx(one_row[name], rel=1e-3, abs=1e-5)
        images = recipe.train.groups_per_step * recipe.group_method.k
        assert two_row["images_per_second"] * two_row["seconds"] == pytest.approx(images)


def test_training_starts_at_the_reference(finished: Finished) -> None:
    """Before the first update policy = reference: s = 0, so GDRO's loss is that of a uniform policy.

    For K = 3 the sum over ranks of log(images left) is log 3 + log 2, whatever the rewards.
    """
    _, trained, _ = finished
    first = next(row for row in trained.run.metrics() if row["kind"] == "train")
    assert first["loss_method"] == pytest.approx(math.log(3) + math.log(2), abs=1e-4)
    assert first["implicit_accuracy"] == pytest.approx(0.5)
    errors = torch.zeros(1, 3)
    uniform = group_loss("gdro", errors, errors, torch.tensor([[1.0, 0.5, 0.0]]), beta=1, gamma=0, tau=0.05)
    assert float(uniform.loss) == pytest.approx(math.log(6), abs=1e-6)


def test_evaluation_before_training_names_the_remedy(make_recipe: MakeRecipe, quiet: Reporter, tmp_path: Path) -> None:
    with pytest.raises(PrerequisiteError, match="run `gdro train`"):
        evaluate.run(Session(make_recipe(), tmp_path, quiet))
    assert not list(tmp_path.iterdir())


def test_too_many_failed_images_are_refused(make_recipe: MakeRecipe, quiet: Reporter, tmp_path: Path) -> None:
    """One of 16 files is not an image, so its score is missing with a reason; 6 % is more than the 2 % allowed."""
    recipe = make_recipe()
    store = sample.run(Session(recipe, tmp_path, quiet)).store
    path = store.images(0)[0].path
    broken = path.read_bytes()[:60]
    groups = store.path / "shards" / "00000"
    import hashlib

    manifest = json.loads((groups / "manifest.json").read_text())
    path.write_bytes(broken)
    entry = manifest["files"][f"images/{path.name}"]
    entry["bytes"], entry["sha256"] = len(broken), hashlib.sha256(broken).hexdigest()
    (groups / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(StoreError, match=r"1 of 16 images .* could not be scored"):
        score.run(Session(recipe, tmp_path, quiet))
    tolerant = make_recipe(reward={"max_failed_share": 0.1})
    result = score.run(Session(tolerant, tmp_path, quiet))
    assert (result.totals.scored, result.totals.images) == (15, 16)
    assert "decode" in result.totals.reasons[0][0]


def test_dry_run_counts_and_makes_nothing(make_recipe: MakeRecipe, tmp_path: Path) -> None:
    rows = dict(plan.describe(make_recipe(), "train", tmp_path))
    assert rows["samples"] == "4 prompts x 4 = 16 images; none is made yet"
    assert rows["step"] == "2 groups x 3 = 6 images, in micro-batches of 6"
    assert not list(tmp_path.iterdir())


def test_dry_run_reports_the_share_of_each_process(make_recipe: MakeRecipe, tmp_path: Path) -> None:
    """Groups of three take two passes in micro-batches of two, and one in micro-batches of three."""
    split = dict(plan.describe(make_recipe(train={"micro_batch": 2}), "train", tmp_path))
    recipe = make_recipe(train={"micro_batch": 3})
    alone, shared = (dict(plan.describe(recipe, "train", tmp_path, world=world)) for world in (1, 2))
    assert [each["gradient"] for each in (split, alone, shared)] == ["two passes", "one pass", "one pass"]
    assert shared["step"] == "2 groups x 3 = 6 images, 3 in each of 2 processes, in micro-batches of 3"
    with pytest.raises(UserError, match="train.groups_per_step is 2, which 3 processes cannot share equally"):
        plan.describe(recipe, "train", tmp_path, world=3)


def test_dry_run_reports_beta_in_the_other_convention(make_recipe: MakeRecipe, tmp_path: Path) -> None:
    """For a sum, beta is divided by the number of latent values."""
    recipe = make_recipe(method={"beta": 12.0})
    dims = math.prod(Session(recipe, tmp_path).model.latent_shape(height=64, width=64))
    method = dict(plan.describe(recipe, "train", tmp_path))["method"]
    assert f"beta 12 (errors are a mean over {dims} numbers; for a sum it would be {12 / dims:.3g})" in method


def test_a_stop_while_sampling_keeps_finished_shards(make_recipe: MakeRecipe, quiet: Reporter, tmp_path: Path) -> None:
    """The flag is set when the first of two shards is finished: the first stays, and the second is not begun."""
    session = Session(make_recipe(), tmp_path, quiet)
    store = open_training_store(session)

    class StopAfterOneShard(StopFlag):
        def check(self, message: str) -> None:
            self.requested = store.missing_shards() == [1]
            super().check(message)

    session.stop = StopAfterOneShard()
    with pytest.raises(Interrupted, match="run the command again"):
        fill_store(session, store, training_plan(session))
    assert store.missing_shards() == [1]
