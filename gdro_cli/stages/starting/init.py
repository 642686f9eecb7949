"""``gdro init``: a folder with a commented recipe, its prompts or the form of its data, and the commands to run.

The recipe extends the shipped recipe that fits the model and the reward, and repeats the keys that users change first
with their values. For another model it stands alone.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from gdro_cli.config.layers import file_layers, merge_layers
from gdro_cli.config.load import build_recipe, load_recipe, load_reward_section, shipped_recipes
from gdro_cli.config.prompt_sets import fitting_sets
from gdro_cli.config.recipe import Recipe
from gdro_cli.config.rewards import MIX, reward_needs
from gdro_cli.config.sections import PromptSource
from gdro_cli.config.yamlfile import dump_yaml_line, read_yaml
from gdro_cli.data.prompts import draw_prompts
from gdro_cli.errors import PrerequisiteError, UserError
from gdro_cli.files import new_folder
from gdro_cli.model_source import ModelSource
from gdro_cli.suggest import similar

DataForm = Literal["scores", "pairs", "demonstrations"]

_TINY = "tiny"
_MODELS = {"flux": "flux-ocr", "sd35": "sd35-ocr"}
"""Short name of a model -> the shipped recipe that names its weights."""
_TABLE_LINES: dict[DataForm, dict[str, Any]] = {
    "scores": {"prompt": 'a sign that says "OPEN"', "images": ["a.png", "b.png"], "scores": [0.2, 0.9]},
    "pairs": {"prompt": 'a sign that says "OPEN"', "chosen": "b.png", "rejected": "a.png"},
    "demonstrations": {"prompt": 'a sign that says "OPEN"', "image": "b.png"},
}
"""One line of a table of each form (docs/own-data.md). The recipe ``own-FORM`` trains on it."""
_USUAL = {"clip": [20, 35], "pickscore": [17, 24], "hpsv2": [0.2, 0.35], "aesthetic": [4, 7]}
"""Usual values of rewards that do not go from 0 to 1 (docs/rewards.md): the range of a mixture of one."""
_REWARDS: dict[str, dict[str, Any]] = {
    "http": {"http": {"url": "http://127.0.0.1:8000"}},
    "vlm": {"vlm": {"base_url": "http://127.0.0.1:8000/v1", "model": "NAME"}},
    MIX: {MIX: {"weights": {"ocr": 0.5, "ocr.similarity": 0.5}}},
    **{name: {"kind": MIX, MIX: {"weights": {name: 1}, "ranges": {name: ends}}} for name, ends in _USUAL.items()},
}
"""What the section ``reward`` needs beside the name of a reward."""
_FOR_PHOTOS: dict[str, dict[str, Any]] = {
    "ocr": {"ocr": {"recognition_width": 320}},
    "geneval": {"geneval": {"objective": "accuracy", "detector": "mask2former", "colours": "clip"}},
}
"""Settings of rewards for models other than the embedded one, as in the recipes for FLUX.1."""
_PROMPTS = 16
"""Example prompts: two steps of eight groups."""

_KEYS = {
    "model.path": "`tiny`, a diffusers folder, or a Hub id such as owner/name",
    "prompts.train": "what to train on",
    "prompts.validation": "for the evaluation points; their results may choose settings",
    "prompts.eval": "held out, for `gdro eval` alone",
    "sample.images_per_prompt": "images in a group",
    "sample.steps": "from noise to image; the model's card names a number",
    "sample.guidance": "guidance scale; the model's card names a number",
    "sample.height": "pixels",
    "sample.width": "pixels",
    "reward.kind": "`gdro rewards` lists all rewards and their settings",
    "method.name": "or another one; `gdro recipes fields method` has the keys of each",
    "method.k": "images of a group that a step compares",
    "method.k_policy": "`whole`: smaller groups are used as they are; `drop`: they are left out",
    "method.tau": "temperature in units of the reward: the lower, the more the best image counts",
    "method.beta": "strength of the implicit reward: if it is too low, the images collapse",
    "method.gamma": "weight of the best image of a group, which keeps its likelihood high",
    "train.scores": "name of the imported scores",
    "train.steps": "optimizer steps",
    "train.groups_per_step": "groups of each step",
    "train.lr": "learning rate",
    "train.lora": "rank and scale of the adapter",
    "train.micro_batch": "images per forward pass; `auto`: what fits the GPU",
    "train.eval_every": "steps between evaluation points; 0: none",
    "eval.images_per_prompt": "images of each held-out prompt",
}
"""The keys that users change first, in the order of the recipe -> what the recipe says about them."""
_EXAMPLE_VALUES = {"sample.height": 512, "sample.width": 512, "train.micro_batch": "auto"}
"""Keys that the recipe shows behind a ``#`` if they are not set."""
_WIDTH = 120

