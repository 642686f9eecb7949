"""From parameters and values to cells: what is swept, what is refused, and with which message."""

from __future__ import annotations

from typing import Any

import pytest

from gdro_cli.config import sweep
from gdro_cli.config.keys import SHORT_NAMES, field_names, full_key
from gdro_cli.config.load import load_recipe, shipped_recipes
from gdro_cli.config.recipe import Recipe
from gdro_cli.config.sweep import plan_sweep
from gdro_cli.errors import UserError


@pytest.fixture(scope="module")
def ocr() -> Recipe:
    return load_recipe("ocr")


def test_the_values_of_tau_come_from_the_recipe(ocr: Recipe) -> None:
    sweep = plan_sweep(ocr, ["tau"])
    assert [cell.label for cell in sweep.cells] == ["tau 0.5", "tau 0.05", "tau 0.025", "tau 0"]
    assert [cell.recipe.resolved()["method"]["tau"] for cell in sweep.cells] == [0.5, 0.05, 0.025, 0]
    assert {cell.seed for cell in sweep.cells} == {0} and sweep.notes == ()
    assert sweep.name.startswith("ocr-tau-") and sweep.name == plan_sweep(ocr, ["tau"]).name
    assert sweep.name != plan_sweep(ocr, ["tau"], ["0.5,0.05,0.025"]).name


@pytest.mark.parametrize(("values", "seeds"), [("0.5,0", 10**8), ("0.5,0", 501), (",".join(map(str, range(1001))), 1)])
def test_too_many_cells_are_refused(ocr: Recipe, values: str, seeds: int) -> None:
    """This happens before any of them is made."""
    with pytest.raises(
        UserError, match=r"the sweep has [\d,]+ cells .* more than the 1,000 of one ablation: name fewer"
    ):
        plan_sweep(ocr, ["tau"], [values], seeds=seeds)


def test_the_largest_number_of_cells_is_accepted(ocr: Recipe, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sweep, "MOST_CELLS", 4)
    assert len(plan_sweep(ocr, ["tau"], ["0.5,0"], seeds=2).cells) == 4
    with pytest.raises(UserError, match="has 6 cells"):
        plan_sweep(ocr, ["tau"], ["0.5,0"], seeds=3)


def test_a_cell_is_the_recipe_with_one_key_changed(ocr: Recipe) -> None:
    (cell,) = plan_sweep(ocr, ["method.beta"], ["4"]).cells
    expected = load_recipe("ocr", overrides=["method.beta=4.0", "train.seed=0"])
    assert cell.recipe.resolved() == expected.resolved()


@pytest.mark.parametrize(
    ("short", "key"),
    [
        *SHORT_NAMES.items(),
        *((name, f"method.{name}") for name in ("tau", "beta", "gamma", "k", "reduction", "share_noise", "sigma_min")),
        ("train.lr", "train.lr"),
        ("taau", None),
    ],
)
def test_short_names(short: str, key: str | None) -> None:
    assert full_key(short) == key
    assert key is None or key in field_names()


@pytest.mark.parametrize("name", sorted(shipped_recipes()))
def test_every_shipped_ablation_can_be_swept(name: str) -> None:
    recipe = load_recipe(name)
    assert recipe.ablation
    for key, entry in recipe.ablation.items():
        assert len(plan_sweep(recipe, [key]).cells) == len(entry.values)


def test_two_keys_are_a_grid_and_seeds_repeat_it(ocr: Recipe) -> None:
    sweep = plan_sweep(ocr, ["beta", "tau"], ["4,6", "0.5,0"], seeds=2)
    grid = ["beta 4, tau 0.5", "beta 4, tau 0", "beta 6, tau 0.5", "beta 6, tau 0"]
    assert sweep.labels == tuple(grid)
    assert [(cell.label, cell.seed) for cell in sweep.cells] == [(label, seed) for seed in (0, 1) for label in grid]
    assert all(cell.recipe.train.seed == cell.seed and cell.recipe.seed == 0 for cell in sweep.cells)
    assert any("train.seed" in note for note in sweep.notes)


def test_seeds_count_from_that_of_the_recipe() -> None:
    recipe = load_recipe("ocr", overrides=["seed=7"])
    assert plan_sweep(recipe, ["tau"], ["0"], seeds=3).seeds == (7, 8, 9)
    recipe = load_recipe("ocr", overrides=["seed=7", "train.seed=3"])
    assert plan_sweep(recipe, ["tau"], ["0"], seeds=2).seeds == (3, 4)


def test_another_method_keeps_the_common_keys_and_reports_what_it_drops(ocr: Recipe) -> None:
    sweep = plan_sweep(ocr, ["method"], ["gdro,rank,dpo"])
    gdro, rank, dpo = (cell.recipe.resolved()["method"] for cell in sweep.cells)
    assert rank == {name: value for name, value in gdro.items() if name != "tau"} | {"name": "rank"}
    assert (dpo["gamma"], dpo["pairs"]) == (ocr.group_method.gamma, "best_worst")
    assert any(note.startswith("rank has no tau") for note in sweep.notes)
    assert any("dpo has the default pairs best_worst" in note for note in sweep.notes)


