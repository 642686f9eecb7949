"""Load the prompts that a recipe names: a file, or a built-in set."""

from __future__ import annotations

import os
from pathlib import Path

from gdro_cli.config.prompt_sets import BUILTIN_SETS, fitting_sets
from gdro_cli.config.sections import PromptSource
from gdro_cli.core.quotes import quoted_text
from gdro_cli.data.builtin import ocr_prompts
from gdro_cli.data.geneval_prompts import GENEVAL_SETS, geneval_prompts
from gdro_cli.data.promptfile import read_prompt_file
from gdro_cli.data.records import PromptReader, PromptRecord, PromptSet
from gdro_cli.errors import UserError
from gdro_cli.suggest import similar

__all__ = ["PromptRecord", "PromptSet", "draw_prompts", "load_prompts"]


def load_prompts(source: PromptSource, *, reward: PromptReader) -> PromptSet:
    """Load the prompts of ``source``, all of which ``reward`` can use.

    Equal records are kept once and counted; ``count`` keeps the first so many that remain.

    Raises:
        UserError: a file that cannot be used (naming lines), a built-in set that does not exist or does not fit the
            reward, or fewer prompts than ``count``.
    """
    if source.builtin is not None:
        return _load_builtin(source, source.builtin, reward=reward)
    if source.file is None:
        raise UserError("a prompt source needs a file or the name of a built-in set")
    path = Path(os.path.expanduser(source.file))  # unlike Path's own, it takes any text
    prompts = PromptSet.of(read_prompt_file(path, reward=reward))
    if source.count is None:
        return prompts
    if source.count > len(prompts):
        raise UserError(
            f"the prompt file {path} holds {len(prompts)} different prompts, but count asks for {source.count}"
        )
    return prompts.first(source.count)


def draw_prompts(source: PromptSource, name: str) -> list[PromptRecord]:
    """The prompts of the built-in set ``name``, by the options of ``source``.

    Raises:
        UserError: options that cannot be, or fewer prompts than ``count``.
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
    if name not in BUILTIN_SETS:
        sets = fitting_sets(reward.needs)
        raise UserError(f"there is no built-in prompt set {name!r}{similar(name, sets) or f': {_choice(sets)}'}")
    records = draw_prompts(source, name)
    problem = _problem(records, reward)
    if problem is not None:
        sets = tuple(other for other in fitting_sets(reward.needs) if _fits(other, reward))
        raise UserError(
            f"the built-in prompt set {name} does not fit the reward {reward.name} ({problem}): {_choice(sets)}"
        )
    return PromptSet.of(records)


def _problem(records: list[PromptRecord], reward: PromptReader) -> str | None:
    """What is wrong with the first prompt that the reward cannot use; None where it can use all of them."""
    for record in records:
        try:
            reward.read_prompt(record.prompt, target=record.target, metadata=record.metadata)
        except ValueError as error:
            return str(error)
    return None


def _fits(name: str, reward: PromptReader) -> bool:
    return _problem(draw_prompts(PromptSource(builtin=name), name), reward) is None


def _choice(sets: tuple[str, ...]) -> str:
    return f"choose one of {', '.join(sets)}" if sets else "name a prompt file"