_README = """\
# {name}

{what}, as `gdro init` wrote it.

Run these in this folder, in this order:

{commands}
A command that was stopped continues when it is run again. The results are in `gdro-out/runs/{name}-.../`.

- `recipe.yaml` has the keys that are changed first, each with a comment. `gdro recipes show recipe.yaml` prints all
  keys, `gdro recipes fields` explains them. After a change only what depends on it is made again.
{inputs}"""
_PROMPTS_ITEM = """\
- `{file}` has {count} example prompts: {form}.
  Put yours in their place. A model learns more from some hundred prompts, none of them among those of `prompts.eval`.
"""
_DATA_ITEM = """\
- `data.jsonl` is yours to bring, with its images: one JSON object per line, paths relative to the table. Other forms:
  docs/own-data.md.

        {line}
"""


@dataclass(frozen=True, slots=True)
class _Job:
    """What the user asked for, and what follows from it."""

    name: str
    model: str | None
    """``tiny``, ``flux``, ``sd35``; None for another model."""
    weights: str
    """The model's folder or Hub id."""
    reward: str
    section: dict[str, Any]
    """The section ``reward`` of the recipe."""
    needs: frozenset[str]
    """What prompts must carry."""
    data: DataForm | None

    @property
    def what(self) -> str:
        """The job in words."""
        return f"Training {self.weights} with the reward {self.reward}" + (
            f" on {self.data} of your own" if self.data else ""
        )

    @property
    def prompt_sets(self) -> str | None:
        """The family of built-in prompt sets that the model knows and that carry what the reward needs."""
        families = ("ocr", "geneval") if self.model == _TINY else ("geneval-coco", "ocr")
        return next((name for name in families if f"{name}-train" in fitting_sets(self.needs)), None)

    @property
    def prompt_file(self) -> str | None:
        """The file of example prompts. Plain lines can carry a text in double quotes, and nothing else."""
        if self.data and self.prompt_sets:
            return None
        return "prompts.txt" if self.needs <= {"target"} else "prompts.jsonl"

    @property
    def parent(self) -> str | None:
        """The shipped recipe that fits."""
        if self.model is None:
            return None
        if self.model == _TINY:
            own = {"ocr": "ocr", "geneval": "geneval", MIX: "ocr-mixed"}.get(self.reward, "plain")
            return f"own-{self.data}" if self.data else own
        task = "ocr" if self.prompt_sets == "ocr" else "geneval"
        return next(name for task in (self.reward, task) if (name := f"{self.model}-{task}") in shipped_recipes())


