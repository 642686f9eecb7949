"""``gdro rewards``: the rewards of this installation, a check of one, a new package, and a server."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from gdro_cli.cli.options import DebugOption, SetOption, path_at_home

rewards = typer.Typer(
    help="List rewards, check one, write a new one, or serve one to other machines.",
    invoke_without_command=True,
    pretty_exceptions_enable=False,
)
NameArgument = Annotated[str, typer.Argument(metavar="NAME", help="A reward (gdro rewards lists them).")]


@rewards.callback()
def default(context: typer.Context) -> None:
    """List rewards, check one, write a new one, or serve one. Without a command, list them."""
    if context.invoked_subcommand is None:
        list_()


@rewards.command(name="list")
def list_(
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON, with every setting.")] = False,
    debug: DebugOption = False,
) -> None:
    """List the built-in rewards and those of installed packages: what prompts must carry, and their settings."""
    from gdro_cli.cli.tables import print_table
    from gdro_cli.rewards.listing import list_rewards

    listed = list_rewards()
    if as_json:
        return typer.echo(json.dumps([reward.to_json() for reward in listed], indent=2))
    rows = []
    for reward in listed:
        keys = ", ".join(doc.path.removeprefix(f"reward.{reward.name}.") for doc in reward.settings) or "none"
        purpose = "" if reward.cls is None else reward.cls.purpose
        rows.append([reward.name, reward.source, reward.needs, purpose, reward.problem or keys])
    print_table("Rewards", ["name", "from", "needs of a prompt", "purpose", "settings (reward.NAME.KEY)"], rows)


@rewards.command(name="check")
def check(
    name: NameArgument,
    images: Annotated[
        Path | None,
        typer.Option("--images", metavar="DIR", parser=path_at_home, help="Images to score. Default: drawn ones."),
    ] = None,
    prompts: Annotated[
        Path | None,
        typer.Option("--prompts", metavar="FILE", parser=path_at_home, help="Their prompts. Default: built-in ones."),
    ] = None,
    overrides: SetOption = None,
    debug: DebugOption = False,
) -> None:
    """Score a few images twice: values, time per image, memory, and whether two processes agree."""
    from gdro_cli.cli.tables import print_result
    from gdro_cli.config.load import load_reward_section
    from gdro_cli.runtime.interrupt import work_begins
    from gdro_cli.stages.scoring import check_reward as stage

    section = load_reward_section(name, overrides=overrides or ())
    work_begins()
    result = stage.run(section, images=images, prompts=prompts)
    print_result(f"Reward {name}", result.summary)
    stage.refuse(result)


@rewards.command(name="new")
def new(
    name: Annotated[str, typer.Argument(metavar="NAME", help="Name of the reward: letters, digits, '_' and '-'.")],
    folder: Annotated[
        Path | None,
        typer.Option("--folder", metavar="DIR", parser=path_at_home, help="Folder of the package. Default: ./NAME."),
    ] = None,
    debug: DebugOption = False,
) -> None:
    """Write a package with a reward that works, its test and its entry point, to be changed into yours."""
    from gdro_cli.cli.tables import print_result
    from gdro_cli.rewards.new_package import write_package

    path = Path(name) if folder is None else folder
    module = write_package(name, path)[1]
    train = f"gdro train --recipe plain --set reward.kind={name}"
    print_result(
        "New reward",
        {"change": module, "install": f"pip install -e {path}", "check": f"gdro rewards check {name}"}
        | {"train": train},
    )


@rewards.command(name="serve")
def serve(
    name: NameArgument,
    host: Annotated[str, typer.Option("--host", help="Address. Default: this machine only.")] = "127.0.0.1",
    port: Annotated[int, typer.Option("--port", min=0, max=65535, help="Port; 0 for any free one.")] = 8000,
    key_env: Annotated[
        str | None,
        typer.Option("--key-env", metavar="VARIABLE", help="Environment variable with the key that clients must send."),
    ] = None,
    overrides: SetOption = None,
    debug: DebugOption = False,
) -> None:
    """Serve a reward to `reward.kind: http`, so that its packages have an environment or a machine of their own."""
    from gdro_cli.config.load import load_reward_section
    from gdro_cli.stages.scoring import serve_reward as stage

    section = load_reward_section(name, overrides=overrides or ())
    stage.run(section, host=host, port=port, key_env=key_env, say=lambda text: typer.echo(text, err=True))
