"""Commands that change nothing, errors and exit codes, through the same `main` as the console script."""

from __future__ import annotations

import errno
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from gdro_cli import __version__
from gdro_cli.cli.app import main
from gdro_cli.cli.failures import exit_code_of
from gdro_cli.config.load import load_recipe, shipped_recipes
from gdro_cli.config.sections import PromptSource
from gdro_cli.data.prompts import load_prompts
from gdro_cli.errors import Interrupted, PrerequisiteError, StoreError, UserError
from gdro_cli.rewards.base import Reward
from gdro_cli.runtime.interrupt import StoppedBySignal
from tests.support.prompt_rewards import COCO, OCR, SHAPES


def run(*arguments: str) -> int:
    with pytest.raises(SystemExit) as leaving:
        main(arguments)
    code = leaving.value.code
    assert isinstance(code, int)
    return code


# --- commands that change nothing ----------------------------------------------------------------------------


def test_recipes_lists_the_shipped_ones(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("recipes") == run("recipes", "list") == 0
    out = capsys.readouterr().out
    for name in shipped_recipes():
        assert load_recipe(name).description in out
        assert out.count(f" {name} ") >= 2


def test_recipes_show_prints_a_recipe(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    overrides = ["train.lr=1e-5", "description='1e-5'"]
    options = [part for override in overrides for part in ("--set", override)]
    assert run("recipes", "show", "ocr", *options, "--json") == 0
    shown = json.loads(capsys.readouterr().out)
    expected = load_recipe("ocr", overrides=overrides).resolved()
    assert shown == expected
    assert run("recipes", "show", "ocr.yaml", *options) == 0
    path = tmp_path / "shown.yaml"
    path.write_text(capsys.readouterr().out, encoding="utf-8")
    assert load_recipe(str(path)).resolved() == expected


def test_recipes_check_reports_every_problem_of_every_recipe(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    assert run("recipes", "check") == 0
    assert capsys.readouterr().out.count("correct (digest") == len(shipped_recipes())
    bad = tmp_path / "bad.yaml"
    bad.write_text("extends: ocr\nsede: 1\nmethod: {tau: -1}\n", encoding="utf-8")
    assert run("recipes", "check", "nowhere", "ocr", str(bad)) == 2
    captured = capsys.readouterr()
    assert "ocr: correct" in captured.out
    for words in ("nowhere", "did you mean `seed`?", "method.tau: must be at least 0"):
        assert words in captured.err


def test_recipes_check_says_what_a_wrong_key_means(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    """Not the range, where the problem states it."""
    bad = tmp_path / "bad.yaml"
    bad.write_text("extends: ocr\nsede: 1\nxyz: 1\nsample: {image_format: jpg}\ntrain: {lr: -1}\nmethod: {k: 99}\n")
    assert run("recipes", "check", str(bad)) == 2
    assert capsys.readouterr().err.splitlines()[1:] == [
        "  sede: unknown key; did you mean `seed`?",
        "      seed: Seed of everything random except the evaluation (`eval.seed`), built-in prompts "
        "(their own `seed`), and a training with a seed of its own (`train.seed`). 0 or more.",
        "  xyz: unknown key",
        "  sample.image_format: must be 'png' or 'webp', not 'jpg'; did you mean `png`?",
        "      File format of the images in a new store. Both are lossless.",
        "  train.lr: must be greater than 0, not -1",
        "      Highest learning rate of AdamW.",
        "  method.k: 99 is more than sample.images_per_prompt (8): lower k or sample more images",
        "      Images drawn from a stored group per visit (K). At least 2, at most `sample.images_per_prompt`.",
    ]
    bad.write_text("extends: ocr\ntrain: {lr: x}\n")
    assert run("recipes", "check", str(bad)) == 2
    error = capsys.readouterr().err
    assert error.endswith("must be a number, not 'x' (Highest learning rate of AdamW. Above 0.)\n")


def test_the_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("--version") == 0
    assert capsys.readouterr().out == f"gdro_cli {__version__}\n"


def test_a_value_that_an_option_does_not_have(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("export", "RUN", "--format", "comfy") == 2
    error = " ".join(capsys.readouterr().err.replace("│", "").split())
    assert "'--format': 'comfy' is not one of 'diffusers', 'peft', 'comfyui', 'kohya'" in error


def test_usage_shows_each_argument_once(capsys: pytest.CaptureFixture[str]) -> None:
    assert [run(*command, "--help") for command in (["compare"], ["eval"], ["runs"], ["recipes", "check"])] == [0] * 4
    usages = [line.split("[OPTIONS] ")[1].strip() for line in capsys.readouterr().out.splitlines() if "Usage" in line]
    assert not [usage for usage in usages if "[[" in usage or usage.count("...") > 1]


def test_recipes_fields_explains_one_section_or_all(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("recipes", "fields") == 0
    everything = capsys.readouterr().out
    assert run("recipes", "fields", "train.lora") == 0
    section = capsys.readouterr().out
    assert "train.lora.rank  whole number, default 32" in section
    assert section in everything
    assert "method.tau  number, default 0.05 (sft: 0.0)  only for gdro, top1, sft, regression" in everything
    assert run("recipes", "fields", "metod") == 2
    assert "did you mean `method`?" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("reward", "options"),
    [
        (OCR, ["ocr-validation", "--count", "5", "--seed", "2"]),
        (SHAPES, ["geneval-test"]),
        (COCO, ["geneval-coco-train", "--count", "50", "--seed", "1", "--plurals", "correct"]),
    ],
)
def test_prompts_prints_a_file_that_is_the_set(
    reward: Reward, options: list[str], capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    assert run("prompts", *options) == 0
    path = tmp_path / "prompts.jsonl"
    path.write_text(capsys.readouterr().out, encoding="utf-8")
    given = dict(zip(options[1::2], options[2::2], strict=True))
    source = PromptSource(
        builtin=options[0],
        count=int(given["--count"]) if given else None,
        seed=int(given.get("--seed", 0)),
        plurals="correct" if "--plurals" in given else "naive",
    )
    assert load_prompts(PromptSource(file=str(path)), reward=reward) == load_prompts(source, reward=reward)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["genval-test"], "did you mean `geneval-test`?"),
        (["mine.txt"], "choose one of ocr-train, "),
        (
            ["ocr-test", "--plurals", "correct"],
            "Error: --plurals only applies to a geneval-coco set, not to 'ocr-test'",
        ),
        (["geneval-test", "--plurals", "correct"], "only applies to a geneval-coco set"),
        (["geneval-test", "--count", "1975"], "has 1974 different prompts"),
    ],
)
def test_a_prompt_set_that_does_not_exist_is_one_sentence(
    arguments: list[str], words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("prompts", *arguments) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert words in captured.err
    assert captured.err.count("\n") == 1


def test_runs_lists_runs_even_damaged_ones(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    whole, damaged = tmp_path / "runs" / "ocr-1", tmp_path / "runs" / "ocr-2"
    for folder in (whole, damaged):
        folder.mkdir(parents=True)
    resolved = load_recipe("ocr", overrides=["train.steps=30"]).resolved()
    (whole / "recipe.json").write_text(json.dumps(resolved), encoding="utf-8")
    (whole / "metrics.jsonl").write_text(
        '{"kind": "train", "step": 1}\n{"kind": "train", "step": 20}\n{"ki', encoding="utf-8"
    )
    (damaged / "recipe.json").write_text("{", encoding="utf-8")
    assert run("runs", str(tmp_path)) == 0
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert ["ocr-1", "ocr", "gdro", "20", "of", "30", "no"] in lines
    assert ["ocr-2", "?", "?", "?", "no"] in lines
    assert run("runs", str(tmp_path / "nothing")) == 2


def test_env_names_versions(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("env") == 0
    out = capsys.readouterr().out
    for name in ("python", "torch", "diffusers"):
        assert name in out


# --- errors --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("command", ["sample", "score", "train", "eval", "ablate"])
@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--recipe", "nowhere.yaml"], "there is no recipe file 'nowhere.yaml'"),
        (["--set", "method.taau=1"], "did you mean `method.tau`?"),
        (["--set", "method.tau=-1"], "method.tau: must be at least 0"),
        (["--set", "method.k=17"], "more than sample.images_per_prompt"),
        (["--set", "oops"], "key=value"),
    ],
)
def test_a_wrong_recipe_is_one_sentence_and_exit_code_2(
    command: str, arguments: list[str], words: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    assert run(command, *arguments, "--out", str(out)) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("Error: ")
    assert words in captured.err
    assert captured.err.count("\n") == 1
    assert not out.exists()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], "name one with --param"),
        (["--param", "taau"], "did you mean `method.tau`?"),
        (["--param", "tau", "--values", "0.5,-1"], "method.tau: must be at least 0, not -1"),
        (["--param", "k", "--values", "17"], "more than sample.images_per_prompt"),
        (["--param", "seed"], "--seeds N"),
        (["--param", "reward.geneval.objective", "--values", "soft,strict"], "are the same training"),
    ],
)
def test_an_ablation_that_makes_no_sense_is_refused_before_any_work(
    arguments: list[str], words: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    assert run("ablate", *arguments, "--out", str(out)) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("Error: ") and captured.err.count("\n") == 1
    assert words in captured.err
    assert not list(out.glob("*"))


def test_an_ablation_can_be_described_first(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    assert run("ablate", "--param", "tau", "--seeds", "2", "--dry-run", "--out", str(out)) == 0
    shown = capsys.readouterr().out
    for words in (
        "192 prompts x 16 = 3072 images; none is made yet",
        "1920 steps are left",
        "128 validation prompts",
    ):
        assert words in shown
    assert shown.count("not begun") == 8 and "tau 0.025" in shown
    assert not out.exists()


def test_what_the_recipe_fixes_is_part_of_the_description(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Also what is measured, which all cells share."""
    path = tmp_path / "mine.yaml"
    settings = "{train.steps: 240, prompts.validation.count: 8}"
    path.write_text(f"extends: ocr\nablation: {{tau: {{values: [0.5, 0], set: {settings}}}}}\n")
    assert run("ablate", "--recipe", str(path), "--param", "tau", "--dry-run", "--out", str(tmp_path / "out")) == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert "480 steps are left" in shown and "evaluation points 8 validation prompts" in shown
    assert "fixes for this sweep: prompts.validation.count 8 (otherwise 128), train.steps 240 (otherwise 100)" in shown


@pytest.mark.parametrize("arguments", [["trian"], ["train", "--foo"], ["train", "--num-processes", "0"]])
def test_a_wrong_command_line_is_exit_code_2(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert run(*arguments) == 2
    captured = capsys.readouterr()
    assert "Usage: gdro" in captured.err
    assert "Traceback" not in captured.err


def test_a_command_that_does_not_exist_gets_a_suggestion(capsys: pytest.CaptureFixture[str]) -> None:
    run("trian")
    assert "train" in capsys.readouterr().err


def test_an_out_that_is_a_file_is_exit_code_2(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "file"
    file.touch()
    assert run("sample", "--recipe", "smoke", "--out", str(file)) == 2
    assert f"--out {file} is not a folder" in capsys.readouterr().err
    assert run("sample", "--recipe", "smoke", "--out", str(file / "below")) == 2


def test_debug_adds_the_traceback(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("train", "--recipe", "nowhere", "--debug") == 2
    err = capsys.readouterr().err
    assert "Traceback" in err
    assert err.splitlines()[-1].startswith("Error: there is no recipe file")


@pytest.mark.parametrize(
    ("error", "code", "words"),
    [
        (UserError("a [b] c."), 2, "Error: a [b] c."),
        (PrerequisiteError("a"), 3, "Error: a"),
        (StoreError("a"), 4, "Error: a"),
        (Interrupted("stopped"), 130, "Stopped"),
        (PermissionError(errno.EACCES, "Permission denied", "/x"), 2, "/x: Permission denied"),
        (OSError(errno.EROFS, "Read-only file system", "/x"), 2, "/x: Read-only file system"),
        (OSError(errno.ENOSPC, "No space left on device"), 4, "the disk is full"),
        (OSError(errno.EMFILE, "Too many open files"), 3, "too many open files"),
        (OSError(errno.ENAMETOOLONG, "File name too long", "x" * 999), 2, "xxx'... is too long for a file"),
        (MemoryError(), 3, "not enough memory: lower sample.batch_size"),
        (torch.OutOfMemoryError("CUDA out of memory."), 3, "not enough memory"),
        (torch.AcceleratorError("CUDA error: out of memory"), 3, "not enough memory"),
        (
            RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling cublasCreate(handle)"),
            3,
            "not enough memory",
        ),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried"), 3, "not enough memory"),
        (ZeroDivisionError("division\nby zero"), 1, "Unexpected ZeroDivisionError: division by zero. This is a defect"),
        (KeyError("x"), 1, "--debug"),
    ],
)
def test_each_kind_of_failure_has_its_exit_code(
    error: Exception, code: int, words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert exit_code_of(error, debug=False) == code
    err = capsys.readouterr().err
    assert words in err
    assert err.count("\n") == 1
    assert "Traceback" not in err


def test_a_signal_that_a_library_turned_into_an_error_is_reported_as_the_signal(
    capsys: pytest.CaptureFixture[str],
) -> None:
    try:
        try:
            raise StoppedBySignal("SIGTERM")
        except KeyboardInterrupt:
            raise ImportError("numpy failed to import")  # noqa: B904 (as libraries do it)
    except ImportError as error:
        assert exit_code_of(error, debug=False) == 130
    err = capsys.readouterr().err
    assert err.startswith("Stopped at once by SIGTERM") and "command again to continue" in err and err.count("\n") == 1


IN_PROCESSES = """
import sys
from pathlib import Path
from gdro_cli.cli.launch import Job, run_in_processes
from gdro_cli.config.load import load_recipe
import typer
try:
    run_in_processes(Job("train", load_recipe("smoke"), Path("."), tuple(sys.argv[1:])), 2)
except typer.Exit as leaving:
    sys.exit(leaving.exit_code)
"""


NOHUP = """
import atexit, signal
signal.signal(signal.SIGHUP, signal.SIG_IGN)
atexit.register(lambda: print("ignored" if signal.getsignal(signal.SIGHUP) == signal.SIG_IGN else "handled"))
"""


@pytest.mark.slow
def test_several_processes_can_be_started_with_nohup() -> None:
    command = [sys.executable, "-c", NOHUP + IN_PROCESSES, "recipes", "check", "ocr"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "ignored"


@pytest.mark.slow
def test_several_processes_exit_with_the_code_of_the_one_that_failed() -> None:
    command = [sys.executable, "-c", IN_PROCESSES, "recipes", "check", "nowhere"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "there is no recipe file 'nowhere'" in done.stderr
    assert "Traceback" not in done.stderr


# --- images of other tools -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["score", "--images", "nowhere"], "the folder nowhere cannot be read (No such file"),
        (["score", "--images", "."], ". has no folders 00000, 00001 ..., each with"),
        (["score", "--images", ".", "--dry-run"], "--images cannot be combined with --dry-run or --num-processes"),
        (["eval", "--export", "."], ". is not empty: name a new folder"),
        (["eval", "--export", "file"], "the images cannot be written to file (Not a directory"),
    ],
)
def test_an_image_folder_that_cannot_be_used_is_one_sentence(
    arguments: list[str],
    words: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.chdir(tmp_path)
    assert run(*arguments, "--recipe", "smoke") == 2
    captured = capsys.readouterr()
    assert captured.err.startswith("Error: ") and captured.err.count("\n") == 1
    assert words in captured.err
    assert not list(tmp_path.glob("gdro-out/*"))


def test_an_image_folder_with_bad_metadata_names_file_and_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "00000" / "samples").mkdir(parents=True)
    (tmp_path / "00000" / "metadata.jsonl").write_text('{"prompt": "a circle"}')
    assert run("score", "--recipe", "geneval", "--images", str(tmp_path), "--out", str(tmp_path / "out")) == 2
    err = capsys.readouterr().err
    assert f"{tmp_path / '00000' / 'metadata.jsonl'} has a bad line; line 1: the key tag is missing" in err
