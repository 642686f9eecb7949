"""Which weights a run keeps as its best, and which of them are evaluated."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from gdro_cli.config.recipe import Recipe
from gdro_cli.errors import PrerequisiteError, StoreError
from gdro_cli.runtime.checkpoint import latest_checkpoint, load_checkpoint, save_checkpoint
from gdro_cli.runtime.run import RunFolder
from gdro_cli.stages.runs.weights import STOPPED, best_folder, early_end, evaluated_weights, keep_if_best
from gdro_cli.stages.training.train import TrainResult
from tests.support.rows import point

MakeRecipe = Callable[..., Recipe]


@pytest.fixture
def run(tmp_path: Path) -> RunFolder:
    return RunFolder.create_or_open(tmp_path / "run", recipe={"name": "hand"}, inputs={}, environment={})


def weights(step: int, *, place: int = 0) -> dict[str, dict[str, torch.Tensor]]:
    """An adapter that says which step it is of, and an average that is half of it."""
    whole = torch.full((3,), float(step + 100 * place))
    return {"adapter": {"lora": whole}, "ema": {"lora": whole / 2}}


def offer(run: RunFolder, step: int, score: float, **changes: Any) -> bool:
    row = point(step, 0.5, corrected=score, **changes)
    return keep_if_best(run, row, measure="corrected", tensors=weights(step))


def kept(run: RunFolder) -> tuple[int, float]:
    """Step and score of what is kept, read from the only folder."""
    (folder,) = (best_folder(run) / "checkpoints").iterdir()
    held = load_checkpoint(folder)
    assert torch.equal(held.tensors["adapter"]["lora"], weights(held.step)["adapter"]["lora"])
    told = json.loads((best_folder(run) / "best.json").read_text())
    assert told == {"step": held.step, held.state["measure"]: held.state["score"]}
    return held.step, held.state["score"]


def checkpoint(run: RunFolder, step: int) -> None:
    tensors = weights(step, place=1)
    save_checkpoint(run.path, step, tensors=tensors, state={}, keep=9)


# --- the best point ------------------------------------------------------------------------------------------


def test_the_first_point_is_the_best(run: RunFolder) -> None:
    assert offer(run, 10, -0.5)
    assert kept(run) == (10, -0.5)


def test_a_better_point_replaces_a_worse_one(run: RunFolder) -> None:
    offer(run, 10, 0.5)
    assert offer(run, 20, 0.6)
    assert kept(run) == (20, 0.6)


@pytest.mark.parametrize("score", [0.4, 0.5])
def test_a_worse_or_equal_point_replaces_nothing(run: RunFolder, score: float) -> None:
    offer(run, 10, 0.5)
    assert not offer(run, 20, score)
    assert kept(run) == (10, 0.5)


def test_a_better_verdict_comes_before_a_higher_score(run: RunFolder) -> None:
    offer(run, 10, 0.9, verdict="collapsed")
    assert offer(run, 20, 0.8, verdict="suspicious") and offer(run, 30, 0.5, verdict="healthy")
    assert not offer(run, 40, 0.95, verdict="suspicious")
    assert offer(run, 50, 0.6, verdict="healthy") and kept(run) == (50, 0.6)


@pytest.mark.parametrize(
    ("verdict", "said"), [("healthy", ""), (None, ""), ("suspicious", ", whose verdict is suspicious")]
)
def test_the_summary_says_which_point_is_kept(run: RunFolder, verdict: str | None, said: str) -> None:
    run.append_metrics(point(10, 0.5, corrected=0.5, verdict=verdict))
    offer(run, 10, 0.5, verdict=verdict)
    summary = TrainResult(run, steps=10, resumed_from=0, was_finished=False).summary
    assert summary["weights kept"] == f"those of step 10, the best evaluation point{said}"


def test_the_same_point_again_replaces_nothing(run: RunFolder) -> None:
    offer(run, 10, 0.5)
    assert not offer(run, 10, 0.5)
    assert kept(run) == (10, 0.5)


@pytest.mark.parametrize(("protocol", "measure"), [("other", "corrected"), ("p", "reward")])
def test_another_protocol_or_measure_begins_anew(run: RunFolder, protocol: str, measure: str) -> None:
    """What was best by other prompts, or by another number, says nothing here, however high it was."""
    offer(run, 30, 0.9)
    row = point(20, 0.1, protocol=protocol, corrected=0.1)
    assert keep_if_best(run, row, measure=measure, tensors=weights(20))
    assert kept(run) == (20, 0.1)


def test_a_point_without_the_measure_is_no_candidate(run: RunFolder) -> None:
    """Neither first nor instead of another: the judge gave no answer there."""
    assert not keep_if_best(run, point(10, 0.9, unjudged=2), measure="corrected", tensors=weights(10))
    assert latest_checkpoint(best_folder(run)) is None
    assert offer(run, 20, 0.5)
    assert not keep_if_best(run, point(30, 0.9, unjudged=2), measure="corrected", tensors=weights(30))
    assert kept(run) == (20, 0.5)


def test_a_later_point_of_an_earlier_start_stays_if_it_is_better(run: RunFolder) -> None:
    """A run that lost its last checkpoints repeats steps; the best point lies ahead of it."""
    offer(run, 30, 0.8)
    assert not offer(run, 10, 0.7)
    assert kept(run) == (30, 0.8)
    assert offer(run, 20, 0.9)
    assert kept(run) == (20, 0.9)
    assert offer(run, 10, 0.9)  # as good, and earlier
    assert kept(run) == (10, 0.9)


# --- what is evaluated ---------------------------------------------------------------------------------------


def test_a_run_without_a_checkpoint_is_refused(run: RunFolder, make_recipe: MakeRecipe) -> None:
    with pytest.raises(PrerequisiteError, match="has no checkpoint: run `gdro train`"):
        evaluated_weights(run, make_recipe())


def test_the_best_point_or_the_end_is_evaluated(run: RunFolder, make_recipe: MakeRecipe) -> None:
    """The recipe has 4 steps. The point's weights say 2, the checkpoint's 104; averages are half of that."""
    offer(run, 2, 0.5)
    checkpoint(run, 4)
    best, last = (evaluated_weights(run, make_recipe(eval={"checkpoint": name})) for name in ("best", "last"))
    assert (best.step, best.checkpoint) == (2, "best")
    assert (last.step, last.checkpoint) == (4, "last")
    assert best.chosen_by == {"measure": "corrected", "score": 0.5, "protocol": "p", "verdict": None}
    assert last.chosen_by is None
    assert best.adapter["lora"].tolist() == [2.0] * 3 and best.ema["lora"].tolist() == [1.0] * 3
    assert last.adapter["lora"].tolist() == [104.0] * 3 and last.ema["lora"].tolist() == [52.0] * 3


def test_without_evaluation_points_the_end_is_the_best(run: RunFolder, make_recipe: MakeRecipe) -> None:
    checkpoint(run, 4)
    found = evaluated_weights(run, make_recipe())
    assert (found.step, found.checkpoint) == (4, "last")


def test_each_kind_of_weights_has_its_own_name(run: RunFolder, make_recipe: MakeRecipe) -> None:
    """So that images of other weights are never taken for theirs."""
    offer(run, 2, 0.5)
    checkpoint(run, 4)
    names = set()
    for kind in ("ema", "raw"):
        for which in ("best", "last"):
            recipe = make_recipe(eval={"weights": kind, "checkpoint": which})
            found, again = evaluated_weights(run, recipe), evaluated_weights(run, recipe)
            assert found.identity == again.identity and found.identity.startswith(f"{kind} ")
            names.add(found.identity)
    assert len(names) == 4


def test_an_unfinished_run_is_refused(run: RunFolder, make_recipe: MakeRecipe) -> None:
    offer(run, 2, 0.5)
    checkpoint(run, 3)
    with pytest.raises(PrerequisiteError, match=r"is at step 3 of 4: run `gdro train`"):
        evaluated_weights(run, make_recipe())


def test_a_run_that_ended_early_is_finished(run: RunFolder, make_recipe: MakeRecipe) -> None:
    offer(run, 1, 0.5)
    checkpoint(run, 3)
    run.write_json(STOPPED, {"step": 3, "reasons": ["..."]})
    best, last = (evaluated_weights(run, make_recipe(eval={"checkpoint": name})) for name in ("best", "last"))
    assert (best.step, last.step) == (1, 3)


@pytest.mark.parametrize("note", [{"step": 4}, {"step": 2}, {"step": "3"}, {}])
def test_a_note_of_another_step_ends_nothing(run: RunFolder, make_recipe: MakeRecipe, note: dict[str, Any]) -> None:
    checkpoint(run, 3)
    assert early_end(run.path) is None
    run.write_json(STOPPED, {"step": 3})
    assert early_end(run.path) == 3
    run.write_json(STOPPED, note)
    assert early_end(run.path) is None
    with pytest.raises(PrerequisiteError, match="is at step 3 of 4"):
        evaluated_weights(run, make_recipe())


def test_a_damaged_best_point_is_named(run: RunFolder, make_recipe: MakeRecipe) -> None:
    offer(run, 2, 0.5)
    checkpoint(run, 4)
    path = latest_checkpoint(best_folder(run))
    assert path is not None
    file = path / "adapter.safetensors"
    file.write_bytes(file.read_bytes()[:-4] + b"\1\2\3\4")
    with pytest.raises(StoreError, match=r"adapter\.safetensors is damaged .* delete .*best"):
        evaluated_weights(run, make_recipe())
    assert evaluated_weights(run, make_recipe(eval={"checkpoint": "last"})).step == 4
