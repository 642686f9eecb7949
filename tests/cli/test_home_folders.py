"""Paths at home: ``~`` in every option that takes a path, and a home folder that is not known."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_type_hints

import pytest
import typer

from gdro_cli.cli.commands import app
from tests.support.faulty import check, command

PATHS = {"DIR", "FILE", "DATA", "RUN"}
"""How the help names a path."""


def parameters(group: typer.Typer) -> Iterator[tuple[str, Any, Any]]:
    """Command, type and declaration of every option and argument."""
    for one in group.registered_commands:
        assert one.callback is not None
        for hint in get_type_hints(one.callback, include_extras=True).values():
            if hasattr(hint, "__metadata__"):
                yield one.callback.__name__, hint.__origin__, hint.__metadata__[0]
    for inner in group.registered_groups:
        assert inner.typer_instance is not None
        yield from parameters(inner.typer_instance)


def test_every_path_of_the_command_line_may_be_at_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """``--out=~/x`` reaches the command as it is: a shell expands ``~`` only where a word begins with it."""
    monkeypatch.setenv("HOME", str(tmp_path))
    found = [(where, kind, one) for where, kind, one in parameters(app) if "Path" in str(kind) or one.metavar in PATHS]
    assert {one.metavar for _, _, one in found} == PATHS
    for where, _, one in found:
        assert one.parser is not None, (where, one.metavar)
        assert str(one.parser("~/x")) == str(tmp_path / "x"), (where, one.metavar)


def test_a_folder_of_runs_at_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    check(command("runs", "~/out"), 2, f"no run in {tmp_path}/out")


@pytest.mark.parametrize("given", [["runs", "~nosuch/x"], ["compare", "a", "b", "--out=~nosuch/x"]])
def test_a_user_that_does_not_exist(given: list[str]) -> None:
    check(command(*given), 2, "~nosuch/x: there is no user nosuch: correct it")


@pytest.mark.parametrize("key", ["clip.model", "pickscore.model", "hpsv2.base", "aesthetic.model"])
def test_a_reward_of_a_user_that_does_not_exist(key: str) -> None:
    done = command("rewards", "check", key.split(".")[0], f"--set=reward.{key}=~nosuch/m")
    check(done, 2, f"reward.{key} names ~nosuch/m, but there is no user nosuch")


def test_a_model_of_a_user_that_does_not_exist(tmp_path: Path) -> None:
    done = command("sample", "--recipe=smoke", "--set=model.path=~nosuch/m", f"--out={tmp_path}")
    check(done, 2, "model.path names ~nosuch/m, but there is no user nosuch")


@pytest.mark.parametrize("variable", ["GDRO_CACHE", "XDG_CACHE_HOME"])
def test_a_cache_of_a_user_that_does_not_exist(variable: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("GDRO_CACHE", raising=False)
    monkeypatch.setenv(variable, "~nosuch/c")
    check(command("score", "--recipe=smoke", f"--out={tmp_path}"), 2, f"{variable} names ~nosuch/c, but there is no")


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("unshare") is None, reason="needs a user without a name")
def test_a_user_without_a_home_folder(tmp_path: Path) -> None:
    nobody = ["unshare", "-U", "--map-user=12345"]
    if subprocess.run([*nobody, "true"], check=False, capture_output=True).returncode:
        pytest.skip("this machine allows no user namespace")
    words = [*nobody, sys.executable, "-P", "-m", "gdro_cli", "score", "--recipe", "smoke", "--out", str(tmp_path)]
    done = subprocess.run(words, env={"PATH": os.environ["PATH"]}, capture_output=True, text=True, check=False)
    assert done.returncode == 2 and "set the environment variable HOME or" in done.stderr, done.stderr
