"""Commands that change nothing: ``gdro recipes``, ``prompts``, ``runs``, ``watch`` and ``env``."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from gdro_cli.cli.options import DEFAULT_OUT, DebugOption, OutOption, SetOption, path_at_home
from gdro_cli.errors import StoreError, UserError
from gdro_cli.files import at_home
from gdro_cli.runtime.terminal import printable

recipes = typer.Typer(
    help="List, show and check recipes, and explain their keys.",
    invoke_without_command=True,
    pretty_exceptions_enable=False,
)
RecipeArgument = Annotated[str, typer.Argument(metavar="NAME|PATH", help="A recipe file or a shipped recipe.")]


@recipes.callback()
def default(context: typer.Context) -> None:
    """List, show and check recipes, and explain their keys. Without a command, list them."""
    if context.invoked_subcommand is None:
        list_()


@recipes.command(name="list")
def list_() -> None:
    """List the shipped recipes."""
    from gdro_cli.cli.tables import print_table
    from gdro_cli.config.load import load_recipe, shipped_recipes

    rows = [[name, load_recipe(str(path)).description] for name, path in shipped_recipes().items()]
    print_table("Shipped recipes", ["name", "purpose"], rows)


@recipes.command(name="show")
def show(
    recipe: RecipeArgument,
    overrides: SetOption = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of YAML.")] = False,
    debug: DebugOption = False,
) -> None:
    """Print a recipe with every key, defaults and `extends` resolved. The output is itself a recipe."""
    from gdro_cli.config.load import load_recipe
    from gdro_cli.config.yamlfile import dump_yaml

    resolved = load_recipe(recipe, overrides=overrides or ()).resolved()
    if as_json:
        text = json.dumps(resolved, indent=2, ensure_ascii=False)
        text = re.sub("[\x7f-\x9f]", lambda match: f"\\u{ord(match[0]):04x}", text)  # a terminal would obey them
    else:
        text = dump_yaml(resolved).rstrip()
    typer.echo(text)


@recipes.command(name="check")
def check(
    names: Annotated[list[str] | None, typer.Argument(metavar="NAME|PATH", help="Default: all shipped.")] = None,
    overrides: SetOption = None,
    debug: DebugOption = False,
) -> None:
    """Load recipes and report everything wrong with them, with the meaning of each key that is wrong."""
    from gdro_cli.config.load import load_recipe, shipped_recipes
    from gdro_cli.config.validation import RecipeError

    problems = []
    for name in names or [str(path) for path in shipped_recipes().values()]:
        try:
            recipe = load_recipe(name, overrides=overrides or ())
        except UserError as error:
            problems.append(error.explained if isinstance(error, RecipeError) else str(error))
        else:
            typer.echo(f"{printable(name)}: correct (digest {recipe.digest()})")
    if problems:
        raise UserError("\n".join(problems))


@recipes.command(name="fields")
def fields(
    prefix: Annotated[str, typer.Argument(metavar="KEY", help="Only this key or section.")] = "",
) -> None:
    """Explain every key, with those of installed rewards: type, default, meaning."""
    from rich.console import Console
    from rich.text import Text

    from gdro_cli.config.keys import describe_fields, field_names
    from gdro_cli.config.rewards import REWARDS
    from gdro_cli.config.schema import schema_with
    from gdro_cli.rewards.registry import usable_plugins
    from gdro_cli.suggest import similar_key

    schema = schema_with([*REWARDS, *usable_plugins()])
    chosen = [doc for doc in describe_fields(schema) if not prefix or f"{doc.path}.".startswith(f"{prefix}.")]
    if not chosen:
        hint = similar_key(prefix, field_names(schema, sections=True))
        raise UserError(f"there is no recipe key {prefix!r}{hint or ': gdro recipes fields lists them'}")
    console = Console(highlight=False)
    for doc in chosen:
        head = Text(doc.path, style="bold")
        if not doc.section:
            head.append(f"  {doc.type}, default {doc.default}", style="not bold dim")
        if owners := ", ".join(doc.methods) or doc.reward:
            head.append(f"  only for {owners}", style="not bold dim")
        console.print(head, soft_wrap=True)
        console.print(Text(f"    {doc.text}"), soft_wrap=not console.is_terminal)


def prompts(
    name: Annotated[str, typer.Argument(metavar="NAME", help="A built-in prompt set, such as ocr-test.")],
    count: Annotated[int | None, typer.Option(min=1, help="Number of prompts. Default: that of a recipe.")] = None,
    seed: Annotated[int, typer.Option(min=0, help="Which draw of the set.")] = 0,
    plurals: Annotated[
        Literal["naive", "correct"], typer.Option(help="Plurals of a geneval-coco set: three knifes, or knives.")
    ] = "naive",
    debug: DebugOption = False,
) -> None:
    """Print a built-in prompt set as JSON Lines, which a recipe's `prompts.*.file` reads back."""
    from gdro_cli.config.prompt_sets import BUILTIN_SETS
    from gdro_cli.config.rules import source_problems
    from gdro_cli.config.sections import PromptSource
    from gdro_cli.suggest import similar

    if name not in BUILTIN_SETS:
        hint = similar(name, BUILTIN_SETS) or f": choose one of {', '.join(BUILTIN_SETS)}"
        raise UserError(f"there is no built-in prompt set {name!r}{hint}")
    source = PromptSource(builtin=name, count=count, seed=seed, plurals=plurals)
    for problem in source_problems(source, path=name):
        raise UserError(f"--{problem.path.removeprefix(f'{name}.')} {problem.message}")
    from gdro_cli.data.prompts import draw_prompts

    for record in draw_prompts(source, name):
        target = {} if record.target is None else {"target": record.target}
        typer.echo(json.dumps({"prompt": record.prompt, **target, **record.metadata}, ensure_ascii=False))