def run(folder: Path, *, model: str, reward: str, data: DataForm | None = None) -> dict[str, str]:
    """Write the folder of a job.

    Args:
        folder: a new or empty folder; its name becomes that of the recipe.
        model: ``tiny``, ``flux``, ``sd35``, a diffusers folder, or a Hub id.
        reward: any reward of this installation.
        data: the form of the user's own images to train on; None to sample images for prompts.

    Returns:
        what the command line prints.

    Raises:
        UserError: the folder is not empty, there is no such model or reward, or the reward has keys without a default.
        PrerequisiteError: the reward is of a plug-in that cannot be used.
        StoreError: the disk refuses.
    """
    path = _free(folder)
    name = re.sub(r"[^A-Za-z0-9._-]+", "-", path.name).strip("-._")[:64] or "job"
    known, weights = _model(model)
    section = {"kind": reward, **_REWARDS.get(reward, {}), **({} if known else _FOR_PHOTOS.get(reward, {}))}
    sets = [f"reward.{key}={dump_yaml_line(value)}" for key, value in section.items()]
    parts = load_reward_section(section["kind"], overrides=sets).parts
    needs = frozenset().union(*map(reward_needs, parts))
    job = _Job(name, known, weights, reward, section, needs, data)
    files = {"recipe.yaml": _recipe_text(job), "README.md": _readme_text(job)}
    if job.prompt_file:
        files[job.prompt_file] = _prompts_text(job)
    with new_folder(path) as partial:
        for file, text in files.items():
            (partial / file).write_text(text, encoding="utf-8")
    return {
        "recipe": str(folder / "recipe.yaml"),
        "extends": job.parent or "no other recipe",
        **({"prompts": str(folder / job.prompt_file)} if job.prompt_file else {}),
        "what to run": str(folder / "README.md"),
    }


def _free(folder: Path) -> Path:
    """The folder's full path. Raises ``UserError`` if nothing may be written there."""
    path = folder.resolve()
    if path.exists() and not (path.is_dir() and not any(path.iterdir())):
        raise UserError(f"{folder} exists and is not an empty folder, and nothing is overwritten: name a new one")
    if path == Path.cwd():
        raise UserError(f"{folder} is the current folder, and a new one would take its place: name a folder inside it")
    return path


def _model(given: str) -> tuple[str | None, str]:
    """The short name of a model, None if it has none, and its folder or Hub id."""
    known = {_TINY: _TINY} | {name: load_recipe(recipe).model.path for name, recipe in _MODELS.items()}
    for name, weights in known.items():
        if given in (name, weights):
            return name, weights
    try:
        source = ModelSource(given, key="--model")
    except PrerequisiteError as error:
        hint = similar(given, known) or f": name {', '.join(known)}, a diffusers folder, or a Hub id such as owner/name"
        raise UserError(f"there is no model {given!r}{hint}") from error
    if not source.on_hub and not (source.folder / "model_index.json").is_file():
        raise UserError(f"{given} has no model_index.json: name the folder of a diffusers pipeline")
    return None, given if source.on_hub else os.path.abspath(source.folder)


def _layer(job: _Job) -> dict[str, Any]:
    """What the recipe says beside what it extends."""
    layer: dict[str, Any] = {"model": {"path": job.weights}, "reward": job.section}
    if job.parent is None:
        layer["sample"] = {"steps": 28, "guidance": 3.5}
    inherited = load_recipe(job.parent).prompts.model_dump(exclude_defaults=True) if job.parent else {}
    sources = layer["prompts"] = {"train": {"imported": job.name} if job.data else {"file": job.prompt_file}}
    for split, kind, count in (("validation", "validation", 64), ("eval", "test", 256)):
        below = inherited.get(split, {})
        if below.get("builtin") in fitting_sets(job.needs):
            sources[split] = {key: below[key] for key in ("builtin", "count")}
        elif job.prompt_sets:
            sources[split] = {"builtin": f"{job.prompt_sets}-{kind}", "count": count}
        else:
            sources[split] = {"file": job.prompt_file}
    if job.data:
        own = f"own-{job.data}"
        changes = read_yaml(shipped_recipes()[own])
        layer["method"] = {"name": load_recipe(own).method.name, **changes["method"]}
        layer["train"] = changes["train"]
    return layer


