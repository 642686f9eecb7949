"""Online training on the embedded model: rounds, updates, interruptions, processes, and the commands around it."""

from __future__ import annotations

import json
import math
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

from gdro_cli.config.recipe import Recipe
from gdro_cli.config.sweep import plan_sweep
from gdro_cli.core.sde import log_prob
from gdro_cli.errors import Interrupted, StoreError, UserError
from gdro_cli.models.base import FlowModel
from gdro_cli.rewards.base import Score
from gdro_cli.rewards.pool import ScoringStopped
from gdro_cli.runtime.checkpoint import latest_checkpoint, load_checkpoint
from gdro_cli.runtime.interrupt import StopFlag
from gdro_cli.runtime.metrics import MetricsRow
from gdro_cli.runtime.progress import Reporter
from gdro_cli.stages.ablation import ablate
from gdro_cli.stages.evaluation import evaluate
from gdro_cli.stages.planning import dry_run as plan
from gdro_cli.stages.runs.identity import open_run, run_path
from gdro_cli.stages.sampling import sample
from gdro_cli.stages.scoring import score
from gdro_cli.stages.setup.model import attach_adapter, open_model
from gdro_cli.stages.setup.session import Session
from gdro_cli.stages.training import train
from gdro_cli.stages.training.online import OnlineSteps
from gdro_cli.stages.training.state import TrainingState
from gdro_cli.stages.training.step_source import ResumePoint
from gdro_cli.stages.training.trainer import Trainer
from tests.support.rows import timeless

pytestmark = pytest.mark.slow

MakeRecipe = Callable[..., Recipe]


class Brightness:
    """Scores an image by its mean brightness; those at the positions ``missing`` of a call cannot be scored."""

    def __init__(self, missing: Sequence[int] = (), constant: float | None = None) -> None:
        self.missing, self.constant = missing, constant
        self.on_call: Callable[[], None] = lambda: None

    def score(
        self, images: Sequence[Image.Image], prompts: Sequence[object], *, stop: Callable[[], bool]
    ) -> list[Score]:
        assert len(images) == len(prompts)
        self.on_call()
        values = [float(np.asarray(image).mean()) / 255 for image in images]
        return [
            Score(None, "a reason")
            if position in self.missing
            else Score(value if self.constant is None else self.constant)
            for position, value in enumerate(values)
        ]


def steps_of(
    recipe: Recipe, scorer: Brightness, *, model: FlowModel | None = None, workspace: Path = Path("unused")
) -> OnlineSteps:
    """The source of a recipe's gradients, with another reward."""
    source = OnlineSteps(Session(recipe, workspace, model=model))
    texts = source.model.encode([prompt.prompt for prompt in source.prompts])
    source.conditioning = {prompt.id: text for prompt, text in zip(source.prompts, texts, strict=True)}
    source.pool = scorer  # type: ignore[assignment]
    return source


def trainer_of(recipe: Recipe, workspace: Path, scorer: Brightness) -> Trainer:
    source = steps_of(recipe, scorer, workspace=workspace)
    session = source.session
    return Trainer(session, TrainingState(session, open_run(session)), source, None)


def gradient_of(source: OnlineSteps, parameters: Sequence[torch.nn.Parameter], step: int) -> torch.Tensor:
    for parameter in parameters:
        parameter.grad = None
    source.gradient(step)
    return torch.cat([torch.zeros_like(p).flatten() if p.grad is None else p.grad.flatten() for p in parameters])


def tensors_of(run: Path) -> dict[str, torch.Tensor]:
    path = latest_checkpoint(run)
    assert path is not None
    groups = load_checkpoint(path).tensors
    return {f"{group}.{name}": value for group, tensors in groups.items() for name, value in tensors.items()}


def all_timeless(rows: list[MetricsRow]) -> list[dict[str, Any]]:
    return [timeless(row.to_json()) for row in rows]


@pytest.fixture(scope="module")
def trained(
    tmp_path_factory: pytest.TempPathFactory, make_online: MakeRecipe, quiet: Reporter
) -> tuple[Path, train.TrainResult]:
    """Workspace and training of the small online recipe with the real OCR, undisturbed."""
    workspace = tmp_path_factory.mktemp("online")
    return workspace, train.run(Session(make_online(), workspace, quiet))