def test_evaluation_points_are_added_if_the_recipe_has_none() -> None:
    recipe = load_recipe("ocr", overrides=["train.eval_every=0"])
    sweep = plan_sweep(recipe, ["train.steps"], ["10,300"])
    assert [cell.recipe.train.eval_every for cell in sweep.cells] == [3, 75]
    assert any("set to 3, 75" in note for note in sweep.notes)


def test_keys_of_the_store_say_so(ocr: Recipe) -> None:
    assert any("have a store each" in note for note in plan_sweep(ocr, ["sample.images_per_prompt"], ["8,16"]).notes)
    pinned = load_recipe("ocr", overrides=["eval.steps=5"])
    sweep = plan_sweep(pinned, ["sample.steps"], ["4,5"])
    assert [(cell.recipe.sample.steps, cell.recipe.eval_steps) for cell in sweep.cells] == [(4, 5), (5, 5)]
    assert not plan_sweep(ocr, ["k"]).notes


def test_lists_texts_and_flags_can_be_values(ocr: Recipe) -> None:
    targets = plan_sweep(ocr, ["train.lora.targets"], ["auto,[to_q, to_k]"])
    assert targets.labels == ("train.lora.targets auto", 'train.lora.targets ["to_q", "to_k"]')
    flags = plan_sweep(ocr, ["share_noise"], ["true,false"]).cells
    assert [cell.recipe.resolved()["method"]["share_noise"] for cell in flags] == [True, False]
    geneval = plan_sweep(load_recipe("geneval"), ["reward.geneval.objective"], ["soft,{soft: 1, strict: 2}"])
    assert geneval.trains_on_another and len(geneval.cells) == 2


@pytest.mark.parametrize(
    ("names", "values", "words"),
    [
        ([], None, "the recipe ocr has values for tau, beta, gamma, k"),
        (["taau"], None, "there is no recipe key 'taau'; did you mean `method.tau`?"),
        (["rnk"], None, "did you mean `rank`?"),
        (["train"], None, "train is a section: name one of its keys"),
        (["tau"], ["0.5,-1"], "ocr with tau -1: method.tau: must be at least 0, not -1"),
        (["tau"], ["a"], "method.tau: must be a number, not 'a'"),
        (["tau"], ["0.5,}"], "is not valid YAML"),
        (["tau"], ["0.5] [1"], "is not valid YAML"),
        (["tau"], [""], "there are no values"),
        (["lr"], None, "the recipe ocr has none in its section `ablation`"),
        (["k"], ["2,17"], "ocr with k 17: method.k: 17 is more than sample.images_per_prompt (8)"),
        (["tau"], ["0.5,0.50"], "tau 0.5: the same value twice"),
        (["beta"], ["12,12.0"], "beta 12 and beta 12.0: the same value twice"),
        (["tau", "method.tau"], None, "--param method.tau is given twice"),
        (["tau", "beta"], ["1"], "--values is given 1 times for 2 --param"),
        (["method"], ["gdro,grpo"], "did you mean `gdro`?"),
        (["method", "tau"], ["gdro,rank", "0.5"], "the method 'rank' has no such key"),
        (["seed"], ["1,2"], "`--seeds N` repeats"),
        (["train.seed"], ["1,2"], "`--seeds N` repeats"),
        (["name"], ["a,b"], "says something about the recipe"),
        (["ablation"], ["1"], "says something about the recipe"),
        (["reward.kind"], ["geneval"], "is what is measured"),
        (["prompts.validation.count"], ["4,8"], "changes what is measured"),
        (["prompts.eval.count"], ["4,8"], "changes what is measured"),
        (["judge.kind"], ["none"], "changes what is measured"),
        (["eval.weights"], ["ema,raw"], "changes what is measured"),
        (["reward.ocr.recognition_width"], ["160,320"], "changes what is measured"),
        (["sample.height"], ["64"], "changes what is measured"),
        (["sample.steps"], ["4,5"], "pin that first, as in --set eval.steps=5"),
        (["sample.guidance"], ["1,2"], "pin that first, as in --set eval.guidance=1.0"),
        (["model.dtype"], ["float32"], "changes the base model"),
        (["train.lora.init"], ["one,other"], "changes the base model"),
        (["train.trackers"], ["[wandb]"], "not what is learnt"),
        (["train.log_every"], ["1,2"], "not what is learnt"),
        (["train.eval_every"], ["1,2"], "changes what is measured"),
    ],
)
def test_a_sweep_that_makes_no_sense_is_one_sentence(names: list[str], values: Any, words: str, ocr: Recipe) -> None:
    with pytest.raises(UserError) as refusal:
        plan_sweep(ocr, names, values)
    assert words in str(refusal.value)
    assert "\n" not in str(refusal.value)


def test_nonsense_for_any_key_is_refused(ocr: Recipe) -> None:
    """Whatever the key, the error is a UserError."""
    for key in field_names():
        with pytest.raises(UserError):
            plan_sweep(ocr, [key], ["{nonsense: [1]}"])
