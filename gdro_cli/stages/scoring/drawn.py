"""Scores of pictures as they come from the model, before any store has checked them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from PIL import Image

from gdro_cli.models.latents import NOT_FINITE
from gdro_cli.rewards.base import PromptLike, Score
from gdro_cli.rewards.pool import ScoringPool
from gdro_cli.runtime.interrupt import StopFlag


def score_drawn(
    pool: ScoringPool, pictures: Sequence[Image.Image | None], prompts: Sequence[PromptLike], *, stop: StopFlag
) -> list[Score]:
    """Score ``pictures[i]`` for ``prompts[i]``; one that is not finite is shown to nobody, and its score is missing.

    Raises:
        ScoringStopped: a stop was asked for, and the scores were not there soon after.
    """
    there = [(picture, prompt) for picture, prompt in zip(pictures, prompts, strict=True) if picture is not None]
    shown, asked = [picture for picture, _ in there], [prompt for _, prompt in there]
    found = iter(pool.score(shown, asked, stop=lambda: stop.requested))
    return [Score(None, NOT_FINITE) if picture is None else next(found) for picture in pictures]


def why_none(reasons: Iterable[str | None]) -> str:
    """Of pictures none of which has a score: the reason of the first, and what to do."""
    known = list(reasons)
    if all(reason == NOT_FINITE for reason in known):
        return f"({NOT_FINITE}): lower train.lr or take another model.dtype"
    return f"({known[0]}): mend the reward engine and run the same command again"
