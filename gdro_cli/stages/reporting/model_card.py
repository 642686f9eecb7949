"""The model card: README.md of a run and of what ``gdro export`` makes of it, as the Hugging Face Hub shows it.

It says what was trained, how, from what, with which results, and how to load it. It has no local path and no address.
"""

from __future__ import annotations

import platform
import re
from dataclasses import dataclass
from pathlib import Path
from string import Template
from typing import Literal

from huggingface_hub import ModelCardData

import gdro_cli
from gdro_cli.config.recipe import Recipe
from gdro_cli.files import write_bytes
from gdro_cli.models.adapters import LORA_FILE
from gdro_cli.models.diffusers_flow import FAMILIES
from gdro_cli.models.lora_files import Format
from gdro_cli.rewards.registry import reward_class
from gdro_cli.stages.reporting.evaluation_report import measure_names, signal_rows
from gdro_cli.stages.reporting.html import flat
from gdro_cli.stages.reporting.markdown import Markdown, escape, fenced, render
from gdro_cli.stages.reporting.number_format import MISSING
from gdro_cli.stages.reporting.redaction import changed_keys, command, last_part
from gdro_cli.stages.runs.finished_run import FinishedRun, open_finished
from gdro_cli.stages.setup.model import EMBEDDED

CARD = "README.md"
EXPORTED_RECIPE = "recipe.yaml"
EXPORTED_GRID = "images.png"
_VERSIONS = ("gdro_cli", "torch", "diffusers", "transformers", "peft", "accelerate")
_PROMPT = "a prompt"
_HUB_ID = re.compile(r"[A-Za-z0-9_][\w.-]*/[A-Za-z0-9_][\w.-]*", re.ASCII)


@dataclass(frozen=True, slots=True)
class CardFolder:
    """The folder that a card describes."""

    kind: Literal["run", "adapter", "merged"] = "run"
    name: str | None = None
    """The repository of the Hub that users load it from; None for a local folder."""
    rounding: float | None = None
    """Of a merge: the share of the update that the base's dtype rounds away."""
    format: Format = "diffusers"
    """Of an adapter."""
    file: str = LORA_FILE
    """Name of an adapter's file."""


def write_card(run: Path) -> Path:
    """Write the card of a finished run into it, from its files alone. Raises as ``open_finished``."""
    path = run / CARD
    write_bytes(path, card(open_finished(run), CardFolder()))
    return path


def card(run: FinishedRun, folder: CardFolder) -> bytes:
    """The card as a Markdown page with its metadata in front."""
    results, recipe, grid = run.results, run.recipe, run.grid
    reward = reward_class(recipe.reward.kind)
    measures = {} if results is None else results.measures
    exported = folder.kind != "run"
    recipe_file = EXPORTED_RECIPE if exported else "resolved.json"
    return render(
        "card.md.j2",
        front=Markdown(f"{front_matter(run, folder).to_yaml()}\n"),
        kind=folder.kind,
        name=run.name,
        base=_base(run),
        initial=_initial(run),
        method=recipe.method.title,
        task=reward.purpose,
        version=gdro_cli.__version__,
        results=results,
        measures=[(name, measures[name]) for name in measure_names(measures, reward)],
        signals=[] if results is None else signal_rows(results.signals, reward),
        grid=None if grid is None else EXPORTED_GRID if exported else grid,
        weights=run.weights,
        same_weights=results is None or str(results.weights) == str(run.weights),
        load=fenced(loading_code(run, folder), "python"),
        changed=list(flat(changed_keys(recipe))),
        recipe_file=recipe_file,
        format=folder.format,
        file=folder.file,
        call=", ".join(f"{key}={value!r}" for key, value in run.call.items()),
        provenance=list(_provenance(run, exported=exported)),
        commands=fenced("\n".join(_commands(recipe, recipe_file)), "sh"),
        rounding=folder.rounding,
    )


def front_matter(run: FinishedRun, folder: CardFolder) -> ModelCardData:
    """The card's metadata. It names no licence: that is for the base model's authors."""
    task = "image-to-image" if FAMILIES[run.model["pipeline"]].edits else "text-to-image"
    tags = [task, "diffusers", "gdro", run.recipe.method.name, run.recipe.reward.kind, run.model["family"]]
    on_hub, merged = _on_hub(run), folder.kind == "merged"
    return ModelCardData(
        base_model=run.model["path"] if on_hub else None,
        base_model_relation=("finetune" if merged else "adapter") if on_hub else None,
        library_name="peft" if folder.format == "peft" else "diffusers",
        pipeline_tag=task,
        tags=tags if merged else [*tags, "lora"],
    )