Trained = tuple[Path, train.TrainResult]


# --- a whole run -----------------------------------------------------------------------------------------------


def test_rounds_train_and_change_the_adapter(trained: Trained) -> None:
    workspace, result = trained
    run = result.run.path
    assert sorted(path.name for path in (run / "checkpoints").iterdir()) == ["step-000002", "step-000004"]
    tensors = tensors_of(run)
    changed = [name for name, value in tensors.items() if "lora_B" in name and value.abs().max() > 0]
    assert changed and all(value.isfinite().all() for value in tensors.values())
    assert not (workspace / "stores").exists()  # online methods have no store
    assert (run / "pytorch_lora_weights.safetensors").is_file()


def test_metrics_of_a_round(trained: Trained) -> None:
    rows = [row for row in trained[1].run.metrics() if row["kind"] == "train"]
    assert [(row["step"], row["round"]) for row in rows] == [(1, 1), (2, 1), (3, 2), (4, 2)]
    for row in rows:
        assert 0 <= row["reward"] <= 1 and row["reward_group_std"] >= 0 and row["failed"] == 0
        parts = sum(row[f"seconds_{name}"] for name in ("sampling", "scoring", "updates"))
        assert row["seconds"] == pytest.approx(parts)
        assert row["images_per_second"] == pytest.approx(row["images"] / row["seconds_updates"])
    for first, second in ((rows[0], rows[1]), (rows[2], rows[3])):
        assert first["reward"] == second["reward"]
        assert first["ratio_mean"] == pytest.approx(1, abs=1e-5)  # the policy that drew the images
        assert first["approx_kl"] < 1e-9 and first["clip_fraction"] == 0
        assert second["approx_kl"] > first["approx_kl"] or second["images"] == 0
    assert rows[0]["kl"] == pytest.approx(0, abs=1e-12) and rows[-1]["kl"] > 0


def test_a_resumed_run_equals_an_undisturbed_one(
    trained: Trained, make_online: MakeRecipe, tmp_path: Path, quiet: Reporter
) -> None:
    workspace, result = trained
    shutil.copytree(workspace, tmp_path, dirs_exist_ok=True)
    run = tmp_path / "runs" / result.run.path.name
    shutil.rmtree(run / "checkpoints" / "step-000004")
    again = train.run(Session(make_online(), tmp_path, quiet))
    assert again.resumed_from == 2
    before, after = tensors_of(result.run.path), tensors_of(run)
    assert all(torch.equal(before[name], after[name]) for name in before | after)
    assert all_timeless(again.run.metrics()) == all_timeless(result.run.metrics())


def test_a_finished_run_starts_nothing(trained: Trained, make_online: MakeRecipe, quiet: Reporter) -> None:
    again = train.run(Session(make_online(), trained[0], quiet))
    assert (again.run.path, again.resumed_from) == (trained[1].run.path, 4)


