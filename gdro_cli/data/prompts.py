"""Load the prompts that a recipe names: a file, or a built-in set."""

from __future__ import annotations

import os
from pathlib import Path

from gdro_cli.config.prompt_sets import fitting_sets
from gdro_cli.config.sections import PromptSource
from gdro_cli.core.quotes import quoted_text
from gdro_cli.data.builtin import ocr_prompts
from gdro_cli.data.geneval_prompts import GENEVAL_SETS, geneval_prompts
from gdro_cli.data.promptfile import read_prompt_set
from gdro_cli.data.records import PromptReader, PromptRecord, PromptSet
from gdro_cli.errors import UserError

__all__ = ["PromptRecord", "PromptSet", "draw_prompts", "load_prompts"]


def load_prompts(source: PromptSource, *, reward: PromptReader) -> PromptSet:
    """Load the prompts of ``source`` and check that ``reward`` can use all of them.

    Duplicates are dropped and counted, on request also bad lines; ``count`` then limits the prompts to the first ones.

    Args:
        source: a valid section of a recipe.
        reward: checks what a prompt carries.

    Raises:
        UserError: the file is missing or has bad lines, the built-in set does not fit the reward, or there are fewer
            prompts than ``count``.
    """
    if source.builtin is not None:
        return _load_builtin(source, source.builtin, reward=reward)
    path = Path(os.path.expanduser(source.file or ""))  # unlike Path.expanduser, it accepts any text
    prompts = read_prompt_set(path, reward=reward, skip_bad=source.skip_bad)
    if source.count is None:
        return prompts
    if source.count > len(prompts):
        raise UserError(
            f"the prompt file {path} has {len(prompts)} different prompts, fewer than the count {source.count}: "
            "lower count"
        )
    return prompts.first(source.count)


def draw_prompts(source: PromptSource, name: str) -> list[PromptRecord]:
    """The prompts of the built-in set ``name`` with the options of ``source``.

    Raises:
        UserError: no prompt fits the options, or there are fewer prompts than ``count``.
    """
    if name in GENEVAL_SETS:
        return geneval_prompts(name, count=source.count, seed=source.seed, tags=source.tags, plurals=source.plurals)
    texts = ocr_prompts(
        name,
        count=source.count,
        seed=source.seed,
        two_line_share=source.two_line_share,
        min_letters=source.min_letters,
        max_letters=source.max_letters,
    )
    return [PromptRecord.of(text, target=quoted_text(text)) for text in texts]


def _load_builtin(source: PromptSource, name: str, *, reward: PromptReader) -> PromptSet:
    records = draw_prompts(source, name)
    problem = _problem(records, reward)
    if problem is not None:
        sets = [other for other in fitting_sets(reward.needs) if _fits(other, reward)]
        remedy = f"choose one of {', '.join(sets)}" if sets else "name a prompt file"
        raise UserError(f"the built-in prompt set {name} does not fit the reward {reward.name} ({problem}): {remedy}")
    return PromptSet.of(records)


def _problem(records: list[PromptRecord], reward: PromptReader) -> str | None:
    """What is wrong with the first prompt that the reward cannot use; None if it can use all of them."""
    for record in records:
        try:
            reward.read_prompt(record.prompt, target=record.target, metadata=record.metadata)
        except ValueError as error:
            return str(error)
    return None


def _fits(name: str, reward: PromptReader) -> bool:
    return _problem(draw_prompts(PromptSource(builtin=name), name), reward) is None