def loading_code(run: FinishedRun, folder: CardFolder) -> str:
    """Python that loads and calls the model of the card's folder, for a format that Python loads."""
    pipeline, dtype = run.model["pipeline"], run.model["dtype"]
    lines = ["import torch", f"from diffusers import {pipeline}"]
    embedded = run.recipe.model.path == EMBEDDED
    if embedded:
        lines.insert(0, "import gdro_cli.tiny.autoencoder  # where diffusers finds the class of the autoencoder")
        lines.append("from gdro_cli.embedded import tiny_model_path")
    here = repr(folder.name or "path/to/this/folder")
    base = "tiny_model_path()" if embedded else repr(_base_name(run))
    prompt = _PROMPT if run.results is None else run.results.prompts[0].prompt
    arguments = ", ".join(f"{key}={value!r}" for key, value in run.call.items())
    lines += [
        "",
        f"pipe = {pipeline}.from_pretrained({here if folder.kind == 'merged' else base}, dtype=torch.{dtype})",
    ]
    if folder.format == "peft":
        options = f"weight_name={folder.file!r}, prefix='base_model.model'"
        lines.append(f"pipe.transformer.load_lora_adapter({here}, {options})")
    elif folder.kind != "merged":
        lines.append(f"pipe.load_lora_weights({here})")
    if setup := FAMILIES[pipeline].pipeline_setup:
        lines.append(Template(setup).safe_substitute({key: repr(value) for key, value in run.call.items()}))
    given = repr(prompt)
    if FAMILIES[pipeline].edits:
        size = f"({run.call.get('width')!r}, {run.call.get('height')!r})"
        lines[1:1] = ["from PIL import Image, ImageOps"]
        lines.append(f"source = ImageOps.fit(Image.open('image.png').convert('RGB'), {size}, Image.Resampling.LANCZOS)")
        given = f"source, {prompt!r}"
    lines.append(f"image = pipe({given}, {arguments}).images[0]")
    return "\n".join(lines)


def _commands(recipe: Recipe, file: str) -> list[str]:
    """The command lines that make the run and its results again; DATA is what was imported."""
    brought = [f"{command(recipe, 'import', file=file)} DATA"] if recipe.prompts.train.imported else []
    return [*brought, *(command(recipe, stage, file=file) for stage in ("train", "eval"))]


def _on_hub(run: FinishedRun) -> bool:
    path = run.model["path"]
    return _HUB_ID.fullmatch(path) is not None and "commit" in run.model and run.recipe.model.path != EMBEDDED


def _initial(run: FinishedRun) -> str | None:
    """The name of the adapter that the training started from; None without one."""
    path = run.recipe.train.lora.init
    return None if path is None else last_part(path)


def _base_name(run: FinishedRun) -> str:
    if run.recipe.model.path == EMBEDDED:
        return EMBEDDED
    return str(run.model["path"]) if _on_hub(run) else last_part(str(run.model["path"]))


def _base(run: FinishedRun) -> Markdown:
    """The base model in words."""
    if run.recipe.model.path == EMBEDDED:
        return Markdown("the model embedded in gdro\\_cli")
    name = escape(_base_name(run))
    return Markdown(f"[{name}](https://huggingface.co/{_base_name(run)})" if _on_hub(run) else f"the model {name}")


def _provenance(run: FinishedRun, *, exported: bool) -> list[tuple[str, str]]:
    """What the adapter came from, as (name, value)."""
    model, environment = run.model, run.environment
    state = f"commit {model['commit']}" if "commit" in model else f"SHA-256 {model.get('digest', MISSING)}"
    packages = environment.get("packages", {})
    machine = [environment.get("platform", platform.system()), *environment.get("devices", ())]
    return [
        ("run", run.name),
        ("begun", str(run.manifest.get("created", MISSING))),
        ("adapter", f"{run.weights}; {LORA_FILE}{' of the run' if exported else ''}, SHA-256 {run.weights.sha256}"),
        ("base model", f"{_base_name(run)} ({model['pipeline']}), {state}, in {model['dtype']}"),
        *([("started from", f"{_initial(run)}, SHA-256 {model.get('adapter', MISSING)}")] if _initial(run) else []),
        *((f"digest of the {name}", str(value)) for name, value in sorted(run.manifest.get("inputs", {}).items())),
        ("recipe", f"{run.recipe.name}, digest {run.recipe.digest()}"),
        ("software", ", ".join(f"{name} {packages[name]}" for name in _VERSIONS if packages.get(name))),
        ("commit of gdro_cli", str(environment.get("commit") or MISSING)),
        ("Python", str(environment.get("python", MISSING))),
        ("machine", ", ".join(map(str, machine))),
        *([] if run.results is None else [("evaluation protocol", run.results.protocol_name)]),
    ]
