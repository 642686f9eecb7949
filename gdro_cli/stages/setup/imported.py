"""Imported data: stores of users' own images, which a recipe names in ``prompts.train.imported``."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from gdro_cli.config.sections import NAME
from gdro_cli.data.records import PromptReader
from gdro_cli.data.store import GroupStore
from gdro_cli.errors import PrerequisiteError, UserError
from gdro_cli.identity import digest
from gdro_cli.models.base import FlowModel

COMMAND = "gdro import"


def check_name(name: str, what: str) -> str:
    """Return the name of imported data or scores. Raises UserError, which calls it ``what``, unless recipes take it."""
    if not re.fullmatch(NAME, name):
        raise UserError(f"{what} cannot be called {name!r}: give --name letters, digits, dots, dashes or underscores")
    return name


def encoding_identity(model: FlowModel, *, height: int, width: int) -> dict[str, Any]:
    """What a user's image and prompt become depends on this, as JSON, apart from the image and the prompt."""
    return {
        "model": {key: value for key, value in model.identity.items() if key not in ("path", "adapter")},
        "dtype": str(model.dtype).removeprefix("torch."),
        "max_sequence_length": model.max_sequence_length,
        "vae_tiling": model.memory.vae_tiling,
        "height": height,
        "width": width,
    }


def imported_path(workspace: Path, name: str, model: FlowModel, *, height: int, width: int) -> Path:
    """Where the data ``name`` lies for this model and image size, whether or not it exists."""
    key = digest(encoding_identity(model, height=height, width=width))
    return workspace / "stores" / f"imported-{name}-{key}"


def open_imported(workspace: Path, name: str, model: FlowModel, *, height: int, width: int) -> GroupStore:
    """The complete store of the data ``name``.

    Raises:
        PrerequisiteError: it has not been imported, or not for this model and image size, or its import is not done.
        StoreError: it is damaged.
    """
    path = imported_path(workspace, name, model, height=height, width=width)
    again = f"{COMMAND} DATA --name {name} with this recipe"
    if not GroupStore.exists(path):
        others = sorted(other.name for other in path.parent.glob(f"imported-{name}-*"))
        why = "no data" if not others else f"data for another model or image size ({', '.join(others)})"
        raise PrerequisiteError(f"{workspace} has {why} of the name {name}: run {again}, {width} x {height}")
    store = GroupStore.open(path, command=COMMAND)
    if store.missing_shards():
        raise PrerequisiteError(f"the import of {name} into {path} is not complete: run {again} again")
    return store


def check_imported_prompts(store: GroupStore, reward: PromptReader) -> None:
    """Raise UserError if the reward cannot score one of the prompts."""
    for record in store.prompts:
        try:
            reward.read_prompt(record.prompt, target=record.target, metadata=record.metadata)
        except ValueError as error:
            raise UserError(
                f"the reward {reward.name} cannot score the imported prompt {record.prompt[:80]!r} ({error}): name the"
                " scores to train on in train.scores, or another reward"
            ) from error
