"""A mixture from sampling to the report, beside a reward that was not trained on; other weights score nothing again."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from gdro_cli.config.recipe import Recipe
from gdro_cli.errors import StoreError, UserError
from gdro_cli.rewards import pool as pool_module
from gdro_cli.runtime.progress import Reporter
from gdro_cli.stages.evaluation import evaluate
from gdro_cli.stages.scoring import score
from gdro_cli.stages.setup.session import Session
from gdro_cli.stages.training import train
from tests.support.plugins import BRIGHTNESS, install

pytestmark = pytest.mark.slow
MakeRecipe = Callable[..., Recipe]

WIDTH = """
from gdro_cli.rewards import Reward

class Width(Reward):
    name = "width"
    purpose = "to be wide"
    needs = frozenset({"size"})
    version = {"reward": "width"}

    def score_image(self, image, prompt):
        return image.width / prompt.metadata["size"]
"""


FLAKY = """
import os
from gdro_cli.rewards import Reward

class Flaky(Reward):
    name = "{name}"
    purpose = "to be there"
    version = {{"reward": "{name}"}}

    def score_image(self, image, prompt):
        level = sum(image.convert("L").tobytes())
        if os.path.exists({down!r}) and level % 2 == {parity}:
            raise RuntimeError("down")
        return 0.5
