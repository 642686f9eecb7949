"""Load the prompts that a recipe names: a file, or a built-in set."""

from __future__ import annotations

import os
from collections.abc import Collection
from pathlib import Path
from typing import TYPE_CHECKING

from gdro_cli.core.geneval import VOCABULARIES
from gdro_cli.data.builtin import OCR_SETS, ocr_prompts
from gdro_cli.data.geneval_prompts import GENEVAL_SETS, geneval_prompts, vocabulary_of
from gdro_cli.data.promptfile import read_prompt_file
from gdro_cli.data.records import PromptRecord, PromptSet, quoted_text
from gdro_cli.errors import UserError
from gdro_cli.suggest import similar

if TYPE_CHECKING:
    from gdro_cli.config.sections import PromptSource

__all__ = ["PromptRecord", "PromptSet", "builtin_sets", "load_prompts", "quoted_text"]

_BUILTIN = {"ocr": tuple(OCR_SETS), "geneval": tuple(GENEVAL_SETS)}
"""The built-in sets of each task."""


def builtin_sets(task: str) -> tuple[str, ...]:
    """Names of the built-in prompt sets for a task."""
    return _BUILTIN.get(task, ())


def load_prompts(
    source: PromptSource,
    *,
    task: str,
    base_dir: Path | None = None,
    classes: Collection[str] | None = None,
) -> PromptSet:
    """Load the prompts of ``source`` for ``task`` (``ocr`` or ``geneval``).

    A relative ``file`` is looked for in ``base_dir`` (the recipe's folder) first, then in the working folder.
    Equal records are kept once and counted; ``count`` keeps the first so many that remain. ``classes`` are the
    ones that GenEval prompts may ask for; ``None`` allows any. Raises UserError for a file that cannot be used
    (naming lines), an unknown built-in set or one that asks for other classes, or fewer prompts than ``count``.
    """
    if source.builtin is not None:
        return _load_builtin(source, source.builtin, task=task, classes=classes)
    if source.file is None:
        raise UserError("a prompt source needs a file or the name of a built-in set")
    path = _locate(source.file, base_dir)
    prompts = PromptSet.of(read_prompt_file(path, task=task, classes=classes))
    if source.count is None:
        return prompts
    if source.count > len(prompts):
        raise UserError(
            f"the prompt file {path} holds {len(prompts)} different prompts, but count asks for {source.count}"
        )
    return prompts.first(source.count)


def _load_builtin(source: PromptSource, name: str, *, task: str, classes: Collection[str] | None) -> PromptSet:
    known = builtin_sets(task)
    if name not in known:
        choice = f": choose one of {', '.join(known)}" if known else ": name a prompt file"
        hint = similar(name, known) or choice
        raise UserError(f"there is no built-in prompt set {name!r} for the task {task}{hint}")
    if task == "geneval":
        _check_vocabulary(name, classes)
        return PromptSet.of(
            geneval_prompts(name, count=source.count, seed=source.seed, tags=source.tags, plurals=source.plurals)
        )
    texts = ocr_prompts(
        name,
        count=source.count,
        seed=source.seed,
        two_line_share=source.two_line_share,
        min_letters=source.min_letters,
        max_letters=source.max_letters,
    )
    return PromptSet.of(PromptRecord.of(text, target=quoted_text(text)) for text in texts)


def _check_vocabulary(name: str, classes: Collection[str] | None) -> None:
    """Raises UserError when the built-in GenEval set ``name`` asks for classes that are not in ``classes``."""
    asked = VOCABULARIES[vocabulary_of(name)]
    unknown = [label for label in asked if classes is not None and label not in classes]
    if unknown:
        fitting = [other for other in GENEVAL_SETS if set(VOCABULARIES[vocabulary_of(other)]) <= set(classes or ())]
        raise UserError(
            f"the built-in prompt set {name} asks for objects such as {unknown[0]!r}, which the reward's detector does "
            f"not know: {'choose one of ' + ', '.join(fitting) if fitting else 'name a prompt file'}"
        )


def _locate(file: str, base_dir: Path | None) -> Path:
    path = Path(os.path.expanduser(file))
    if base_dir is None or path.is_absolute():
        return path
    beside = base_dir / path
    return beside if os.path.exists(beside) else path
