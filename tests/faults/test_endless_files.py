"""Pipes and devices in the place of files: what reads them would wait for ever, or fill the memory."""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from gdro_cli.cli.show import _run_row
from gdro_cli.config.yamlfile import read_yaml
from gdro_cli.files import append_bytes
from gdro_cli.runtime.checkpoint import load_checkpoint, save_checkpoint
from gdro_cli.runtime.run import RunFolder
from tests.support import small_store
from tests.support.faulty import Outcome, check, outcome

PATIENCE = 120.0
KINDS = ("pipe", "device")

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="there are no such files")


def ended(call: Callable[[], object]) -> Outcome:
    """The outcome of a call, which must come to an end."""
    found: list[Outcome] = []
    thread = threading.Thread(target=lambda: found.append(outcome(call)), daemon=True)
    thread.start()
    thread.join(PATIENCE)
    assert found, "it waits for ever"
    return found[0]


def replace(path: Path, kind: str) -> None:
    path.unlink(missing_ok=True)
    if kind == "pipe":
        os.mkfifo(path)
    else:
        path.symlink_to("/dev/zero")


@pytest.fixture(scope="module")
def store_files(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """The names of all files of the small store."""
    path = small_store.make(tmp_path_factory.mktemp("named") / "store")
    return sorted(file.relative_to(path).as_posix() for file in path.rglob("*") if file.is_file())


@pytest.mark.parametrize("kind", KINDS)
def test_in_a_store(kind: str, store_files: list[str], tmp_path: Path) -> None:
    """Each file in turn: the store is refused, or what can be made again is left out."""
    assert {Path(name).suffix for name in store_files} >= {".json", ".jsonl", ".png", ".safetensors"}
    for number, name in enumerate(store_files):
        path = small_store.make(tmp_path / str(number))
        replace(path / name, kind)
        found = ended(lambda path=path: small_store.use(path))  # type: ignore[misc]
        if name.startswith("references") or "/references" in name:
            continue  # known errors that are not there are computed again: ``use`` finds that they are missing
        check(found, 4)
        assert str(path) in found.message, name


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["recipe.json", "manifest.json", "environment.json", "metrics.jsonl"])
def test_in_a_run(kind: str, name: str, tmp_path: Path) -> None:
    run = RunFolder.create_or_open(tmp_path / "run", recipe={}, inputs={}, environment={})
    run.append_metrics({"kind": "train", "step": 1})
    replace(run.path / name, kind)
    again = ended(lambda: RunFolder.create_or_open(run.path, recipe={}, inputs={}, environment={}).metrics())
    check(again, 4, name)
    check(ended(lambda: _run_row(run.path)), 0)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["manifest.json", "state.json", "adapter.safetensors"])
def test_in_a_checkpoint(kind: str, name: str, tmp_path: Path) -> None:
    path = save_checkpoint(tmp_path, 1, tensors={"adapter": {"a": torch.ones(2)}}, state={}, keep=1)
    replace(path / name, kind)
    check(ended(lambda: load_checkpoint(path)), 4, name)


def test_what_is_added_to_a_pipe(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "times.jsonl")
    check(ended(lambda: append_bytes(tmp_path / "times.jsonl", b"{}\n")), 4, "times.jsonl")


def test_a_recipe_without_end(tmp_path: Path) -> None:
    """A pipe is a recipe like any other; what does not end is none."""
    (tmp_path / "recipe.yaml").symlink_to("/dev/zero")
    check(ended(lambda: read_yaml(tmp_path / "recipe.yaml")), 2, "cannot be a recipe")
    os.mkfifo(tmp_path / "pipe")
    writer = threading.Thread(target=lambda: (tmp_path / "pipe").write_text("name: piped\n"), daemon=True)
    writer.start()
    assert read_yaml(tmp_path / "pipe") == {"name": "piped"}