def test_two_processes_equal_one(trained: Trained, make_online: MakeRecipe, tmp_path: Path) -> None:
    """With a sharded base, whose passes take both processes, however uneven their parts of a round are."""
    recipe = tmp_path / "online.yaml"
    recipe.write_text(yaml.safe_dump(make_online(model={"sharding": "fsdp"}).resolved()))
    command = [sys.executable, "-m", "gdro_cli", "train", "--recipe", str(recipe), "--out", str(tmp_path / "out")]
    done = subprocess.run([*command, "--num-processes", "2"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    run = tmp_path / "out" / "runs" / trained[1].run.path.name
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    expected = trained[1].run.metrics()
    assert [(row["kind"], row["step"]) for row in rows] == [(row["kind"], row["step"]) for row in expected]
    for row, one in zip(rows, expected, strict=True):
        if row["kind"] == "train":
            for name in ("loss", "grad_norm", "reward", "reward_group_std", "images", "ratio_mean"):
                assert row[name] == pytest.approx(one[name], rel=1e-3, abs=1e-5), (name, row["step"])


def test_evaluation_takes_the_run(trained: Trained, make_online: MakeRecipe, quiet: Reporter) -> None:
    result = evaluate.run(Session(make_online(), trained[0], quiet))
    held = json.loads(result.file.read_text())
    assert (held["method"]["name"], held["weights"]["step"]) == ("flow-grpo", 4)
    page = (trained[1].run.path / "report.html").read_text()
    assert "reward of the rounds" in page and "Implicit reward" not in page


# --- a round ---------------------------------------------------------------------------------------------------


def test_images_that_fail_are_left_out(make_online: MakeRecipe) -> None:
    """Image 1 of group 0 has no score: its group's advantages come from the other two, and no update uses it."""
    source = steps_of(make_online(method={"advantage_std": "group"}), Brightness(missing=[1]))
    assert source.prepare(0)
    current = source.round
    assert current is not None and current.metrics["failed"] == 1
    assert current.advantages[1] == 0
    assert current.advantages[[0, 2]].sum().item() == pytest.approx(0, abs=1e-6)
    parts = [source._part(current, 0, part).tolist() for part in (0, 1)]
    assert sorted(parts[0] + parts[1]) == [0, 2, 3, 4, 5]


def test_a_round_without_a_score_ends_the_training(make_online: MakeRecipe) -> None:
    with pytest.raises(StoreError, match=r"none of the 6 images of round 1 could be scored \(a reason\)"):
        steps_of(make_online(), Brightness(missing=range(6))).prepare(0)


def test_equal_rewards_change_nothing(make_online: MakeRecipe, tmp_path: Path) -> None:
    trainer = trainer_of(make_online(), tmp_path, Brightness(constant=0.5))
    before = [p.detach().clone() for p in trainer.state.parameters]
    assert trainer.source.prepare(0)
    gradient = trainer._update()
    assert (gradient.learns, gradient.metrics["loss"], gradient.metrics["images"]) == (False, 0.0, 0)
    assert trainer.state.folder.metrics()[-1]["grad_norm"] == 0.0
    assert gradient.metrics["no_advantage"] == 1
    assert (trainer.state.step, trainer.state.ema.updates) == (1, 0)
    assert all(torch.equal(p, old) for p, old in zip(trainer.state.parameters, before, strict=True))


def test_the_first_gradient_of_a_round_is_the_policy_gradient(make_online: MakeRecipe) -> None:
    """d/dtheta of -mean(A log p) over the part's images and their trained steps, calculated one by one."""
    recipe = make_online(method={"beta_kl": 0.0, "timestep_fraction": 0.7})
    source = steps_of(recipe, Brightness())
    parameters = attach_adapter(recipe, source.model)
    with torch.no_grad():
        for parameter in parameters:  # B is zero at the start, and then A has no gradient
            parameter.add_(0.01)
    assert source.prepare(0)
    current = source.round
    assert current is not None
    gradient = gradient_of(source, parameters, 1)
    part = source._part(current, 0, 1)
    assert len(part) == 3 and current.steps.shape == (6, 2)
    terms = []
    for image in part.tolist():
        text = {key: value[[image // 3]] for key, value in current.conditioning.items()}
        for i in current.steps[image].tolist():
            step = source.policy.step(current.rollout.states[[image], i], torch.tensor([i]), text)
            terms.append(-current.advantages[image] * log_prob(current.rollout.states[[image], i + 1], step))
    expected = torch.cat([g.flatten() for g in torch.autograd.grad(torch.cat(terms).mean(), parameters)])
    assert (gradient - expected).norm() < 1e-4 * expected.norm()


def test_micro_batches_give_the_same_gradient(make_online: MakeRecipe) -> None:
    whole, small = make_online(), make_online(train={"micro_batch": 2})
    source = steps_of(whole, Brightness())
    parameters = attach_adapter(whole, source.model)
    with torch.no_grad():
        for parameter in parameters:
            parameter.add_(0.01)
    assert source.prepare(0)
    at_once = gradient_of(source, parameters, 0)
    source.session.recipe = small
    assert (gradient_of(source, parameters, 0) - at_once).norm() < 1e-4 * at_once.norm()


def test_epochs_and_parts_visit_every_image_once(make_online: MakeRecipe) -> None:
    source = steps_of(make_online(method={"inner_epochs": 2, "updates_per_round": 3}), Brightness())
    assert source.prepare(5)
    current = source.round
    assert current is not None and current.number == 0
    orders = [torch.cat([source._part(current, epoch, part) for part in range(3)]).tolist() for epoch in range(2)]
    assert [sorted(order) for order in orders] == [list(range(6))] * 2
    assert orders[0] != orders[1]
    points = [source.resume_point(steps) for steps in (5, 6, 7, 12)]
    assert points == [ResumePoint.NONE, ResumePoint.POSSIBLE] * 2


def test_shuffled_rewards_stay_in_their_group(make_online: MakeRecipe) -> None:
    rewards = torch.tensor([[0.1, 0.2, 0.3], [0.4, math.nan, 0.6]])
    source = steps_of(make_online(), Brightness())
    shuffles = {tuple(source._shuffled(rewards, number)[0].tolist()) for number in range(20)}
    assert len(shuffles) > 1 and all(sorted(row) == pytest.approx([0.1, 0.2, 0.3]) for row in shuffles)
    assert source._shuffled(rewards, 0).isnan().tolist() == rewards.isnan().tolist()


# --- interruptions ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", [{"name": "flow-grpo"}, {"name": "dance-grpo", "updates_per_round": 2}])
def test_a_stop_in_the_middle_of_a_round_changes_nothing(
    method: dict[str, Any], make_online: MakeRecipe, tmp_path: Path, quiet: Reporter
) -> None:
    """A stop while round 1 is scored ends the run after the round's last update, step 2, where it resumes."""
    recipe = make_online(method=method, train={"eval_every": 0, "checkpoint_every": 100})
    whole = trainer_of(recipe, tmp_path / "whole", Brightness())
    whole.train()

    part = trainer_of(recipe, tmp_path / "parts", scorer := Brightness())
    scorer.on_call = lambda: setattr(part.session.stop, "requested", True)
    with pytest.raises(Interrupted, match="stopped after step 2 of 4; run the same command again"):
        part.train()
    rest = trainer_of(recipe, tmp_path / "parts", Brightness())
    assert rest.state.resume() == 2
    rest.train()
    before, after = tensors_of(whole.state.folder.path), tensors_of(rest.state.folder.path)
    assert all(torch.equal(before[name], after[name]) for name in before | after)
    assert all_timeless(rest.state.folder.metrics()) == all_timeless(whole.state.folder.metrics())


def test_a_stop_while_a_round_is_drawn_keeps_the_earlier_rounds(
    make_online: MakeRecipe, tmp_path: Path, quiet: Reporter
) -> None:
    recipe = make_online(train={"eval_every": 0, "checkpoint_every": 100})
    trainer = trainer_of(recipe, tmp_path, Brightness())
    folder, stop = trainer.state.folder.path, trainer.session.stop
    stop.requested = True
    with pytest.raises(Interrupted, match="stopped after step 0 of 4"):
        trainer.train()
    assert latest_checkpoint(folder) is None
    stop.requested = False
    assert trainer.source.prepare(0)
    for _ in range(2):
        trainer._update()
    stop.requested = True
    with pytest.raises(Interrupted, match="stopped after step 2 of 4"):
        trainer.train()
    path = latest_checkpoint(folder)
    assert path is not None and load_checkpoint(path).step == 2
    written, again = path.stat(), trainer_of(recipe, tmp_path, Brightness())
    assert again.state.resume() == 2
    again.session.stop.requested = True
    with pytest.raises(Interrupted, match="stopped after step 2 of 4"):
        again.train()
    assert path.stat() == written  # not written again


class Hanging(Brightness):
    """A stop is requested during the second call, which then gives up, like a reward that hangs."""

    def __init__(self) -> None:
        super().__init__()
        self.stop, self.calls = StopFlag(), 0

    def score(
        self, images: Sequence[Image.Image], prompts: Sequence[object], *, stop: Callable[[], bool]
    ) -> list[Score]:
        self.calls += 1
        if self.calls == 1:
            return super().score(images, prompts, stop=stop)
        self.stop.requested = True
        assert stop()
        raise ScoringStopped("given up")


def test_a_reward_that_hangs_does_not_delay_a_stop(make_online: MakeRecipe, tmp_path: Path, quiet: Reporter) -> None:
    """The round is dropped; the checkpoint has the steps before it, where the run can resume."""
    recipe = make_online(train={"eval_every": 0, "checkpoint_every": 100})
    trainer = trainer_of(recipe, tmp_path, scorer := Hanging())
    trainer.session.stop = scorer.stop
    with pytest.raises(Interrupted, match="stopped after step 2 of 4"):
        trainer.train()
    assert scorer.calls == 2
    path = latest_checkpoint(trainer.state.folder.path)
    assert path is not None and load_checkpoint(path).step == 2


# --- the commands -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("stage", "name"), [(sample, "sample"), (score, "score")])
def test_there_is_nothing_to_sample_or_score(
    stage: Any, name: str, make_online: MakeRecipe, quiet: Reporter, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=f"nothing to {name}: flow-grpo makes and scores its images while it trains"):
        stage.run(Session(make_online(), tmp_path, quiet))
    with pytest.raises(UserError, match=f"nothing to {name}"):
        plan.describe(make_online(), name, tmp_path)
    assert not list(tmp_path.iterdir())


def test_dry_run_counts_rounds(make_online: MakeRecipe, tmp_path: Path) -> None:
    """5 steps are 3 rounds, the last one shorter; trajectories: 6 images x 4 states x 16 x 128 numbers x 4 bytes."""
    rows = dict(plan.describe(make_online(train={"steps": 5}), "train", tmp_path))
    assert rows["round"] == "2 prompts x 3 = 6 images, sampled and scored"
    assert rows["sampling"] == "4 steps, of which 3 are trained in each image"
    assert rows["steps"] == "5, so 3 rounds and 18 images"
    assert rows["trajectories in memory"].startswith("0 MB")
    assert not list(tmp_path.iterdir())


def test_a_run_is_named_by_what_it_learns_from(make_online: MakeRecipe, tmp_path: Path) -> None:
    model = open_model(make_online())

    def path_of(**changes: Any) -> Path:
        recipe = make_online(**changes)
        return run_path(Session(recipe, tmp_path, model=model))

    plain = path_of()
    assert path_of(sample={"steps": 7}) == plain  # for the evaluation only
    assert path_of(train={"checkpoint_every": 2}) == plain
    others = [
        path_of(method={"noise_level": 0.9}),
        path_of(train={"lr": 1e-3}),
        path_of(train={"seed": 5}),
        path_of(prompts={"train": {"count": 5}}),
        path_of(reward={"ocr": {"recognition_width": 320}}),
    ]
    assert len({plain, *others}) == 6


def test_an_ablation_of_methods_has_one_store(make_recipe: MakeRecipe, tmp_path: Path) -> None:
    """GDRO's cell needs the store, Flow-GRPO's does not and drops the keys that only the store uses."""
    recipe = make_recipe()
    sweep = plan_sweep(recipe, ["method"], ["gdro,flow-grpo"])
    rows, cells = ablate.describe(Session(recipe, tmp_path, planning=True), sweep)
    assert [value for name, value in rows if name == "store"] and len(
        [name for name, _ in rows if name == "store"]
    ) == 1
    assert [cell[0] for cell in cells] == ["method gdro", "method flow-grpo"]
    assert sweep.cells[1].recipe.train.groups_per_step == 8


def test_processes_must_share_the_prompts_of_a_round(make_online: MakeRecipe) -> None:
    class Three:
        world, rank = 3, 0

    session = Session(make_online(), Path("unused"))
    session.engine = Three()  # type: ignore[assignment]
    with pytest.raises(UserError, match=r"method.prompts_per_round is 2, which 3 processes cannot share"):
        OnlineSteps(session)
