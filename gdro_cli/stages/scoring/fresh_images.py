"""Scores of images as they come from the model, before any store has checked them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from PIL import Image

from gdro_cli.models.latents import NOT_FINITE
from gdro_cli.rewards.base import PromptLike, Score
from gdro_cli.rewards.pool import ScoringPool
from gdro_cli.runtime.interrupt import StopFlag


def score_images(
    pool: ScoringPool, images: Sequence[Image.Image | None], prompts: Sequence[PromptLike], *, stop: StopFlag
) -> list[Score]:
    """Score ``images[i]`` for ``prompts[i]``; None, an image that is not finite, has no score.

    Raises:
        ScoringStopped: a stop was asked for, and the scores did not come soon after.
    """
    pairs = [(image, prompt) for image, prompt in zip(images, prompts, strict=True) if image is not None]
    scores = iter(
        pool.score([image for image, _ in pairs], [prompt for _, prompt in pairs], stop=lambda: stop.requested)
    )
    return [Score(None, NOT_FINITE) if image is None else next(scores) for image in images]


def why_none(reasons: Iterable[str | None]) -> str:
    """For images none of which has a score: the reason of the first, and what to do."""
    reasons = list(reasons)
    if all(reason == NOT_FINITE for reason in reasons):
        return f"({NOT_FINITE}): lower train.lr or choose another model.dtype"
    return f"({reasons[0]}): fix the reward engine and run the same command again"