"""
"""Fails on every other image while a file is there."""


@pytest.fixture(autouse=True)
def plugins(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    (tmp_path / "site").mkdir()
    monkeypatch.syspath_prepend(str(tmp_path / "site"))
    install(tmp_path / "site", "brightness", BRIGHTNESS, target="Brightness")
    install(tmp_path / "site", "width", WIDTH, target="Width")
    for name, parity in {"even": 0, "odd": 1, "alone": 0}.items():  # a warm process keeps the module of its first test
        code = FLAKY.format(name=name, down=str(tmp_path / "down"), parity=parity)
        install(tmp_path / "site", name, code, target="Flaky")
    yield
    for name in ("brightness_reward", "width_reward", "even_reward", "odd_reward", "alone_reward"):
        sys.modules.pop(name, None)


def mixture(weights: dict[str, float], **more: Any) -> dict[str, Any]:
    return {"kind": "mix", "mix": {"weights": weights, **more}, "workers": 1}


def test_the_whole_job(
    make_recipe: MakeRecipe, quiet: Reporter, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    alone = score.run(Session(make_recipe(reward={"kind": "ocr", "workers": 1}), out, quiet)).table
    weights = {"ocr": 0.5, "ocr.similarity": 0.3, "brightness": 0.2}
    reward = mixture(weights, ranges={"brightness": [1, 0]})
    recipe = make_recipe(reward=reward, train={"steps": 2, "eval_every": 2})
    table = score.run(Session(recipe, out, quiet)).table
    # The table of the reward that was scored before is a part of the mixture.
    names = sorted(json.loads(file.read_text())["name"] for file in table.path.parent.glob("*/manifest.json"))
    assert names == ["brightness", "mix", "ocr"]
    for row, own in zip(table.rows(), alone.rows(), strict=True):
        details = row.details
        assert (details["ocr"], details["ocr.similarity"]) == (own.value, own.details["similarity"])
        expected = 0.5 * details["ocr"] + 0.3 * details["ocr.similarity"] + 0.2 * (1 - details["brightness"])
        assert row.value == pytest.approx(expected)

    def nothing_to_score(*_: Any, **__: Any) -> None:
        raise AssertionError("a scoring process was started")

    with monkeypatch.context() as patch:
        patch.setattr(pool_module, "start_worker", nothing_to_score)
        patch.setattr(pool_module.ScoringPool, "score", nothing_to_score)
        other = score.run(Session(make_recipe(reward=mixture({"ocr": 1, "brightness": 9})), out, quiet)).table
    assert other.path != table.path

    run = train.run(Session(recipe, out, quiet)).run
    (point,) = [row for row in run.metrics() if row.kind == "validation" and row.step == 2]
    assert point.model_dump()["corrected"] is not None  # weights and ranges keep it between 0 and 1
    found = evaluate.run(Session(recipe, out, quiet)).results
    assert set(found.measures) >= {"reward", "ocr", "ocr.exact", "ocr.similarity", "ocr.text_area", "brightness", "u"}
    assert set(found.signals) >= {"ocr.text_area"}
    assert "to satisfy several rewards at once" in (run.path / "README.md").read_text()
    page = (run.path / "report.html").read_text()
    assert "ocr.similarity" in page and "read" in page


def test_rewards_that_were_not_trained_on(make_recipe: MakeRecipe, quiet: Reporter, tmp_path: Path) -> None:
    out, small = tmp_path / "out", {"steps": 2, "eval_every": 0}
    plain = make_recipe(train=small)
    run = train.run(Session(plain, out, quiet)).run
    evaluate.run(Session(plain, out, quiet))
    recipe = make_recipe(train=small, eval={"rewards": ["brightness"]}, reward={"brightness": {"power": 2}})
    results = evaluate.run(Session(recipe, out, quiet)).results
    assert results.run == run.path.name  # it is no other training
    change = results.measures["brightness reward"]
    assert 0 < change.base.mean < 1 and change.base.images == change.trained.images == 8
    assert change.difference.mean == pytest.approx(change.trained.mean - change.base.mean)
    for row in results.images.base:
        assert 0 < row.details["brightness reward"] < 1
    assert results.protocol["others"]["brightness"]["settings"] == {"power": 2}


def test_prompts_must_carry_what_the_other_rewards_need(
    make_recipe: MakeRecipe, quiet: Reporter, tmp_path: Path
) -> None:
    out, small = tmp_path / "out", {"steps": 2, "eval_every": 0}
    train.run(Session(make_recipe(train=small), out, quiet))
    recipe = make_recipe(train=small, eval={"rewards": ["width"]})
    with pytest.raises(
        UserError, match=r"eval\.rewards: width cannot score '.*' of prompts\.eval: the key size is missing"
    ):
        evaluate.run(Session(recipe, out, quiet))


def test_a_mixture_that_was_refused_is_completed_by_the_same_command(
    make_recipe: MakeRecipe, quiet: Reporter, tmp_path: Path
) -> None:
    """Each part lacks fewer images than are allowed, and together they lack all."""
    reward = mixture({"even": 1, "odd": 1}) | {"max_failed_share": 0.9}
    recipe, out = make_recipe(reward=reward), tmp_path / "out"
    (tmp_path / "down").touch()
    with pytest.raises(StoreError, match=r"16 of 16 images in .* could not be scored, .*(even|odd): .*down"):
        score.run(Session(recipe, out, quiet))
    (tmp_path / "down").unlink()
    totals = score.run(Session(recipe, out, quiet)).totals
    assert (totals.scored, totals.mean) == (16, 0.5)


def test_scores_that_a_command_has_used_are_not_made_again(
    make_recipe: MakeRecipe, quiet: Reporter, tmp_path: Path
) -> None:
    """Another recipe that allows fewer failures is refused; a training on these scores may have begun."""
    out = tmp_path / "out"
    (tmp_path / "down").touch()
    generous = make_recipe(reward={"kind": "alone", "workers": 1, "max_failed_share": 0.9})
    before = list(score.run(Session(generous, out, quiet)).table.rows())
    assert any(row.value is None for row in before)
    (tmp_path / "down").unlink()
    strict = make_recipe(reward={"kind": "alone", "workers": 1, "max_failed_share": 0})
    with pytest.raises(StoreError, match="delete that folder"):
        score.run(Session(strict, out, quiet))
    assert list(score.run(Session(generous, out, quiet)).table.rows()) == before
