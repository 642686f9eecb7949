"""Rounds of new groups: their noise and weights, and stops that change nothing."""

from __future__ import annotations

import json
import os
import shutil
import signal
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from safetensors.torch import load_file

from gdro_cli.config.recipe import Recipe
from gdro_cli.data.store import GroupStore
from gdro_cli.errors import Interrupted, StoreError
from gdro_cli.identity import digest
from gdro_cli.runtime.metrics import train_rows
from gdro_cli.runtime.progress import Reporter
from gdro_cli.runtime.run import RunFolder
from gdro_cli.stages.evaluation import evaluate
from gdro_cli.stages.planning import dry_run as plan
from gdro_cli.stages.runs.store_times import read_batches
from gdro_cli.stages.setup.session import Session
from gdro_cli.stages.training import train

pytestmark = pytest.mark.slow

MakeRecipe = Callable[..., Recipe]
Finished = tuple[Path, train.TrainResult, evaluate.EvalResult]
ROUNDS: dict[str, Any] = {"train": {"rounds": 2, "lr": 0.01, "eval_every": 0}}


@pytest.fixture(scope="module")
def straight(
    finished: Finished, make_recipe: MakeRecipe, tmp_path_factory: pytest.TempPathFactory, quiet: Reporter
) -> tuple[Path, train.TrainResult]:
    """Two rounds of two steps, undisturbed."""
    out = tmp_path_factory.mktemp("rounds")
    shutil.copytree(finished[0] / "stores", out / "stores")
    return out, train.run(Session(make_recipe(**ROUNDS), out, quiet))


def image_bytes(store: GroupStore) -> list[bytes]:
    return [image.path.read_bytes() for shard in range(len(store.shards)) for image in store.images(shard)]


def test_the_second_round_learns_from_its_own_images(straight: tuple[Path, train.TrainResult]) -> None:
    out, trained = straight
    (round_file,) = trained.run.path.glob("rounds/*.json")
    about = json.loads(round_file.read_text())
    assert (about["round"], about["step"]) == (2, 2)
    fresh = GroupStore.open(trained.run.path / "rounds" / about["store"])
    stores = [GroupStore.open(path) for path in out.glob("stores/*")]
    learnt_from = trained.run.read_json("manifest.json")["inputs"]["store"]
    (base,) = (store for store in stores if digest(dict(store.identity)) == learnt_from)
    assert fresh.identity["weights"].startswith("ema ") and base.identity["weights"] == "base"
    assert not set(image_bytes(fresh)) & set(image_bytes(base))
    batches = read_batches(trained.run)
    assert batches is not None and [batch.step for batch in batches] == [0, 2]
    assert all(batch.sampling > 0 and batch.scoring > 0 for batch in batches)


def test_each_round_trains_its_own_noise_levels(
    straight: tuple[Path, train.TrainResult], make_recipe: MakeRecipe, tmp_path: Path, quiet: Reporter
) -> None:
    """Levels that equal those of the recipe change nothing; the second round is another once its levels are."""
    shutil.copytree(straight[0] / "stores", tmp_path / "stores")
    plain = make_recipe(**ROUNDS)
    own = [plain.group_method.sigma_min, plain.group_method.sigma_max]
    losses = {}
    for second in (own, [0.0, 0.1]):
        recipe = make_recipe(**ROUNDS, method={"sigma_by_round": [own, second]})
        losses[second[1]] = losses_of(train.run(Session(recipe, tmp_path, quiet)).run)
    expected = losses_of(straight[1].run)
    assert losses[own[1]] == expected
    assert losses[0.1][:2] == expected[:2] and not set(losses[0.1][2:]) & set(expected[2:])


def losses_of(run: RunFolder) -> list[float | None]:
    """The loss of each step."""
    return [row.loss for row in train_rows(run.metrics())]


class Impatient(Reporter):
    """Presses Ctrl-C when the work with a certain label begins."""

    def __init__(self, label: str) -> None:
        super().__init__(Console(quiet=True))
        self.label = label

    def track(self, label: str, **more: Any) -> AbstractContextManager[Any]:
        if label == self.label:
            os.kill(os.getpid(), signal.SIGINT)
        return super().track(label, **more)


