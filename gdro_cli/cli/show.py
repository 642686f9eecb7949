"""Commands that only look: ``gdro recipes``, ``gdro prompts``, ``gdro runs``, ``gdro env``."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from gdro_cli.cli.options import DEFAULT_OUT, DebugOption, SetOption
from gdro_cli.errors import UserError
from gdro_cli.files import parse_json
from gdro_cli.runtime.terminal import printable

recipes = typer.Typer(
    help="List, show and check recipes, and explain their keys.",
    invoke_without_command=True,
    pretty_exceptions_enable=False,
)
RecipeArgument = Annotated[str, typer.Argument(metavar="NAME|PATH", help="A recipe file or a shipped recipe.")]


@recipes.callback()
def default(context: typer.Context) -> None:
    """List, show and check recipes, and explain their keys; with no command, list them."""
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
    """Print a recipe with every key, defaults and `extends` resolved; the output is a recipe itself."""
    from gdro_cli.config.load import load_recipe

    resolved = load_recipe(recipe, overrides=overrides or ()).resolved()
    if as_json:
        text = json.dumps(resolved, indent=2, ensure_ascii=False)
        text = re.sub("[\x7f-\x9f]", lambda found: f"\\u{ord(found[0]):04x}", text)  # a terminal would obey them
    else:
        import yaml

        text = yaml.safe_dump(resolved, sort_keys=False, allow_unicode=True, width=100).rstrip()
    typer.echo(text)


@recipes.command(name="check")
def check(
    names: Annotated[list[str] | None, typer.Argument(metavar="[NAME|PATH]...", help="Default: all shipped.")] = None,
    overrides: SetOption = None,
    debug: DebugOption = False,
) -> None:
    """Load recipes and report everything wrong with them."""
    from gdro_cli.config.load import load_recipe, shipped_recipes

    faults = []
    for name in names or [str(path) for path in shipped_recipes().values()]:
        try:
            recipe = load_recipe(name, overrides=overrides or ())
        except UserError as error:
            faults.append(str(error))
        else:
            typer.echo(f"{printable(name)}: correct (digest {recipe.digest()})")
    if faults:
        raise UserError("\n".join(faults))


@recipes.command(name="fields")
def fields(
    prefix: Annotated[str, typer.Argument(metavar="[KEY]", help="Only this key or section.")] = "",
) -> None:
    """Explain every key: type, default, meaning."""
    from rich.console import Console
    from rich.text import Text

    from gdro_cli.config.keys import describe_fields, field_names
    from gdro_cli.suggest import similar_key

    chosen = [doc for doc in describe_fields() if not prefix or f"{doc.path}.".startswith(f"{prefix}.")]
    if not chosen:
        raise UserError(f"There is no recipe key {prefix!r}{similar_key(prefix, field_names(sections=True)) or '.'}")
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
    count: Annotated[int | None, typer.Option(min=1, help="Number of prompts. Default: as in a recipe.")] = None,
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
        hint = similar(name, BUILTIN_SETS) or f": choose one of {', '.join(BUILTIN_SETS)}."
        raise UserError(f"There is no built-in prompt set {name!r}{hint}")
    source = PromptSource(builtin=name, count=count, seed=seed, plurals=plurals)
    for problem in source_problems(source, sets=BUILTIN_SETS, path=name):
        raise UserError(f"{problem.path}: {problem.message}.")
    from gdro_cli.data.prompts import draw_prompts

    for record in draw_prompts(source, name):
        target = {} if record.target is None else {"target": record.target}
        typer.echo(json.dumps({"prompt": record.prompt, **target, **record.metadata}, ensure_ascii=False))


def env(debug: DebugOption = False) -> None:
    """Print versions, devices and what is installed; for bug reports."""
    from gdro_cli.cli.tables import print_pairs
    from gdro_cli.runtime.environment import environment

    print_pairs("Environment", _flat(environment()))


def runs(
    out: Annotated[Path, typer.Argument(metavar="[DIR]", help="Folder given as --out.")] = DEFAULT_OUT,
    debug: DebugOption = False,
) -> None:
    """List the training runs in a folder."""
    from gdro_cli.cli.tables import print_table

    folders = sorted(path.parent for path in (out / "runs").glob("*/recipe.json"))
    if not folders:
        raise UserError(f"There is no run in {out}: make one with gdro train, or name the folder that was its --out.")
    rows = [[folder.name, *_run_row(folder)] for folder in folders]
    print_table(f"Runs in {out / 'runs'}", ["run", "recipe", "method", "step", "results"], rows)


def _run_row(folder: Path) -> list[str]:
    recipe = _json(folder / "recipe.json")
    method, train = ({} if not isinstance(recipe.get(key), dict) else recipe[key] for key in ("method", "train"))
    steps = f"{_last_step(folder / 'metrics.jsonl')} of {train.get('steps', '?')}"
    results = "yes" if (folder / "results.json").is_file() else "no"
    return [str(recipe.get("name", "?")), str(method.get("name", "?")), steps, results]


def _json(path: Path) -> dict[str, Any]:
    try:
        data = parse_json(path.read_bytes())
    except (OSError, ValueError):
        return {}  # a run that cannot be read is still listed, with question marks
    return data if isinstance(data, dict) else {}


def _last_step(path: Path) -> str:
    """The step of the last whole row of a metrics file; 0 if it has none."""
    from gdro_cli.runtime.metrics import read_row

    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError):
        return "0"
    for line in reversed(lines):
        try:
            return str(read_row(line).step)
        except ValueError:
            continue
    return "0"


def _flat(values: dict[str, Any], prefix: str = "") -> list[tuple[str, str]]:
    rows: list[tuple[str, str]] = []
    for key, value in values.items():
        if isinstance(value, dict):
            rows += _flat(value, f"{prefix}{key}.")
        else:
            text = ", ".join(map(str, value)) if isinstance(value, list | tuple) else str(value)
            rows.append((f"{prefix}{key}", text))
    return rows
