"""The Dockerfile and compose.yaml name commands, options, keys and extras that exist; no image is built."""

from __future__ import annotations

import re
import shlex
import tomllib
from pathlib import Path
from typing import Any

import typer.main
import yaml

from gdro_cli.cli.commands import app
from gdro_cli.config.load import load_recipe

ROOT = Path(__file__).resolve().parents[2]
SERVICES = yaml.safe_load((ROOT / "compose.yaml").read_text(encoding="utf-8"))["services"]
DOCKERFILE = (ROOT / "Dockerfile").read_text(encoding="utf-8")


def read(arguments: list[str]) -> tuple[str, dict[str, Any]]:
    """The command that gdro finds in its arguments, and its options; click refuses what does not exist."""
    command: Any = typer.main.get_command(app)
    names = []
    while hasattr(command, "commands"):
        name, *arguments = arguments
        command = command.commands[name]
        names.append(name)
    return " ".join(names), command.make_context(names[-1], arguments).params


def test_the_server_serves_what_the_training_asks() -> None:
    name, server = read(shlex.split(SERVICES["rewards"]["command"]))
    assert name == "rewards serve"
    name, training = read(shlex.split(SERVICES["train"]["command"]))
    assert name == "train"
    reward: Any = load_recipe(training["recipe"], overrides=training["overrides"]).reward
    assert reward.kind == "http"
    assert reward.http.url == f"http://rewards:{server['port']}"
    assert reward.http.api_key_env == server["key_env"]
    assert {server["key_env"]} == set(SERVICES["rewards"]["environment"]) == set(SERVICES["train"]["environment"])


def test_the_image_installs_an_extra_that_the_server_needs_and_runs_gdro() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert re.findall(r"^ARG EXTRAS=(.*)", DOCKERFILE, re.MULTILINE) == ["serve"]
    assert "serve" in project["optional-dependencies"]
    assert re.findall(r'^ENTRYPOINT \["(\w+)"\]', DOCKERFILE, re.MULTILINE) == list(project["scripts"])
