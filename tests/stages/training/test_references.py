"""Cached reference errors and prefetched noise do not change a training."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from gdro_cli.config.recipe import Recipe
from gdro_cli.runtime.progress import Reporter
from gdro_cli.stages.evaluation import evaluate
from gdro_cli.stages.setup.session import Session
from gdro_cli.stages.training import train
from gdro_cli.stages.training.group_gradient import GroupGradient
from gdro_cli.stages.training.prefetch import Prefetch

pytestmark = pytest.mark.slow

MakeRecipe = Callable[..., Recipe]
Finished = tuple[Path, train.TrainResult, evaluate.EvalResult]
PLAIN: dict[str, Any] = {"cache_reference": False, "prefetch": False, "eval_every": 0}


def fresh_workspace(finished: Finished, out: Path) -> Path:
    """The finished workspace's stores and scores, without runs and reference errors."""
    shutil.copytree(finished[0] / "stores", out / "stores", ignore=shutil.ignore_patterns("references"))
    return out


def adapter(result: train.TrainResult) -> dict[str, torch.Tensor]:
    return load_file(result.run.path / "pytorch_lora_weights.safetensors")


def same(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> bool:
    return left.keys() == right.keys() and all(torch.equal(left[key], right[key]) for key in left)


@pytest.fixture
def passes(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The number of images that each computation of reference errors passes through the model."""
    counts: list[int] = []
    compute = GroupGradient.reference_errors

    def counted(self: GroupGradient, groups: Any, known: torch.Tensor | None = None) -> torch.Tensor:
        counts.append(groups.rewards.numel() if known is None else int(known.isnan().sum()))
        return compute(self, groups, known)

    monkeypatch.setattr(GroupGradient, "reference_errors", counted)
    return counts


def test_cached_reference_errors_and_prefetch_change_no_bit(
    finished: Finished, make_recipe: MakeRecipe, tmp_path: Path, quiet: Reporter, passes: list[int]
) -> None:
    out = fresh_workspace(finished, tmp_path)
    plain = adapter(train.run(Session(make_recipe(train=PLAIN), out, quiet)))
    assert passes == [6, 6, 6, 6] and not [*out.glob("stores/*/references")]
    shutil.rmtree(out / "runs")
    cached = adapter(train.run(Session(make_recipe(train={"eval_every": 0}), out, quiet)))
    assert passes[4:] == [6, 6, 6, 6] and same(plain, cached)
    shutil.rmtree(out / "runs")
    reused = adapter(train.run(Session(make_recipe(train={"eval_every": 0}), out, quiet)))
    assert passes[8:] == [0, 0, 0, 0] and same(plain, reused)
    # Another beta has the same reference errors; another seed draws other noise.
    train.run(Session(make_recipe(method={"beta": 3}, train={"eval_every": 0}), out, quiet))
    train.run(Session(make_recipe(train={"eval_every": 0, "seed": 5}), out, quiet))
    assert passes[12:] == [0, 0, 0, 0, 6, 6, 6, 6]


@pytest.mark.parametrize(
    "other", [{"method": {"min_spread": 0.2}}, {"train": {"shuffle_rewards": True}}], ids=["min_spread", "shuffled"]
)
def test_other_draws_of_the_same_images_share_no_errors(
    finished: Finished,
    make_recipe: MakeRecipe,
    tmp_path: Path,
    quiet: Reporter,
    passes: list[int],
    other: dict[str, dict[str, Any]],
) -> None:
    """In other batches an image's errors differ by rounding, so errors of an earlier training are not used."""
    out = fresh_workspace(finished, tmp_path)
    train.run(Session(make_recipe(train={"eval_every": 0}), out, quiet))
    del passes[:]
    method, section = other.get("method", {}), other.get("train", {})
    cached = adapter(train.run(Session(make_recipe(method=method, train={"eval_every": 0} | section), out, quiet)))
    assert passes == [6, 6, 6, 6]
    shutil.rmtree(out / "runs")
    assert same(cached, adapter(train.run(Session(make_recipe(method=method, train=PLAIN | section), out, quiet))))


def test_a_bank_of_noise_repeats_its_draws(
    finished: Finished, make_recipe: MakeRecipe, tmp_path: Path, quiet: Reporter, passes: list[int]
) -> None:
    """Four groups of four images, three in a step: with one draw, 4 steps of 2 groups meet at most 16 images."""
    out = fresh_workspace(finished, tmp_path)
    bank = {"noise_bank": 1, "min_spread": 0.0}
    cached = adapter(train.run(Session(make_recipe(method=bank, train={"eval_every": 0}), out, quiet)))
    assert sum(passes) <= 16 < 24 and min(passes) < 6
    shutil.rmtree(out / "runs")
    plain = adapter(train.run(Session(make_recipe(method=bank, train=PLAIN), out, quiet)))
    for key in plain:
        torch.testing.assert_close(cached[key], plain[key], rtol=1e-3, atol=1e-6)


def test_prefetch_gives_each_step_its_item_and_passes_errors_on() -> None:
    made: list[int] = []

    def make(step: int) -> int:
        made.append(step)
        if step == 3:
            raise ValueError("no third")
        return step * 10

    prefetch = Prefetch(make, steps=5)
    assert [prefetch.take(0), prefetch.take(1), prefetch.take(2)] == [0, 10, 20]
    with pytest.raises(ValueError, match="no third"):
        prefetch.take(3)
    assert prefetch.take(1) == 10  # an earlier step is made again
    prefetch.close()
    assert made[:4] == [0, 1, 2, 3] and 5 not in made