def env(debug: DebugOption = False) -> None:
    """Print versions, devices and installed packages, for bug reports."""
    from gdro_cli.cli.tables import print_pairs
    from gdro_cli.runtime.environment import environment

    print_pairs("Environment", _flat(environment()))


def runs(
    out: Annotated[
        Path, typer.Argument(metavar="DIR", parser=path_at_home, help="Folder given as --out.")
    ] = DEFAULT_OUT,
    debug: DebugOption = False,
) -> None:
    """List the training runs in a folder."""
    from gdro_cli.cli.tables import print_table

    folders = sorted(path.parent for path in (out / "runs").glob("*/recipe.json"))
    if not folders:
        raise UserError(f"there is no run in {out}: make one with gdro train, or name the folder that was its --out")
    rows = [[folder.name, *_run_row(folder)] for folder in folders]
    print_table(f"Runs in {out / 'runs'}", ["run", "recipe", "method", "step", "results"], rows)


def watch(
    run: Annotated[
        str | None,
        typer.Argument(metavar="RUN", parser=at_home, help="A run: its folder, or its name. Default: the newest."),
    ] = None,
    recipe: Annotated[
        str | None, typer.Option("--recipe", metavar="NAME|PATH", help="Watch the run of this recipe instead.")
    ] = None,
    overrides: SetOption = None,
    out: OutOption = DEFAULT_OUT,
    port: Annotated[int, typer.Option("--port", min=0, max=65535, help="Port; 0 for any free one.")] = 0,
    debug: DebugOption = False,
) -> None:
    """Show a run in a browser on this machine while it trains: curves, images, verdict, time left."""
    from gdro_cli.config.load import load_recipe
    from gdro_cli.runtime.interrupt import work_begins
    from gdro_cli.stages.watching import watch as stage

    if run is not None and recipe is not None:
        raise UserError("name a run or a recipe with --recipe, not both")
    if overrides and recipe is None:
        raise UserError("--set changes a recipe: name it with --recipe")
    loaded = None if recipe is None else load_recipe(recipe, overrides=overrides or ())
    work_begins()
    stage.run(stage.run_to_watch(run, loaded, out), port=port, say=lambda text: typer.echo(text, err=True))


def _run_row(folder: Path) -> list[str]:
    from gdro_cli.runtime.run import RunFolder

    run = RunFolder(folder)
    try:
        recipe, metrics = run.recipe, run.metrics()
        step = metrics[-1]["step"] if metrics else 0
        row = [str(recipe["name"]), str(recipe["method"]["name"]), f"{step} of {recipe['train']['steps']}"]
    except (StoreError, LookupError, TypeError):  # a damaged run is listed too
        row = ["?", "?", "?"]
    return [*row, "yes" if (folder / "results.json").is_file() else "no"]


def _flat(values: dict[str, Any], prefix: str = "") -> list[tuple[str, str]]:
    rows: list[tuple[str, str]] = []
    for key, value in values.items():
        if isinstance(value, dict):
            rows += _flat(value, f"{prefix}{key}.")
        else:
            text = ", ".join(map(str, value)) if isinstance(value, list | tuple) else str(value)
            rows.append((f"{prefix}{key}", text))
    return rows
