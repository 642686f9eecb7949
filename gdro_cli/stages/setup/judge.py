"""The recipe's judge, which rates the quality of images and knows nothing of the reward."""

from __future__ import annotations

from gdro_cli.config.recipe import Recipe
from gdro_cli.embedded import tiny_judge_path
from gdro_cli.rewards.chat import read_template
from gdro_cli.rewards.judge.base import Judge, JudgeReward
from gdro_cli.rewards.judge.unified_prompt import TEMPLATE
from gdro_cli.stages.setup.model import EMBEDDED
from gdro_cli.stages.setup.reward import open_reward


def open_judge(recipe: Recipe, *, edits: bool = False) -> JudgeReward | None:
    """The recipe's judge, with the axes that suit the reward and the model; None if the recipe has no judge.

    Args:
        recipe: the recipe.
        edits: whether its model edits images. A judge does not see the image that a prompt edits, so it cannot say
            how well the edit was made: alignment has no part in u, unless it is the only axis that suits the reward.

    Raises:
        PrerequisiteError: its weights are missing.
        UserError: the file of `judge.template` cannot be used.
    """
    kind = recipe.judge.kind
    if kind == "auto":
        kind = "embedded" if recipe.model.path == EMBEDDED else "none"
    if kind == "none":
        return None
    axes = open_reward(recipe).judge_axes
    if edits:
        axes = tuple(axis for axis in axes if axis != "alignment") or axes
    return JudgeReward(_open(recipe, kind), axes=axes)


def _open(recipe: Recipe, kind: str) -> Judge:
    if kind == "embedded":
        from gdro_cli.rewards.judge.embedded import EmbeddedJudge

        return EmbeddedJudge(tiny_judge_path())
    settings = recipe.judge
    path = settings.template
    template = TEMPLATE if path is None else read_template(path, key="judge.template")
    if kind == "unified-reward-local":
        from gdro_cli.rewards.judge.unified_reward_local import UnifiedRewardLocal

        return UnifiedRewardLocal(settings.model or "", template=template)
    from gdro_cli.rewards.judge.unified_reward import UnifiedRewardJudge

    return UnifiedRewardJudge(
        settings.base_url or "",
        settings.model or "",
        api_key_env=settings.api_key_env,
        concurrency=settings.concurrency,
        timeout=settings.timeout,
        retries=settings.retries,
        template=template,
    )
