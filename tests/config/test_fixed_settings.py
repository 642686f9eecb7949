"""What a recipe fixes for a sweep: `ablation.KEY.set`, below `--set` and for `gdro ablate` alone."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import yaml

from gdro_cli.config.load import build_recipe, load_recipe
from gdro_cli.config.recipe import Recipe
from gdro_cli.config.sweep import plan_sweep
from gdro_cli.errors import UserError

TAU = """extends: ocr
ablation:
  tau: {values: [0.5, 0], set: {k: 8, method.gamma: 0.5, train.lr_schedule: constant, train.steps: 240}}
"""


def loaded(folder: Path, text: str = TAU, overrides: Sequence[str] = ()) -> Recipe:
    path = folder / "mine.yaml"
    path.write_text(text)
    return load_recipe(str(path), overrides=overrides)


def fixing(settings: str, key: str = "tau", values: str = "[0.5, 0]") -> str:
    return f"extends: ocr\nablation: {{{key}: {{values: {values}, set: {settings}}}}}\n"


def without_ablation(recipe: Recipe) -> dict[str, Any]:
    return {key: value for key, value in recipe.resolved().items() if key != "ablation"}


def test_every_cell_is_the_recipe_with_these_settings(tmp_path: Path) -> None:
    """So a training that `--set` gave before is found again. Other keys and other trainings are as they were."""
    recipe = loaded(tmp_path)
    settings = ["method.k=8", "method.gamma=0.5", "train.lr_schedule=constant", "train.steps=240", "train.seed=0"]
    for cell in plan_sweep(recipe, ["method.tau"]).cells:
        same = loaded(tmp_path, overrides=[*settings, f"method.tau={cell.values[0]}"])
        assert without_ablation(cell.recipe) == without_ablation(same)
    assert without_ablation(recipe) == without_ablation(load_recipe("ocr", overrides=[])) | {"name": "mine"} | {
        "description": recipe.description
    }
    (cell,) = plan_sweep(recipe, ["beta"], ["4"]).cells
    assert (cell.recipe.group_method.k, cell.recipe.train.steps) == (6, 100)


def test_what_differs_from_the_recipe_is_reported(tmp_path: Path) -> None:
    sweep = plan_sweep(loaded(tmp_path, fixing("{k: 8, beta: 5, train.steps: 240}")), ["tau"], ["0.3"])
    assert [(each.path, each.before, each.after) for each in sweep.fixed] == [
        ("method.k", 6, 8),
        ("train.steps", 100, 240),
    ]
    (note,) = sweep.notes
    assert note.endswith("for this sweep: method.k 8 (otherwise 6), train.steps 240 (otherwise 100)")
    assert sweep.labels == ("tau 0.3",)
    assert plan_sweep(load_recipe("ocr"), ["tau"]).fixed == ()


def test_the_users_set_wins(tmp_path: Path) -> None:
    recipe = loaded(tmp_path, overrides=["method.k=4", "train={steps: 100}"])
    assert recipe.resolved()["ablation"]["tau"]["set"] == {"method.gamma": 0.5, "train.lr_schedule": "constant"}
    for cell in plan_sweep(recipe, ["tau"]).cells:
        assert (cell.recipe.group_method.k, cell.recipe.train.steps) == (4, 100)
        assert (cell.recipe.group_method.gamma, cell.recipe.train.lr_schedule) == (0.5, "constant")


def test_a_set_that_changes_other_keys_refuses_only_the_sweep(tmp_path: Path) -> None:
    """`gdro train --set sample.images_per_prompt=6` is no concern of the sweep's K of 8."""
    recipe = loaded(tmp_path, overrides=["sample.images_per_prompt=6"])
    with pytest.raises(UserError, match=r"mine with what it fixes for tau: method.k: 8 is more than sample"):
        plan_sweep(recipe, ["tau"])


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ("{kk: 1}", "there is no recipe key 'kk'"),
        ("{method.gama: 1}", "did you mean `method.gamma`?"),
        ("{method: {k: 8}}", "method is a section: name its keys in full, as in method.k"),
        ("{train: {}}", "train is a section: name its keys in full, as in train.key"),
        ("{pairs: all}", "method.pairs: the method 'gdro' has no such key (it belongs to dpo): remove it"),
        ("{method.tau: 1}", "method.tau is the swept key itself: remove it"),
        ("{k: 4, method.k: 4}", "method.k and k are the same key: keep one"),
        ("{name: x}", "name says something about the recipe and not about the training: remove it"),
        ("{ablation: {}}", "ablation says something about the recipe"),
        ("{k: eight}", "method.k: must be a whole number, not 'eight'"),
        ("{k: 17}", "method.k: 17 is more than sample.images_per_prompt (8)"),
        ("{k: 8, sample.images_per_prompt: 4}", "method.k: 8 is more than sample.images_per_prompt (4)"),
        ("[k]", "must be a section of keys and values, not a list of 1"),
    ],
)
def test_a_setting_that_cannot_be_is_one_sentence_when_the_recipe_is_loaded(
    settings: str, words: str, tmp_path: Path
) -> None:
    with pytest.raises(UserError) as refusal:
        loaded(tmp_path, fixing(settings))
    assert "mine.yaml: ablation.tau.set: " in str(refusal.value) and words in str(refusal.value)
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize(
    ("entry", "words"),
    [
        ("{set: {k: 8}}", "ablation.tau.values: is missing"),
        ("{values: 1}", "ablation.tau: must be a list, not 1"),
        ("{values: [], set: {k: 8}}", "ablation.tau: needs at least one value"),
        ("{values: [0], sets: {k: 8}}", "ablation.tau.sets: unknown key"),
    ],
)
def test_an_entry_has_values_and_perhaps_set(entry: str, words: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=words):
        loaded(tmp_path, f"extends: ocr\nablation: {{tau: {entry}}}\n")


