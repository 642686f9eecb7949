"""The pages for users: they are filled, their links work, and their commands are commands that exist."""

from __future__ import annotations

import ast
import json
import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import pytest
import typer

from gdro_cli.cli.commands import app
from gdro_cli.config.load import load_recipe

ROOT = Path(__file__).parents[1]
PAGES = [
    *(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md")),
    *sorted((ROOT / "docs").rglob("*.md")),
    *sorted((ROOT / "docs").rglob("*.ipynb")),
]
MADE_BY_READERS = {"my.yaml", "recipe.yaml", "reward.kind=brightness", "method.name=hinge"}
"""Recipes and settings that exist after a page's own steps."""


def text_of(page: Path) -> str:
    text = page.read_text(encoding="utf-8")
    if page.suffix == ".md":
        return text
    return "\n\n".join("".join(cell["source"]) for cell in json.loads(text)["cells"])


def commands_of(text: str) -> Iterator[list[str]]:
    """The arguments of each `gdro` in the blocks of commands, with the values of the variables set above it."""
    variables: dict[str, str] = {}
    for line in re.findall(r"^    (\S.*)", text.replace("\\\n", " "), re.MULTILINE):
        filled = re.sub(r"\$([A-Z])\b", lambda match: variables[match[1]], line)
        for name, value in re.findall(r'\b([A-Z])="([^"]*)"', filled):
            variables[name] = value
        for command in re.split(r"&&|;", filled):
            if command.strip().startswith("gdro "):
                yield shlex.split(command, comments=True)[1:]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_pages_are_filled_and_their_links_work(page: Path) -> None:
    text = text_of(page)
    assert "@@" not in text
    links = [link for link in re.findall(r"\]\(([^)#]+)", text) if "://" not in link]
    assert [link for link in links if not (page.parent / link).exists()] == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_the_commands_of_pages_exist_with_their_options_and_keys(page: Path) -> None:
    for arguments in commands_of(text_of(page)):
        command, left = typer.main.get_command(app), arguments
        while left and left[0] in getattr(command, "commands", {}):
            command, left = command.commands[left[0]], left[1:]  # type: ignore[attr-defined]
        context = typer.Context(command)
        options, extra, _ = command.make_parser(context).parse_args([part for part in left if part != "..."])
        assert extra == [], arguments
        changes = options.get("overrides") or []
        if "recipe" in options and not {options["recipe"], *changes} & MADE_BY_READERS:
            load_recipe(options["recipe"], overrides=changes)


def test_messages_name_pages_and_sections_that_exist() -> None:
    named = set()
    for file in sorted((ROOT / "gdro_cli").rglob("*.py")):
        named |= set(re.findall(r"\b(docs/[\w-]+\.md)(?:#([\w-]+))?", file.read_text(encoding="utf-8")))
    assert len(named) > 10
    for page, section in named:
        headings = re.findall(r"^#+ (.+)$", (ROOT / page).read_text(encoding="utf-8"), re.MULTILINE)
        slugs = {re.sub(r"[^\w -]", "", heading).lower().replace(" ", "-") for heading in headings}
        assert not section or section in slugs, (page, section)


def test_messages_that_ask_to_install_something_name_a_page() -> None:
    messages = [
        ast.unparse(call)
        for file in sorted((ROOT / "gdro_cli").rglob("*.py"))
        for call in ast.walk(ast.parse(file.read_text(encoding="utf-8")))
        if isinstance(call, ast.Call) and ast.unparse(call.func) == "PrerequisiteError"
    ]
    installing = [message for message in messages if "pip install" in message]
    assert len(installing) > 5
    assert [message for message in installing if "docs/" not in message] == []


def test_commands_are_found() -> None:
    text = 'T="--set a=1"\n\n    T="--set b=2"\n    T="$T --set c=3"\n    gdro eval $T && gdro train  # no --more\n'
    assert list(commands_of(text)) == [["eval", "--set", "b=2", "--set", "c=3"], ["train"]]
    assert sum(len(list(commands_of(text_of(page)))) for page in PAGES) > 90
