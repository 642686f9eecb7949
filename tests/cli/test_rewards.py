"""``gdro rewards``: the list, the check of one, and a new package that works as it is written."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from gdro_cli.cli.app import main
from gdro_cli.rewards.new_package import write_package
from tests.support.plugins import BRIGHTNESS, install

pytestmark = pytest.mark.slow

RANDOM = BRIGHTNESS.replace(
    "        from PIL", "        import random\n        return random.random()\n        from PIL"
)


def run(*arguments: str) -> int:
    with pytest.raises(SystemExit) as leaving:
        main(arguments)
    assert isinstance(leaving.value.code, int)
    return leaving.value.code


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.syspath_prepend(str(tmp_path))
    yield tmp_path
    for module in ("brightness_reward", "broken_reward", "fake_reward"):
        sys.modules.pop(module, None)


def test_the_list(site: Path, capsys: pytest.CaptureFixture[str]) -> None:
    install(site, "brightness", BRIGHTNESS, target="Brightness")
    install(site, "broken", "1 / 0", target="Broken")
    install(site, "ocr", "1 / 0", target="Broken", package="gdro-reward-fake")
    assert run("rewards") == run("rewards", "list") == 0
    rows = [" ".join(line.split()) for line in capsys.readouterr().out.splitlines()]
    assert "brightness gdro-reward-brightness 0.1.0 nothing to draw bright images power, threads" in rows
    assert any(
        row.startswith("ocr built in target to write the text that a prompt asks for objective, engine, ")
        for row in rows
    )
    assert any(row.startswith("broken gdro-reward-broken 0.1.0 the reward broken of the package") for row in rows)
    assert "ocr gdro-reward-fake 0.1.0 it is never used, since a built-in reward has its name" in rows
    assert run("rewards", "list", "--json") == 0
    listed = {(row["name"], row["source"]): row for row in json.loads(capsys.readouterr().out)}
    plugin = listed["brightness", "gdro-reward-brightness 0.1.0"]
    assert (plugin["needs"], plugin["scale"], plugin["measures"], plugin["problem"]) == (
        [],
        [0.0, 1.0],
        ["reward"],
        None,
    )
    assert plugin["settings"][0] == {
        "key": "reward.brightness.power",
        "type": "number",
        "default": "1.0",
        "text": "Exponent of the grey level.",
    }
    assert listed["geneval", "built in"]["needs"] == ["include", "tag"]
    assert "ZeroDivisionError" in listed["broken", "gdro-reward-broken 0.1.0"]["problem"]


def test_fields_lists_the_keys_of_installed_rewards(site: Path, capsys: pytest.CaptureFixture[str]) -> None:
    install(site, "brightness", BRIGHTNESS, target="Brightness")
    install(site, "broken", "1 / 0", target="Broken")
    assert run("recipes", "fields", "reward") == 0
    out = capsys.readouterr().out
    assert "reward.brightness.power  number, default 1.0  only for brightness" in out
    assert "reward.http.url  text, default (required)  only for http" in out and "reward.broken" not in out


def test_a_check(site: Path, capsys: pytest.CaptureFixture[str]) -> None:
    install(site, "brightness", BRIGHTNESS, target="Brightness")
    (site / "images").mkdir()
    for grey in (0, 51, 255):
        Image.new("RGB", (8, 8), (grey, grey, grey)).save(site / "images" / f"{grey}.png")
    sets = ("--set", "reward.brightness.power=2")
    assert run("rewards", "check", "brightness", "--images", str(site / "images"), *sets) == 0
    rows = [" ".join(line.split()) for line in capsys.readouterr().out.splitlines()]
    assert "images scored 3 of 3" in rows and "values 0 to 1, mean 0.3467" in rows and "two runs agree" in rows
    assert 'version: settings {"power":2.0}' in rows
    assert any(row.startswith("memory of a process 0.") for row in rows)
    (site / "images" / "bad.png").write_text("no")
    assert run("rewards", "check", "brightness", "--images", str(site / "images")) == 0
    assert "images scored 3 of 4" in " ".join(capsys.readouterr().out.split())


@pytest.mark.parametrize(
    ("code", "words"),
    [
        (RANDOM, "two runs of the reward brightness do not agree: image 0 got 0."),
        (BRIGHTNESS.replace("/ 255", ""), "outside its scale (0 to 1): correct the class attribute `scale`"),
        (
            BRIGHTNESS.replace("(ImageStat", "1 / 0, (ImageStat"),
            "scored none of 8 images (the reward brightness failed",
        ),
        (
            BRIGHTNESS.replace("    version", "    needs = frozenset({'mood'})\n    version"),
            "no built-in prompts have what the reward brightness needs (mood)",
        ),
    ],
)
def test_a_check_that_fails_is_one_sentence(
    site: Path, code: str, words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    install(site, "brightness", code, target="Brightness")
    assert run("rewards", "check", "brightness") in (2, 3)
    errors = capsys.readouterr().err
    assert words in errors and errors.count("\n") == 1


def test_details_that_differ_are_a_note(site: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Such as times; only values must agree."""
    code = BRIGHTNESS.replace("return (", "from gdro_cli.rewards import Score; import time; return Score((")
    code = code.replace("self.settings.power", "self.settings.power, None, {'when': time.time()})")
    install(site, "brightness", code, target="Brightness")
    assert run("rewards", "check", "brightness") == 0
    out = " ".join(capsys.readouterr().out.split())
    assert "two runs agree" in out and "note the detail when of image 0 differs between the two runs" in out


