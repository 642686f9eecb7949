"""A reward server that goes down while a store is scored, and comes back: the same command completes the scores."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from gdro_cli.config.recipe import Recipe
from gdro_cli.errors import PrerequisiteError, StoreError, UserError
from gdro_cli.runtime.progress import Reporter
from gdro_cli.stages.evaluation import evaluate
from gdro_cli.stages.runs.identity import run_path
from gdro_cli.stages.scoring import score
from gdro_cli.stages.scoring.fill_table import score_with_reward
from gdro_cli.stages.setup.scorers import open_reward_table
from gdro_cli.stages.setup.session import Session
from gdro_cli.stages.setup.store import open_training_store
from gdro_cli.stages.training import train
from tests.support.judge_server import Reply
from tests.support.reward_server import RewardServer, answers, scores

pytestmark = pytest.mark.slow

MakeRecipe = Callable[..., Recipe]


@pytest.fixture
def reward_server(monkeypatch: pytest.MonkeyPatch) -> Iterator[RewardServer]:
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    server = RewardServer()
    values = itertools.count()
    server.otherwise = lambda payload: scores(*({"value": next(values) % 7 / 7} for _ in payload["images"]))
    yield server
    server.close()


def served(make_recipe: MakeRecipe, server: RewardServer, **changes: Any) -> Recipe:
    http = {"url": server.url, "retries": 0, "images_per_request": 1, "concurrency": 1}
    return make_recipe(name="served", reward={"kind": "http", "http": http}, **changes)


def down_after(server: RewardServer, requests: int) -> None:
    good, left = server.otherwise, itertools.count()
    server.otherwise = lambda payload: good(payload) if next(left) < requests else Reply(b"", hang_up=True)


def test_the_same_command_completes_the_scores(
    make_recipe: MakeRecipe, quiet: Reporter, tmp_path: Path, reward_server: RewardServer
) -> None:
    """Two shards of 8 images: the server goes down in the first, and the second is not kept."""
    recipe, good = served(make_recipe, reward_server), reward_server.otherwise
    down_after(reward_server, 5)
    with pytest.raises(StoreError, match=r"none of 8 images got an answer \(the reward server gave no scores in 1 att"):
        score.run(Session(recipe, tmp_path, quiet))
    (table,) = tmp_path.glob("stores/*/scores/*")
    assert (table / "00000.jsonl").exists() and not (table / "00001.jsonl").exists()
    assert (table / "00000.jsonl").read_text().count("RemoteProtocolError") == 3

    reward_server.otherwise = good
    reward_server.seen.clear()
    result = score.run(Session(recipe, tmp_path, quiet))
    assert (result.totals.scored, result.totals.images, result.shards_made) == (16, 16, 2)
    assert len(reward_server.seen) == 3 + 8
    reward_server.seen.clear()
    assert score.run(Session(recipe, tmp_path, quiet)).shards_made == 0 and reward_server.seen == []


def test_a_server_that_was_updated_after_the_table_was_opened(
    make_recipe: MakeRecipe, quiet: Reporter, tmp_path: Path, reward_server: RewardServer
) -> None:
    """As another process of the job may find it: its scores would be of another version than the table's."""
    session = Session(served(make_recipe, reward_server), tmp_path, quiet)
    store = open_training_store(session)
    table = open_reward_table(session, store)
    reward_server.info = answers({"version": {"reward": "width", "rule": "two"}, "scale": [0, 1]})
    del session.reward
    with pytest.raises(PrerequisiteError, match=r"the reward http has another version than when .* was opened: run"):
        score_with_reward(session, table, label="scoring")
    assert reward_server.seen == []


def test_a_complete_table_that_was_refused_is_scored_once_more(
    make_recipe: MakeRecipe, quiet: Reporter, tmp_path: Path, reward_server: RewardServer
) -> None:
    recipe = served(make_recipe, reward_server)
    reward_server.replies.extend([scores({"error": "busy"})] * 2)
    with pytest.raises(StoreError, match=r"2 of 16 images .* fix the cause and run the command again, which scores"):
        score.run(Session(recipe, tmp_path, quiet))
    assert score.run(Session(recipe, tmp_path, quiet)).totals.scored == 16


def test_what_a_training_may_have_used_stays_as_it_is(
    make_recipe: MakeRecipe, quiet: Reporter, tmp_path: Path, reward_server: RewardServer
) -> None:
    """Fewer images are missing than the recipe allows, so the first command has accepted the table."""
    recipe = make_recipe(
        reward={"kind": "http", "max_failed_share": 0.2, "http": {"url": reward_server.url, "images_per_request": 1}}
    )
    reward_server.replies.append(scores({"error": "busy"}))
    assert score.run(Session(recipe, tmp_path, quiet)).totals.scored == 15
    assert score.run(Session(recipe, tmp_path, quiet)).totals.scored == 15


def test_the_whole_job_and_the_identity_of_its_run(
    make_recipe: MakeRecipe, quiet: Reporter, tmp_path: Path, reward_server: RewardServer
) -> None:
    """Where the server is, and how it is asked, changes no name; its version does."""
    recipe = served(make_recipe, reward_server, train={"steps": 2, "eval_every": 2})
    run = train.run(Session(recipe, tmp_path, quiet)).run
    result = evaluate.run(Session(recipe, tmp_path, quiet))
    assert result.results.task == "http" and result.results.failed == 0
    assert result.results.protocol["reward"]["server"] == {"reward": "width", "rule": "one"}

    other = RewardServer()
    try:
        http = {"url": other.url, "retries": 3, "images_per_request": 4, "concurrency": 2, "timeout": 9.0}
        same = make_recipe(name="served", reward={"kind": "http", "http": http}, train={"steps": 2, "eval_every": 2})
        assert run_path(Session(same, tmp_path)) == run.path
        other.info = answers({"version": {"reward": "width", "rule": "two"}, "scale": [0, 1]})
        assert run_path(Session(same, tmp_path)) != run.path
    finally:
        other.close()


def test_nothing_is_sampled_without_the_server_or_for_prompts_that_it_cannot_use(
    make_recipe: MakeRecipe, quiet: Reporter, tmp_path: Path, reward_server: RewardServer
) -> None:
    reward_server.info = answers({"version": {"rule": "one"}, "scale": [0, 1], "needs": ["mood"]})
    with pytest.raises(UserError, match="ocr-train does not fit the reward http .the key mood is missing"):
        score.run(Session(served(make_recipe, reward_server), tmp_path, quiet))
    reward_server.info = Reply(b"", hang_up=True)
    with pytest.raises(PrerequisiteError, match="cannot be reached"):
        score.run(Session(served(make_recipe, reward_server), tmp_path, quiet))
    assert not list(tmp_path.glob("stores/*/shards/*"))
