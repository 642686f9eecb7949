"""What a training reads: its store of groups and their scores, found, opened, or made."""

from __future__ import annotations

from pathlib import Path

from gdro_cli.config.recipe import Recipe
from gdro_cli.data.scores import ScoreTable
from gdro_cli.data.store import GroupStore
from gdro_cli.identity import digest
from gdro_cli.models.base import FlowModel
from gdro_cli.runtime.distributed import Engine
from gdro_cli.runtime.interrupt import StopFlag
from gdro_cli.runtime.progress import Reporter
from gdro_cli.stages.sampling.sample import fill_store, training_store
from gdro_cli.stages.scoring.score import refuse_failures, score_missing
from gdro_cli.stages.setup.rewards import open_pool, open_reward, open_table
from gdro_cli.stages.setup.workspace import SamplingPlan, open_prompts, store_identity, training_plan


def make_inputs(
    recipe: Recipe, workspace: Path, model: FlowModel, engine: Engine, reporter: Reporter, stop: StopFlag
) -> tuple[GroupStore, ScoreTable]:
    """Sample and score what is missing, all processes together; returns the complete store and score table.

    Raises:
        StoreError: too many images could not be scored, or another job is at work on them.
        Interrupted: stopped by the user; finished shards are kept.
        EndedElsewhere: one of these was raised in another process.
    """
    store, plan = engine.from_main(lambda: training_store(recipe, workspace, model))
    table = engine.from_main(lambda: open_table(recipe, store))
    fill_and_score(recipe, model, table, plan, engine, reporter, stop)
    return store, table


def fill_and_score(
    recipe: Recipe,
    model: FlowModel,
    table: ScoreTable,
    plan: SamplingPlan,
    engine: Engine,
    reporter: Reporter,
    stop: StopFlag,
    *,
    about: str = "",
) -> None:
    """Sample what the store of ``table`` lacks, and score what the table lacks; raises what ``make_inputs`` raises.

    ``about`` is added to what the progress lines are called.
    """
    fill_store(model, table.store, plan, engine, recipe=recipe, reporter=reporter, stop=stop, label=f"sampling{about}")
    pool = open_pool(recipe, sharing=engine.local_world)
    score_missing(table, pool, engine, reporter=reporter, stop=stop, label=f"scoring{about}")
    with engine.together():
        refuse_failures(table, allowed=recipe.reward.max_failed_share, key="reward.max_failed_share")


def run_inputs(store: GroupStore, table: ScoreTable) -> dict[str, str]:
    """Digests of what a run learns from: how its images and their scores were made, however they are stored."""
    return {"store": digest(dict(store.identity)), "scores": digest(dict(table.provenance))}


def expected_inputs(recipe: Recipe, model: FlowModel) -> dict[str, str]:
    """The same digests, before there is a store: they name the run that a recipe will have.

    What an online method learns from are prompts, model and reward: it keeps no store.
    """
    prompts = open_prompts(recipe, recipe.prompts.train)
    if recipe.online_method is not None:
        who = {key: value for key, value in model.identity.items() if key != "path"}
        text = [str(model.dtype), recipe.model.max_sequence_length]
        return {
            "prompts": prompts.digest,
            "model": digest([who, *text]),
            "scores": digest(dict(open_reward(recipe).version)),
        }
    identity = store_identity(recipe, model, training_plan(recipe, model), prompts)
    return {"store": digest(identity), "scores": digest(dict(open_reward(recipe).version))}
