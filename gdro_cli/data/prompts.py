"""Load the prompts that a recipe names: a file, or a built-in set."""

from __future__ import annotations

import difflib
import os
from pathlib import Path
from typing import TYPE_CHECKING

from gdro_cli.data.builtin import OCR_SETS, ocr_prompts
from gdro_cli.data.promptfile import read_prompt_file
from gdro_cli.data.records import PromptRecord, PromptSet, quoted_text
from gdro_cli.errors import UserError

if TYPE_CHECKING:
    from gdro_cli.config.sections import PromptSource

__all__ = ["PromptRecord", "PromptSet", "builtin_sets", "load_prompts", "quoted_text"]

_BUILTIN = {"ocr": tuple(OCR_SETS)}
"""The built-in sets of each task."""


def builtin_sets(task: str) -> tuple[str, ...]:
    """Names of the built-in prompt sets for a task."""
    return _BUILTIN.get(task, ())


def load_prompts(source: PromptSource, *, task: str, base_dir: Path | None = None) -> PromptSet:
    """Load the prompts of ``source`` for ``task`` (``ocr`` or ``geneval``).

    A relative ``file`` is looked for in ``base_dir`` (the recipe's folder) first, then in the working folder.
    Equal records are kept once and counted; ``count`` keeps the first so many that remain. Raises UserError
    for a file that cannot be used (naming lines), an unknown built-in set, or fewer prompts than ``count``.
    """
    if source.builtin is not None:
        return _load_builtin(source, source.builtin, task=task)
    if source.file is None:
        raise UserError("a prompt source needs a file or the name of a built-in set")
    path = _locate(source.file, base_dir)
    prompts = PromptSet.of(read_prompt_file(path, task=task))
    if source.count is None:
        return prompts
    if source.count > len(prompts):
        raise UserError(
            f"the prompt file {path} holds {len(prompts)} different prompts, but count asks for {source.count}"
        )
    return prompts.first(source.count)


def _load_builtin(source: PromptSource, name: str, *, task: str) -> PromptSet:
    known = builtin_sets(task)
    if name not in known:
        near = difflib.get_close_matches(name, known, n=1)
        choice = f"choose one of {', '.join(known)}" if known else "name a prompt file"
        hint = f"did you mean {near[0]}?" if near else choice
        raise UserError(f"there is no built-in prompt set {name!r} for the task {task}: {hint}")
    texts = ocr_prompts(
        name,
        count=source.count,
        seed=source.seed,
        two_line_share=source.two_line_share,
        min_letters=source.min_letters,
        max_letters=source.max_letters,
    )
    return PromptSet.of(PromptRecord.of(text, target=quoted_text(text)) for text in texts)


def _locate(file: str, base_dir: Path | None) -> Path:
    path = Path(os.path.expanduser(file))
    if base_dir is None or path.is_absolute():
        return path
    beside = base_dir / path
    return beside if os.path.exists(beside) else path
