"""Bad input on the command line: one sentence, a fixed exit code, and nothing half done."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import yaml

from gdro_cli.cli.app import main
from gdro_cli.config.recipe import Recipe
from gdro_cli.stages.evaluation import evaluate
from gdro_cli.stages.training import train

Finished = tuple[Path, train.TrainResult, evaluate.EvalResult]


@pytest.fixture
def job(finished: Finished, make_recipe: Callable[..., Recipe], tmp_path: Path) -> Iterator[tuple[Path, list[str]]]:
    """A copy of a finished workspace, and its arguments."""
    workspace = tmp_path / "out"
    shutil.copytree(finished[0], workspace)
    path = tmp_path / "small.yaml"
    path.write_text(yaml.safe_dump(make_recipe().resolved()))
    yield workspace, ["--recipe", str(path), "--out", str(workspace)]


def fails(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> tuple[int, str]:
    """Exit code and message of a command that must fail with one line and no traceback."""
    with pytest.raises(SystemExit) as left:
        main(arguments)
    message = capsys.readouterr().err.strip()
    assert "Traceback" not in message
    last = message.splitlines()[-1] if message else ""
    assert isinstance(left.value.code, int)
    return left.value.code, " ".join(message.split()) if "problems" in message else last


def test_a_truncated_shard_is_named(job: tuple[Path, list[str]], capsys: pytest.CaptureFixture[str]) -> None:
    workspace, arguments = job
    shutil.rmtree(workspace / "runs")  # a finished run does not read its store again
    for path in workspace.glob("stores/*/shards/00001/tensors.safetensors"):
        path.write_bytes(path.read_bytes()[:-9])
    code, message = fails(["train", *arguments], capsys)
    assert code == 4
    assert (
        "shards/00001/tensors.safetensors is missing or does not have" in message
        and "shards/00001 and run `gdro sample`" in message
    )


def test_a_corrupt_checkpoint_is_named(job: tuple[Path, list[str]], capsys: pytest.CaptureFixture[str]) -> None:
    workspace, arguments = job
    (adapter,) = workspace.glob("runs/*/checkpoints/step-000004/adapter.safetensors")
    data = bytearray(adapter.read_bytes())
    data[-1] ^= 1
    adapter.write_bytes(data)
    for command in ("train", "eval"):
        code, message = fails([command, *arguments], capsys)
        assert code == 4
        assert "adapter.safetensors" in message and "delete" in message


def test_a_store_of_another_recipe_is_refused(job: tuple[Path, list[str]], capsys: pytest.CaptureFixture[str]) -> None:
    """A store that a user renamed to another's name."""
    workspace, arguments = job
    shutil.rmtree(workspace / "runs")
    stores = sorted((workspace / "stores").iterdir(), key=lambda path: len(list(path.glob("shards/*/images/*"))))
    other, own = stores[-2:]  # the evaluation's 8 images, and the training's 16
    shutil.rmtree(own)
    other.rename(own)
    code, message = fails(["train", *arguments], capsys)
    assert code == 4
    assert "was made with other settings" in message


@pytest.mark.parametrize(
    ("settings", "code", "words"),
    [
        (["method.tau=-0.1"], 2, "method.tau"),
        (["method.k=5"], 2, "sample.images_per_prompt"),
        (["train.lora.rnk=3"], 2, "did you mean"),
        (["model.path=/nowhere/flux"], 3, "/nowhere/flux"),
        (["reward.ocr.model_dir=/nowhere"], 3, "/nowhere"),
        (["train.lora.targets=[to_qq]"], 2, "to_qq"),
        (["train.lora.init=/nowhere/lora"], 3, "train.lora.init: there is no adapter /nowhere/lora"),
        (["prompts.train.file=nowhere.txt"], 2, "nowhere.txt"),
    ],
)
def test_bad_settings(
    job: tuple[Path, list[str]], capsys: pytest.CaptureFixture[str], settings: list[str], code: int, words: str
) -> None:
    _, arguments = job
    status, message = fails(["train", *arguments, *(part for one in settings for part in ("--set", one))], capsys)
    assert status == code
    assert words in message


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "no prompt"),
        (b"a sign without quotes\n", "line 1"),
        (b'a sign that says "\xff\xfe"\n', "UTF-8"),
        (b'a sign that says ""\n', "line 1"),
    ],
)
def test_bad_prompt_files(
    job: tuple[Path, list[str]], capsys: pytest.CaptureFixture[str], tmp_path: Path, content: bytes, words: str
) -> None:
    _, arguments = job
    path = tmp_path / "prompts.txt"
    path.write_bytes(content)
    code, message = fails(["train", *arguments, "--set", f"prompts.train.file={path}"], capsys)
    assert code == 2
    assert str(path) in message
    assert words in message


def test_a_folder_that_cannot_be_written(job: tuple[Path, list[str]], capsys: pytest.CaptureFixture[str]) -> None:
    _, arguments = job
    code, message = fails(["sample", *arguments[:2], "--out", "/proc/nowhere"], capsys)
    assert code == 2
    assert "/proc/nowhere" in message