def test_problems_elsewhere_are_reported_once_and_with_those_of_sets(tmp_path: Path) -> None:
    with pytest.raises(UserError) as refusal:
        loaded(tmp_path, fixing("{k: 17}") + "train: {warmup_steps: 999}\n")
    assert [line.split(": ")[0].strip() for line in str(refusal.value).splitlines()[1:]] == [
        "train.warmup_steps",
        "ablation.tau.set",
    ]


GRID = "extends: ocr\nablation:\n  tau: {{values: [0.5, 0], set: {{k: 8, gamma: 0}}}}\n  {}\n"


def test_a_grid_has_the_settings_of_both_keys(tmp_path: Path) -> None:
    recipe = loaded(tmp_path, GRID.format("beta: {values: [4, 6], set: {method.k: 8, train.steps: 9}}"))
    sweep = plan_sweep(recipe, ["tau", "beta"])
    assert {(c.recipe.group_method.k, c.recipe.group_method.gamma, c.recipe.train.steps) for c in sweep.cells} == {
        (8, 0, 9)
    }
    assert len(sweep.cells) == 4


@pytest.mark.parametrize(
    ("other", "names", "words"),
    [
        (
            "beta: {values: [4], set: {method.k: 6}}",
            ["beta", "tau"],
            "ablation.beta.set has method.k 6, and ablation.tau.set 8: sweep one of them",
        ),
        ("k: [2, 4]", ["tau", "method.k"], "ablation.tau.set has k 8, and --param method.k sweeps it"),
    ],
)
def test_a_grid_of_settings_that_contradict_is_one_sentence(
    other: str, names: list[str], words: str, tmp_path: Path
) -> None:
    with pytest.raises(UserError) as refusal:
        plan_sweep(loaded(tmp_path, GRID.format(other)), names)
    assert words in str(refusal.value) and "\n" not in str(refusal.value)


