"""The recipe's judge, opened: quality of pictures, seen by someone who knows nothing of the reward."""

from __future__ import annotations

from gdro_cli.config.recipe import Recipe
from gdro_cli.data.scores import ScoreTable
from gdro_cli.data.store import GroupStore
from gdro_cli.rewards.judge.base import Judge, JudgeReward
from gdro_cli.rewards.pool import ScoringPool, usable_cores
from gdro_cli.stages.setup.rewards import open_reward
from gdro_cli.stages.setup.workspace import EMBEDDED
from gdro_cli.tiny.assets import tiny_judge_path


def open_judge(recipe: Recipe) -> JudgeReward | None:
    """The recipe's judge with the axes that go with the reward; None where it has none.

    Raises:
        PrerequisiteError: its weights are missing.
    """
    kind = recipe.judge.kind
    if kind == "auto":
        kind = "embedded" if recipe.model.path == EMBEDDED else "none"
    if kind == "none":
        return None
    return JudgeReward(_open(recipe, kind), axes=open_reward(recipe).judge_axes)


def _open(recipe: Recipe, kind: str) -> Judge:
    if kind == "embedded":
        from gdro_cli.rewards.judge.embedded import EmbeddedJudge

        return EmbeddedJudge(tiny_judge_path())
    settings = recipe.judge
    if kind == "unified-reward-local":
        from gdro_cli.rewards.judge.unified_reward_local import UnifiedRewardLocal

        return UnifiedRewardLocal(settings.model or "")
    from gdro_cli.rewards.judge.unified_reward import UnifiedRewardJudge

    return UnifiedRewardJudge(
        settings.base_url or "",
        settings.model or "",
        api_key_env=settings.api_key_env,
        concurrency=settings.concurrency,
        timeout=settings.timeout,
        retries=settings.retries,
    )


def open_judge_pool(recipe: Recipe, judge: JudgeReward, *, sharing: int = 1) -> ScoringPool:
    """Processes that judge. An endpoint is asked by one, which sends several requests at a time; a large model is
    loaded by one. ``sharing`` is how many processes of this machine have a pool each: they share the cores.
    """
    if dict(judge.version["judge"]).get("judge") == "embedded":
        return ScoringPool(judge, workers=max(1, usable_cores() // sharing))
    return ScoringPool(judge, workers=1, largest_chunk=4 * recipe.judge.concurrency)


def open_judge_table(judge: JudgeReward, store: GroupStore) -> ScoreTable:
    """Make or open the table of the judge beside ``store``."""
    return ScoreTable.create_or_open(store, "judge", provenance=judge.version, command="gdro eval")