def test_reasons_that_differ_are_no_disagreement(site: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code = BRIGHTNESS.replace(
        "        from PIL", "        if image.width == 13: raise OSError(id(self))\n        from PIL"
    )
    code = code.replace("OSError(id(self))", "OSError(str(__import__('os').getpid()))")
    install(site, "brightness", code, target="Brightness")
    (site / "images").mkdir()
    for width in (12, 13):
        Image.new("RGB", (width, 8)).save(site / "images" / f"{width}.png")
    assert run("rewards", "check", "brightness", "--images", str(site / "images")) == 0
    assert "two runs agree" in " ".join(capsys.readouterr().out.split())


def test_one_value_outside_the_scale_fails_the_check(site: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code = BRIGHTNESS.replace("    version", "    scale = (0.0, 0.5)\n    version")
    install(site, "brightness", code, target="Brightness")
    (site / "images").mkdir()
    for grey in (0, 255):
        Image.new("RGB", (8, 8), (grey, grey, grey)).save(site / "images" / f"{grey}.png")
    assert run("rewards", "check", "brightness", "--images", str(site / "images")) == 3
    assert "gave 1, outside its scale (0 to 0.5)" in capsys.readouterr().err


def test_a_mixture_is_checked(site: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """With the processes of its parts, as a job opens them: a crash names the part."""
    code = BRIGHTNESS.replace(
        "        from PIL", "        if image.width == 13: __import__('os')._exit(3)\n        from PIL"
    )
    install(site, "brightness", code, target="Brightness")
    (site / "images").mkdir()
    for width in (12, 13):
        Image.new("RGB", (width, 8)).save(site / "images" / f"{width}.png")
    sets = ("--images", str(site / "images"), "--set", "reward.mix.weights={ocr: 1, brightness: 1}")
    assert run("rewards", "check", "mix", *sets) == 0
    out = " ".join(capsys.readouterr().out.split())
    assert "images scored 1 of 2" in out and "brightness: the scoring worker died" in out


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["music"], "there is no reward 'music' in this installation (it has ocr, geneval"),
        (["music"], ": install the package that has it (docs/adding-a-reward.md)"),
        (["occr"], "install the package that has it (docs/adding-a-reward.md); did you mean `ocr`?"),
        (["ocr", "--set", "reward.kind=clip"], "--set names the reward 'clip', and the command 'ocr': remove reward"),
    ],
)
def test_a_reward_that_cannot_be_named(arguments: list[str], words: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("rewards", "check", *arguments) == 2
    assert words in capsys.readouterr().err


def test_a_check_of_a_built_in_reward_draws_what_it_needs(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("rewards", "check", "ocr", "--set", "reward.workers=1") == 0
    assert "images scored 8 of 8" in " ".join(capsys.readouterr().out.split())


def test_a_new_package_is_installed_tested_and_checked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Installed by pip, as an editable package in a folder of its own."""
    monkeypatch.chdir(tmp_path)
    assert run("rewards", "new", "my-taste") == 0
    assert "pip install -e my-taste" in " ".join(capsys.readouterr().out.split())
    package, site = tmp_path / "my-taste", tmp_path / "site"
    assert sum(len(path.read_text().splitlines()) for path in package.iterdir()) < 60
    pip = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--no-build-isolation", "--no-index"]
    subprocess.run([*pip, "--target", str(site), "-e", str(package)], check=True, capture_output=True)
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(site), str(package)])}

    def command(*words: str) -> str:
        done = subprocess.run(
            [sys.executable, "-m", *words], cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stderr + done.stdout
        return " ".join(done.stdout.split())

    assert "1 passed" in command("pytest", "-q", "-p", "no:cacheprovider", str(package))
    assert "images scored 8 of 8" in command("gdro_cli", "rewards", "check", "my-taste")
    shown = command("gdro_cli", "recipes", "show", "plain", "--set", "reward.kind=my-taste")
    assert "my-taste: power: 1.0" in shown
    before = {path: path.read_bytes() for path in package.iterdir() if path.is_file()}
    assert run("rewards", "new", "my-taste") == 2
    assert "nothing is overwritten" in capsys.readouterr().err
    assert {path: path.read_bytes() for path in package.iterdir() if path.is_file()} == before


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("a.b", "a reward cannot have this name"),
        ("../up", "a reward cannot have this name"),
        ("json", "a reward cannot have this name"),
        ("ocr", "there is already a reward 'ocr'"),
        ("None", "is a word of Python"),
        ("a_", "pip accepts no package of that name: choose one that ends in a letter or a digit"),
        ("a-", "pip accepts no package of that name"),
    ],
)
def test_a_name_that_a_new_reward_cannot_have(
    name: str, words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert run("rewards", "new", name) == 2
    assert words in capsys.readouterr().err and not list(tmp_path.iterdir())


def test_a_package_is_written_whole_or_not_at_all(tmp_path: Path) -> None:
    write_package("fine", tmp_path / "there" / "fine")
    assert sorted(path.name for path in (tmp_path / "there").iterdir()) == ["fine"]
