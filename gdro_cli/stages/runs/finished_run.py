"""A finished run: its adapter, and everything that a model card or an export says about it.

``adapter.json`` in a run describes ``pytorch_lora_weights.safetensors`` beside it: which step and kind of weights it
has, their digest, the base model, and how the pipeline is called. It is written last, so a run that has it is finished.
"""

from __future__ import annotations

import keyword
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from gdro_cli.config.load import build_recipe
from gdro_cli.config.recipe import Recipe
from gdro_cli.errors import PrerequisiteError, StoreError
from gdro_cli.files import read_file, sha256_file
from gdro_cli.models.adapters import LORA_FILE
from gdro_cli.models.diffusers_flow import FAMILIES
from gdro_cli.runtime.run import RunFolder
from gdro_cli.stages.runs.results import RESULTS, Results, Weights, read_results
from gdro_cli.stages.runs.weights import ADAPTER_NOTE, RunWeights
from gdro_cli.stages.setup.session import Session
from gdro_cli.stages.setup.store import evaluation_plan

SCHEMA: Literal[1] = 1
_OF_MODEL = {"path", "pipeline", "family", "dtype"}
_DTYPES = ("float32", "bfloat16")
_AGAIN = "run `gdro train` with its recipe, --set and --out (a finished run is not trained again)"


class AdapterWeights(Weights):
    """Which weights the adapter file has."""

    sha256: str
    """Of the file."""


class AdapterNote(BaseModel):
    """What ``adapter.json`` says. Its texts go into code and pages, so they must be known ones."""

    model_config = ConfigDict(frozen=True, strict=True, allow_inf_nan=False)

    schema_: Literal[1] = Field(alias="schema")
    model: dict[str, Any]
    """Identity, family and dtype of the base model."""
    weights: AdapterWeights
    call: dict[str, Any]
    """Arguments of the pipeline beside the prompt, as in the evaluation."""

    @model_validator(mode="after")
    def _check_texts(self) -> Self:
        texts = {key: self.model.get(key) for key in _OF_MODEL}
        if not all(isinstance(text, str) for text in texts.values()):
            raise ValueError("it does not describe a model")
        family = FAMILIES.get(self.model["pipeline"])
        if family is None or texts["family"] != family.family:
            raise ValueError("it names no pipeline and family that this version knows")
        if texts["dtype"] not in _DTYPES:
            raise ValueError("it names no number format that this version knows")
        if not all(key.isidentifier() and not keyword.iskeyword(key) for key in self.call):
            raise ValueError("it names no argument of the pipeline that this version knows")
        return self


@dataclass(frozen=True, slots=True)
class FinishedRun:
    """A run whose training has ended."""

    folder: RunFolder
    recipe: Recipe
    """The recipe that the adapter in the folder was written by."""
    model: Mapping[str, Any]
    """As in ``AdapterNote``."""
    weights: AdapterWeights
    call: Mapping[str, Any]
    """As in ``AdapterNote``."""
    manifest: Mapping[str, Any]
    environment: Mapping[str, Any]
    results: Results | None
    """The latest ``gdro eval``."""

    @property
    def name(self) -> str:
        """The run's name."""
        return self.folder.path.resolve().name

    @property
    def grid(self) -> str | None:
        """The latest evaluation's image grid, relative to the run; None where it has none inside the run."""
        name = None if self.results is None else self.results.grid
        if name is None or "\0" in name or ":" in name or not name.endswith(".png"):
            return None
        if not os.path.isfile(self.folder.path / name):  # unlike Path's own, it takes any text
            return None
        inside = (self.folder.path / name).resolve().is_relative_to(self.folder.path.resolve())
        return name if inside else None

    @property
    def adapter_file(self) -> Path:
        """The adapter, in diffusers' format."""
        return self.folder.path / LORA_FILE


def write_adapter_note(session: Session, folder: RunFolder, weights: RunWeights) -> Path:
    """Write ``adapter.json``: what the adapter in the run is. Returns the file."""
    recipe, model = session.recipe, session.model
    plan = evaluation_plan(session, images_per_prompt=1)
    note = AdapterNote(
        schema=SCHEMA,
        model={**model.identity, "family": model.family, "dtype": str(model.dtype).removeprefix("torch.")},
        weights=AdapterWeights(
            kind=recipe.eval.weights,
            checkpoint=weights.checkpoint,
            step=weights.step,
            chosen_by=None if weights.chosen_by is None else dict(weights.chosen_by),
            sha256=sha256_file(folder.path / LORA_FILE),
        ),
        call=model.pipeline_call(steps=plan.steps, guidance=plan.guidance, height=plan.height, width=plan.width),
    )
    return folder.write_json(ADAPTER_NOTE, note.model_dump(mode="json", by_alias=True))


def open_finished(path: Path) -> FinishedRun:
    """Open a finished run.

    Raises:
        PrerequisiteError: ``path`` is not a run, or the run is not finished.
        StoreError: a file is damaged.
        UserError: this version does not know its recipe.
    """
    folder = RunFolder(path)
    if not (path / "manifest.json").is_file():
        raise PrerequisiteError(f"{path} is not a run: name a folder that `gdro train` made (gdro runs lists them)")
    if not (path / ADAPTER_NOTE).is_file() or not (path / LORA_FILE).is_file():
        raise PrerequisiteError(f"the run {path} is not finished: {_AGAIN}")
    note = _read_note(path / ADAPTER_NOTE)
    if sha256_file(path / LORA_FILE) != note.weights.sha256:
        raise StoreError(f"{path / LORA_FILE} is not the file that {ADAPTER_NOTE} describes: {_AGAIN}")
    return FinishedRun(
        folder=folder,
        recipe=build_recipe(folder.read_object("resolved.json"), source=str(path / "resolved.json")),
        model=note.model,
        weights=note.weights,
        call=note.call,
        manifest=_read_part(folder, "manifest.json", inputs=dict),
        environment=_read_part(folder, "environment.json", packages=dict, devices=list),
        results=read_results(path) if (path / RESULTS).is_file() else None,
    )


def _read_note(path: Path) -> AdapterNote:
    data = read_file(path, remedy=_AGAIN)
    try:
        return AdapterNote.model_validate_json(data)
    except ValidationError as error:
        faults = error.errors(include_url=False)
        if any(fault["loc"] == ("schema",) for fault in faults):
            raise StoreError(f"{path} was written by another version: {_AGAIN}") from error
        reason = faults[0].get("ctx", {}).get("error")
        raise StoreError(f"{path} is damaged: {f'{reason}; ' if reason else ''}{_AGAIN}") from error


def _read_part(folder: RunFolder, name: str, **types: type) -> dict[str, Any]:
    """A JSON object in which some keys, where it has them, have these types."""
    value = folder.read_object(name)
    if not all(isinstance(value.get(key, kind()), kind) for key, kind in types.items()):
        raise StoreError(f"{folder.path / name} is damaged at {' or '.join(types)}: {_AGAIN}")
    return value
