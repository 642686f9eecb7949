"""Score rows, and the scoring of images that come straight from the model, which no store has checked."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from PIL import Image

from gdro_cli.data.records import PromptRecord
from gdro_cli.data.scores import ScoreRow
from gdro_cli.models.latents import NOT_FINITE
from gdro_cli.rewards.base import Score
from gdro_cli.rewards.pool import Pool
from gdro_cli.runtime.interrupt import StopFlag

Slot = tuple[PromptRecord, int]
"""Names an image: its prompt, and its index in the prompt's group."""


def score_rows(slots: Iterable[Slot], scores: Iterable[Score]) -> list[ScoreRow]:
    """The scores of images as rows. Raises ValueError if the numbers of slots and scores differ."""
    return [
        ScoreRow(prompt.id, index, score.value, score.reason, score.details)
        for (prompt, index), score in zip(slots, scores, strict=True)
    ]


def score_images(
    pool: Pool, images: Sequence[Image.Image | None], slots: Sequence[Slot], *, stop: StopFlag
) -> list[ScoreRow]:
    """Score ``images[i]``, which ``slots[i]`` names; an image that is not finite (None) is missing.

    Raises:
        ScoringStopped: after a request to stop.
    """
    finite = [image for image in images if image is not None]
    prompts = [prompt for image, (prompt, _) in zip(images, slots, strict=True) if image is not None]
    scores = iter(pool.score(finite, prompts, stop=lambda: stop.requested))
    return score_rows(slots, [Score(None, NOT_FINITE) if image is None else next(scores) for image in images])


def why_none(reasons: Iterable[str | None]) -> str:
    """For images none of which has a score: the first reason, and what to do."""
    first, *others = reasons
    if all(reason == NOT_FINITE for reason in (first, *others)):
        return f"({NOT_FINITE}): lower train.lr or take another model.dtype"
    return f"({first}): fix the reward engine and run the same command again"