def _recipe_text(job: _Job) -> str:
    layer = _layer(job)
    below = file_layers(shipped_recipes()[job.parent]) if job.parent else []
    recipe = build_recipe({**merge_layers([*below, layer]), "name": job.name})
    lines = [f"# {job.what}.", "# README.md has the commands; `gdro recipes fields` explains every key.", ""]
    if job.parent:
        lines.append(f"extends: {job.parent} # a shipped recipe, which sets whatever is not set here")
    lines.append(f"name: {dump_yaml_line(job.name)} # of runs")
    section = ""
    for key, value, comment in _rows(recipe, layer):
        inner, _, leaf = key.partition(".")
        if inner != section:
            section = inner
            lines += ["", f"{section}:"]
        mark = "# " if value is None else ""
        line = f"  {mark}{leaf}: {dump_yaml_line(_EXAMPLE_VALUES[key] if value is None else value)}"
        if comment and len(line) + len(comment) + 3 > _WIDTH:
            lines += [f"  # {comment}", line]
        else:
            lines.append(f"{line} # {comment}" if comment else line)
    return "\n".join([*lines, ""])


def _rows(recipe: Recipe, layer: dict[str, Any]) -> Iterator[tuple[str, Any, str]]:
    """The keys that the recipe shows, their values (None: not set), and their comments."""
    resolved = recipe.resolved() | {"prompts": layer["prompts"]}
    method = recipe.group_method
    left_out = {"method.k_policy"} if recipe.prompts.train.imported is None else {"sample.images_per_prompt"}
    if not method.needs_order:
        left_out |= {"method.beta", "method.tau"}  # they do nothing for one image per prompt
    if recipe.model.path == _TINY:
        left_out |= {key for key in _EXAMPLE_VALUES if _value(resolved, key) is None}
    for key, comment in _KEYS.items():
        value = _value(resolved, key)
        if key == "train.lora":
            value = {name: value[name] for name in ("rank", "alpha")}
        if key not in left_out and (value is not None or key in _EXAMPLE_VALUES):
            yield key, value, comment
        if key == "reward.kind":
            yield from ((f"reward.{name}", value, "") for name, value in layer["reward"].items() if name != "kind")


def _value(resolved: dict[str, Any], key: str) -> Any:
    section, leaf = key.split(".")
    return resolved[section].get(leaf)


def _prompts_text(job: _Job) -> str:
    if job.prompt_sets is None:
        return json.dumps({"prompt": "a prompt of yours", **dict.fromkeys(sorted(job.needs), "...")}) + "\n"
    name = f"{job.prompt_sets}-train"
    records = draw_prompts(PromptSource(builtin=name, count=_PROMPTS), name)
    if job.needs <= {"target"}:
        return "".join(f"{record.prompt}\n" for record in records)
    return "".join(json.dumps({"prompt": record.prompt, **record.metadata}) + "\n" for record in records)


def _readme_text(job: _Job) -> str:
    commands = {"gdro recipes check recipe.yaml": "is the recipe correct?"}
    if job.model != _TINY and not os.path.isdir(job.weights):
        commands = {f"hf download {job.weights}": "if it has a licence, accept that on the Hub first"} | commands
    inputs = ""
    if job.data:
        inputs = _DATA_ITEM.format(line=json.dumps(_TABLE_LINES[job.data]))
        commands |= {
            "gdro import data.jsonl --recipe recipe.yaml --dry-run": "what is in your table",
            "gdro import data.jsonl --recipe recipe.yaml": "encode images and prompts, once",
        }
    if job.prompt_file:
        form = "plain text, one per line"
        if job.needs == {"target"}:
            form += ", with the text to write in double quotes"
        elif job.needs:
            form = f"a JSON object per line, with {', '.join(('prompt', *sorted(job.needs)))}"
        count = _PROMPTS if job.prompt_sets else 1
        inputs += _PROMPTS_ITEM.format(file=job.prompt_file, count=count, form=form)
    train = "train an adapter" if job.data else "sample images, score them, train an adapter"
    commands |= {
        "gdro train --recipe recipe.yaml --dry-run": "what would run, and what it needs",
        "gdro train --recipe recipe.yaml": train,
        "gdro eval --recipe recipe.yaml": "base against trained on held-out prompts",
    }
    width = max(map(len, commands))
    lines = "".join(f"    {command:{width}}  # {why}\n" for command, why in commands.items())
    return _README.format(name=job.name, what=job.what, commands=lines, inputs=inputs)