def test_settings_may_change_the_images_or_the_scores_of_all_cells(tmp_path: Path) -> None:
    images = plan_sweep(loaded(tmp_path, fixing("{sample.steps: 4}")), ["tau"])
    assert any("the images, so the cells share a store that is not the recipe's" in note for note in images.notes)
    assert {cell.recipe.sample.steps for cell in images.cells} == {images.recipe.sample.steps} == {4}
    scores = plan_sweep(loaded(tmp_path, fixing("{reward.ocr.recognition_width: 320}")), ["tau"])
    assert any("share scores that are not the recipe's" in note for note in scores.notes)
    pinned = plan_sweep(loaded(tmp_path, fixing("{eval.steps: 5}", "sample.steps", "[4, 6]")), ["sample.steps"])
    assert [(cell.recipe.sample.steps, cell.recipe.eval_steps) for cell in pinned.cells] == [(4, 5), (6, 5)]


def test_a_sweep_of_methods_drops_the_settings_that_one_lacks(tmp_path: Path) -> None:
    sweep = plan_sweep(loaded(tmp_path, fixing("{tau: 0.1, k: 4}", "method", "[gdro, rank]")), ["method"])
    gdro, rank = (cell.recipe.resolved()["method"] for cell in sweep.cells)
    assert (gdro["tau"], gdro["k"], rank["k"]) == (0.1, 4, 4) and "tau" not in rank
    assert any(note.startswith("rank has no tau") for note in sweep.notes)


def test_the_method_may_be_fixed(tmp_path: Path) -> None:
    sweep = plan_sweep(loaded(tmp_path, fixing("{method: rank}", "beta", "[4, 6]")), ["beta"])
    assert [str(each) for each in sweep.fixed] == ['method.name: "gdro" -> "rank"', "method.tau: 0.05 -> (absent)"]
    assert {cell.recipe.method.name for cell in sweep.cells} == {"rank"}


def test_another_method_drops_the_settings_that_it_lacks(tmp_path: Path) -> None:
    recipe = loaded(tmp_path, fixing("{tau: 0.1, k: 4}", "beta"), ["method.name=rank"])
    assert recipe.resolved()["ablation"]["beta"] == {"values": [0.5, 0], "set": {"k": 4}}
    recipe = loaded(tmp_path, TAU, ["method.name=rank"])
    assert "tau" not in recipe.ablation


def test_layers_merge_settings_and_a_list_replaces_all(tmp_path: Path) -> None:
    (tmp_path / "base.yaml").write_text(TAU)
    layer = "extends: base.yaml\nablation: {tau: %s}\n"
    recipe = loaded(tmp_path, layer % "{values: [0.1], set: {k: 4, train.lr: 0.1}}")
    assert recipe.resolved()["ablation"]["tau"] == {
        "values": [0.1],
        "set": {"k": 4, "method.gamma": 0.5, "train.lr_schedule": "constant", "train.steps": 240, "train.lr": 0.1},
    }
    assert loaded(tmp_path, layer % "[0.1]").resolved()["ablation"]["tau"] == [0.1]


def test_the_resolved_recipe_is_read_back(tmp_path: Path) -> None:
    """Also as YAML; `values` alone is the same as the list."""
    recipe = loaded(tmp_path)
    assert build_recipe(recipe.resolved()) == recipe
    assert loaded(tmp_path, yaml.safe_dump(recipe.resolved())) == recipe
    same = loaded(tmp_path, "extends: ocr\nablation: {k: {values: [2, 4, 6, 8]}}\n")
    assert same.digest() == load_recipe("ocr").digest() and same.resolved()["ablation"]["k"] == [2, 4, 6, 8]


def test_paths_are_looked_up_beside_the_recipe(tmp_path: Path) -> None:
    (tmp_path / "words.txt").write_text('a sign that says "A"\n')
    recipe = loaded(tmp_path, fixing("{prompts.train.file: words.txt, prompts.train.count: 1}"))
    (cell,) = plan_sweep(recipe, ["tau"], ["0"]).cells
    assert cell.recipe.prompts.train.file == str(tmp_path / "words.txt") and cell.recipe.prompts.train.builtin is None