@pytest.mark.parametrize("moment", ["sampling, round 2 of 2", "scoring, round 2 of 2", "third step"])
def test_a_stop_changes_nothing(
    moment: str,
    straight: tuple[Path, train.TrainResult],
    make_recipe: MakeRecipe,
    tmp_path: Path,
    quiet: Reporter,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    recipe = make_recipe(**ROUNDS)
    shutil.copytree(straight[0] / "stores", tmp_path / "stores")
    if moment == "third step":
        shutil.copytree(straight[1].run.path, tmp_path / "runs" / straight[1].run.path.name)
        run = tmp_path / "runs" / straight[1].run.path.name
        shutil.rmtree(run / "checkpoints" / "step-000004")
        (run / "resolved.json").unlink()
    else:
        with pytest.raises(Interrupted, match="round 2 of 2; finished shards are kept"):
            train.run(Session(recipe, tmp_path, Impatient(moment)))
    again = train.run(Session(recipe, tmp_path, quiet))
    assert again.resumed_from == (3 if moment == "third step" else 2)
    expected = straight[1].run.path
    for name in ("pytorch_lora_weights.safetensors", "checkpoints/step-000004/adapter.safetensors"):
        ours, theirs = load_file(again.run.path / name), load_file(expected / name)
        assert all(ours[key].equal(theirs[key]) for key in theirs) and ours.keys() == theirs.keys()
    assert len(list(again.run.path.glob("rounds/*.json"))) == 1


def test_a_lost_store_of_a_round_is_reported(
    straight: tuple[Path, train.TrainResult], make_recipe: MakeRecipe, tmp_path: Path, quiet: Reporter
) -> None:
    shutil.copytree(straight[0], tmp_path / "out")
    run = tmp_path / "out" / "runs" / straight[1].run.path.name
    shutil.rmtree(run / "checkpoints" / "step-000004")
    shutil.rmtree(next(path for path in (run / "rounds").iterdir() if path.is_dir()))
    with pytest.raises(StoreError, match=r"/rounds/.*/manifest.json is missing: .* run `gdro train`$"):
        train.run(Session(make_recipe(**ROUNDS), tmp_path / "out", quiet))


@pytest.mark.parametrize("lost", ["shards/00000", "scores/*/00000.jsonl"])
def test_a_lost_part_of_a_round_that_has_begun_is_reported(
    lost: str, straight: tuple[Path, train.TrainResult], make_recipe: MakeRecipe, tmp_path: Path, quiet: Reporter
) -> None:
    shutil.copytree(straight[0], tmp_path / "out")
    run = tmp_path / "out" / "runs" / straight[1].run.path.name
    shutil.rmtree(run / "checkpoints" / "step-000004")
    store = next(path for path in (run / "rounds").iterdir() if path.is_dir())
    (part,) = store.glob(lost)
    shutil.rmtree(part) if part.is_dir() else part.unlink()
    with pytest.raises(StoreError, match="is not complete, .*: delete the run and train it again"):
        train.run(Session(make_recipe(**ROUNDS), tmp_path / "out", quiet))


def test_a_damaged_part_of_a_round_names_the_command_that_makes_it(
    straight: tuple[Path, train.TrainResult], make_recipe: MakeRecipe, tmp_path: Path, quiet: Reporter
) -> None:
    """A round that has not begun can be made again."""
    shutil.copytree(straight[0], tmp_path / "out")
    run = tmp_path / "out" / "runs" / straight[1].run.path.name
    for step in (3, 4):
        shutil.rmtree(run / "checkpoints" / f"step-{step:06d}")
    store = next(path for path in (run / "rounds").iterdir() if path.is_dir())
    (image, *_) = sorted((store / "shards" / "00000").rglob("*.png"))
    image.write_bytes(b"")
    with pytest.raises(StoreError, match=r"delete the folder .*/rounds/.*/shards/00000 and run `gdro train`") as caught:
        train.run(Session(make_recipe(**ROUNDS), tmp_path / "out", quiet))
    shutil.rmtree(store / "shards" / "00000")
    again = train.run(Session(make_recipe(**ROUNDS), tmp_path / "out", quiet))
    assert again.resumed_from == 2 and "gdro sample" not in str(caught.value)


@pytest.mark.parametrize("name", ["../../../elsewhere", "/", ".", "", None, "a\x00b"])
def test_a_round_cannot_name_a_store_outside_its_run(
    name: str | None,
    straight: tuple[Path, train.TrainResult],
    make_recipe: MakeRecipe,
    tmp_path: Path,
    quiet: Reporter,
) -> None:
    shutil.copytree(straight[0], tmp_path / "out")
    run = tmp_path / "out" / "runs" / straight[1].run.path.name
    shutil.rmtree(run / "checkpoints" / "step-000004")
    (round_file,) = run.glob("rounds/*.json")
    about = json.loads(round_file.read_text())
    shutil.copytree(run / "rounds" / about["store"], tmp_path / "elsewhere", ignore=shutil.ignore_patterns("scores"))
    round_file.write_text(json.dumps(about | {"store": name}))
    with pytest.raises(StoreError, match="names no store of this run"):
        train.run(Session(make_recipe(**ROUNDS), tmp_path / "out", quiet))
    assert not (tmp_path / "elsewhere" / "scores").exists()


def test_the_dry_run_mentions_rounds_only_if_there_are_several(make_recipe: MakeRecipe, tmp_path: Path) -> None:
    assert "rounds" not in dict(plan.describe(make_recipe(), "train", tmp_path))
    rows = dict(plan.describe(make_recipe(train={"rounds": 3}), "train", tmp_path))
    assert rows["rounds"] == "of 2 steps; 1 times as many images as in the store are sampled and scored on the way"
