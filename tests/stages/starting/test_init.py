"""``gdro init``: what it writes for a model, a reward and a form of data, and what it refuses."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from gdro_cli.cli.app import main
from gdro_cli.config.load import load_recipe
from gdro_cli.config.recipe import Recipe
from gdro_cli.data.prompts import load_prompts
from gdro_cli.rewards.registry import reward_class
from gdro_cli.stages.starting.init import DataForm, run
from tests.support.plugins import BRIGHTNESS, install


def written(folder: Path, model: str, reward: str, data: DataForm | None = None) -> Recipe:
    run(folder, model=model, reward=reward, data=data)
    return load_recipe(str(folder / "recipe.yaml"))


def command(*arguments: str) -> int:
    with pytest.raises(SystemExit) as leaving:
        main(["init", *arguments])
    assert isinstance(leaving.value.code, int)
    return leaving.value.code


@pytest.mark.parametrize(
    ("model", "reward", "shipped"),
    [
        ("tiny", "ocr", "ocr"),
        ("tiny", "geneval", "geneval"),
        ("tiny", "vlm", "plain"),
        ("flux", "ocr", "flux-ocr"),
        ("black-forest-labs/FLUX.1-dev", "geneval", "flux-geneval"),
        ("flux", "pickscore", "flux-pickscore"),
        ("sd35", "aesthetic", "sd35-geneval"),
        ("sd35", "mix", "sd35-ocr"),
    ],
)
def test_a_recipe_is_the_shipped_one_with_prompts_and_reward_of_its_own(
    model: str, reward: str, shipped: str, tmp_path: Path
) -> None:
    recipe, below = written(tmp_path / "my job", model, reward), load_recipe(shipped)
    assert f"\nextends: {shipped} #" in (tmp_path / "my job" / "recipe.yaml").read_text(encoding="utf-8")
    own = {"name", "description", "prompts", "reward"}
    assert recipe.model_dump(exclude=own) == below.model_dump(exclude=own)
    assert (recipe.name, recipe.prompts.validation, recipe.prompts.eval) == (
        "my-job",
        below.prompts.validation,
        below.prompts.eval,
    )
    assert reward in (recipe.reward.kind, *recipe.reward.parts)


@pytest.mark.parametrize("reward", ["ocr", "geneval", "clip", "hpsv2"])
@pytest.mark.parametrize("model", ["tiny", "flux", "owner/name"])
def test_the_example_prompts_carry_what_the_reward_needs(model: str, reward: str, tmp_path: Path) -> None:
    recipe = written(tmp_path / "job", model, reward)
    (part,) = recipe.reward.parts
    cls = reward_class(part)
    reader = cls(getattr(recipe.reward, part, None))
    sets = [load_prompts(getattr(recipe.prompts, split), reward=reader) for split in ("train", "validation", "eval")]
    assert len(sets[0]) == 16
    texts = [{record.prompt for record in prompts.records} for prompts in sets]
    assert not texts[0] & (texts[1] | texts[2])


@pytest.mark.parametrize("model", ["tiny", "flux", "owner/name"])
@pytest.mark.parametrize("data", ["scores", "pairs", "demonstrations"])
def test_own_data_is_trained_on_as_by_the_recipe_for_its_form(model: str, data: DataForm, tmp_path: Path) -> None:
    recipe, below = written(tmp_path / "kites", model, "geneval", data), load_recipe(f"own-{data}")
    assert recipe.prompts.train.imported == "kites"
    assert recipe.train.scores == below.train.scores
    method, own = recipe.group_method, below.group_method
    assert (method.name, method.k_policy) == (own.name, own.k_policy)
    if data != "scores":
        assert method.k == own.k
    if data == "demonstrations":
        assert (method.gamma, recipe.train.groups_per_step) == (own.gamma, below.train.groups_per_step)
    assert str(recipe.prompts.eval.builtin) == ("geneval-test" if model == "tiny" else "geneval-coco-test")
    assert not list((tmp_path / "kites").glob("prompts*"))


def test_a_local_model_has_a_recipe_that_stands_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "model_index.json").write_text("{}")
    monkeypatch.chdir(tmp_path)
    recipe = written(Path("job"), "model", "geneval")
    assert recipe.model.path == str(tmp_path / "model")
    assert (recipe.sample.steps, recipe.reward.geneval.detector) == (28, "mask2former")
    text = (tmp_path / "job" / "recipe.yaml").read_text(encoding="utf-8")
    assert "extends" not in text and "\n  # height: 512 # " in text
    assert "hf download" not in (tmp_path / "job" / "README.md").read_text(encoding="utf-8")


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    (tmp_path / "site").mkdir()
    monkeypatch.syspath_prepend(str(tmp_path / "site"))
    yield tmp_path / "site"
    sys.modules.pop("brightness_reward", None)


def test_a_reward_whose_needs_no_built_in_prompt_has(site: Path, tmp_path: Path) -> None:
    code = BRIGHTNESS.replace("    version", "    needs = frozenset({'mood'})\n    version")
    install(site, "brightness", code, target="Brightness")
    recipe = written(tmp_path / "job", "tiny", "brightness")
    path = tmp_path / "job" / "prompts.jsonl"
    assert json.loads(path.read_text(encoding="utf-8")) == {"prompt": "a prompt of yours", "mood": "..."}
    assert {recipe.prompts.train.file, recipe.prompts.eval.file} == {str(path)}


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--model", "flx"], "there is no model 'flx'; did you mean `flux`?"),
        (["--model", "/nowhere"], "name tiny, flux, sd35, a diffusers folder, or a Hub id such as owner/name"),
        (["--model", "."], "has no model_index.json: name the folder of a diffusers pipeline"),
        (["--reward", "orc"], "there is no reward 'orc' in this installation"),
        (["--reward", "orc"], "did you mean `ocr`?"),
    ],
)
def test_a_model_or_reward_that_does_not_exist_is_one_sentence(
    options: list[str], words: str, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    assert command(str(tmp_path / "job"), *options) == 2
    error = capsys.readouterr().err
    assert words in error and error.count("\n") == 1
    assert not (tmp_path / "job").exists()


def test_a_folder_with_files_is_left_alone(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine.txt").write_text("mine")
    (tmp_path / "empty").mkdir()
    assert command(str(tmp_path / "full")) == command(str(tmp_path / "full" / "mine.txt")) == 2
    assert [path.name for path in (tmp_path / "full").iterdir()] == ["mine.txt"]
    assert command(str(tmp_path / "empty")) == 0
    assert {path.name for path in (tmp_path / "empty").iterdir()} == {"recipe.yaml", "prompts.txt", "README.md"}
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    assert command(".") == 2
    assert "is the current folder" in capsys.readouterr().err
