"""A finished run, opened for those who want to use or pass on what it trained.

``adapter.json`` in a run says what ``pytorch_lora_weights.safetensors`` beside it is: of which step and kind, by which
model, with which digest, and how the pipeline is called. It is written last, so a run that has it is finished.
"""

from __future__ import annotations

import keyword
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gdro_cli.config.load import build_recipe
from gdro_cli.config.recipe import Recipe
from gdro_cli.errors import PrerequisiteError, StoreError
from gdro_cli.files import sha256_file
from gdro_cli.models.adapters import LORA_FILE
from gdro_cli.models.diffusers_flow import FAMILIES
from gdro_cli.runtime.run import RunFolder
from gdro_cli.stages.runs.results import read_shown
from gdro_cli.stages.runs.weights import ADAPTER_NOTE, RunWeights
from gdro_cli.stages.setup.session import Session
from gdro_cli.stages.setup.store import evaluation_plan

_SCHEMA = 1
_OF_WEIGHTS = {"kind", "checkpoint", "step"}
_OF_MODEL = {"path", "pipeline", "family", "dtype"}
_DTYPES = ("float32", "bfloat16")
_AGAIN = "run `gdro train` with its recipe, --set and --out (a finished run is not trained again)"


@dataclass(frozen=True, slots=True)
class FinishedRun:
    """A run whose training has ended, and what is known of it."""

    folder: RunFolder
    recipe: Recipe
    """The recipe that the adapter in the folder was written by."""
    model: Mapping[str, Any]
    """Identity, family and dtype of the base model."""
    weights: Mapping[str, Any]
    """Kind, checkpoint and step of the adapter, by what it was chosen, and the SHA-256 of its file."""
    call: Mapping[str, Any]
    """Arguments of the pipeline beside the prompt, as in the evaluation."""
    manifest: Mapping[str, Any]
    environment: Mapping[str, Any]
    results: Mapping[str, Any] | None
    """What the latest ``gdro eval`` found."""

    @property
    def name(self) -> str:
        """The run's name."""
        return self.folder.path.resolve().name

    @property
    def grid(self) -> str | None:
        """The latest evaluation's picture grid, relative to the run; None where it has none inside the run."""
        name = None if self.results is None else self.results.get("grid")
        if not isinstance(name, str) or "\0" in name or ":" in name or not name.endswith(".png"):
            return None
        if not os.path.isfile(self.folder.path / name):  # unlike Path's own, it takes any text
            return None
        inside = (self.folder.path / name).resolve().is_relative_to(self.folder.path.resolve())
        return name if inside else None

    @property
    def adapter_file(self) -> Path:
        """The adapter, in diffusers' format."""
        return self.folder.path / LORA_FILE


def describe_adapter(session: Session, folder: RunFolder, weights: RunWeights) -> Path:
    """Write ``adapter.json``: what the adapter in the run is. Returns the file."""
    recipe, model = session.recipe, session.model
    plan = evaluation_plan(session, images_per_prompt=1)
    note = {
        "schema": _SCHEMA,
        "model": {**model.identity, "family": model.family, "dtype": str(model.dtype).removeprefix("torch.")},
        "weights": {
            "kind": recipe.eval.weights,
            "checkpoint": weights.checkpoint,
            "step": weights.step,
            "chosen_by": weights.chosen_by,
            "sha256": sha256_file(folder.path / LORA_FILE),
        },
        "call": model.pipeline_call(steps=plan.steps, guidance=plan.guidance, height=plan.height, width=plan.width),
    }
    return folder.write_json(ADAPTER_NOTE, note)


def open_finished(path: Path) -> FinishedRun:
    """Open a finished run.

    Raises:
        PrerequisiteError: there is no run, it is not finished, or an earlier version finished it.
        StoreError: a file is damaged.
        UserError: this version does not know its recipe.
    """
    folder = RunFolder(path)
    if not (path / "manifest.json").is_file():
        raise PrerequisiteError(f"{path} is no run: name a folder that `gdro train` made (gdro runs lists them)")
    if not (path / ADAPTER_NOTE).is_file() or not (path / LORA_FILE).is_file():
        raise PrerequisiteError(f"the run {path} is not finished, or was finished by an earlier version: {_AGAIN}")
    note, manifest = folder.read_json(ADAPTER_NOTE), folder.read_object("manifest.json")
    try:
        weights, model, call = dict(note["weights"]), dict(note["model"]), dict(note["call"])
        known = note["schema"] == _SCHEMA and isinstance(manifest["inputs"], dict)
        asked = weights["sha256"]
        complete = weights.keys() >= _OF_WEIGHTS and model.keys() >= _OF_MODEL
    except (KeyError, TypeError, ValueError) as error:
        raise StoreError(f"{path / ADAPTER_NOTE} is damaged: {_AGAIN}") from error
    if not complete:
        raise StoreError(f"{path / ADAPTER_NOTE} is damaged: {_AGAIN}")
    if not known:
        raise StoreError(f"{path / ADAPTER_NOTE} was written by another version: {_AGAIN}")
    strange = _strange(model, call)
    if strange is not None:
        raise StoreError(f"{path / ADAPTER_NOTE} is damaged: it names no {strange} that this version knows; {_AGAIN}")
    if sha256_file(path / LORA_FILE) != asked:
        raise StoreError(f"{path / LORA_FILE} is not the file that {ADAPTER_NOTE} describes: {_AGAIN}")
    return FinishedRun(
        folder=folder,
        recipe=build_recipe(folder.read_object("resolved.json"), source=str(path / "resolved.json")),
        model=model,
        weights=weights,
        call=call,
        manifest=manifest,
        environment=_environment(folder),
        results=read_shown(folder) if (path / "results.json").is_file() else None,
    )


def _strange(model: Mapping[str, Any], call: Mapping[str, Any]) -> str | None:
    """What in the note cannot be put into code and pages."""
    texts = all(isinstance(model[key], str) for key in _OF_MODEL)
    family = FAMILIES.get(model["pipeline"]) if texts else None
    if family is None or model["family"] != family.family:
        return "pipeline and family"
    if model["dtype"] not in _DTYPES:
        return "number format"
    names = all(isinstance(key, str) and key.isidentifier() and not keyword.iskeyword(key) for key in call)
    return None if names else "argument of the pipeline"


def _environment(folder: RunFolder) -> dict[str, Any]:
    found = folder.read_object("environment.json")
    if isinstance(found.get("packages", {}), dict) and isinstance(found.get("devices", []), list):
        return found
    raise StoreError(f"{folder.path / 'environment.json'} is damaged at packages or devices: {_AGAIN}")
