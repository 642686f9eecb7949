"""Loading recipes: shipped ones, names and paths, `extends`, `--set`, and the resolved recipe."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml

from gdro_cli.config.layers import merge_layers
from gdro_cli.config.load import build_recipe, load_recipe, shipped_recipes
from gdro_cli.errors import UserError
from gdro_cli.identity import differences, digest

MINIMAL = """
prompts:
  train: {builtin: ocr-train, count: 8}
  validation: {builtin: ocr-validation, count: 2}
  eval: {builtin: ocr-test, count: 4}
"""


def write(folder: Path, name: str, text: str) -> str:
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
    return str(path)


@pytest.mark.parametrize("name", sorted(shipped_recipes()))
def test_every_shipped_recipe_loads_and_has_a_description(name: str) -> None:
    recipe = load_recipe(name)
    assert recipe.name == name
    assert recipe.description


def test_there_are_shipped_recipes() -> None:
    assert {"geneval", "ocr", "ocr-flow-grpo", "smoke"} <= set(shipped_recipes())


def test_name_file_name_and_path_give_the_same_recipe() -> None:
    by_name = load_recipe("ocr")
    assert load_recipe("ocr.yaml").resolved() == by_name.resolved()
    assert load_recipe(str(shipped_recipes()["ocr"])).resolved() == by_name.resolved()


def test_an_existing_path_wins_over_a_shipped_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path, "ocr.yaml", MINIMAL + "seed: 77\n")
    monkeypatch.chdir(tmp_path)
    assert load_recipe("ocr.yaml").seed == 77
    assert load_recipe("ocr").seed != 77


def test_an_unknown_recipe_is_refused_with_the_shipped_names() -> None:
    with pytest.raises(
        UserError, match="no recipe file 'orc'.*shipped: .*geneval, .*ocr, ocr-ablation, ocr-dance-grpo"
    ):
        load_recipe("orc")


def test_a_folder_is_not_a_recipe(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="is a folder"):
        load_recipe(str(tmp_path))


def test_the_resolved_recipe_is_a_recipe_and_its_yaml_too(tmp_path: Path) -> None:
    resolved = load_recipe("ocr", overrides=["train.lr=1e-5", "train.trackers=[wandb]"]).resolved()
    assert build_recipe(json.loads(json.dumps(resolved))).resolved() == resolved
    path = write(tmp_path, "again.yaml", yaml.safe_dump(resolved))
    assert load_recipe(path).resolved() == resolved


def test_a_recipe_cannot_be_changed() -> None:
    recipe = load_recipe("ocr")
    with pytest.raises(ValueError, match="frozen"):
        recipe.seed = 1  # type: ignore[misc]


def test_the_name_is_the_file_name_unless_given(tmp_path: Path) -> None:
    assert load_recipe(write(tmp_path, "my signs!.yaml", MINIMAL)).name == "my-signs"
    assert load_recipe(write(tmp_path, "b.yaml", MINIMAL + "name: given\n")).name == "given"


def test_the_method_is_gdro_unless_named(tmp_path: Path) -> None:
    assert load_recipe(write(tmp_path, "a.yaml", MINIMAL)).method.name == "gdro"
    recipe = load_recipe(write(tmp_path, "b.yaml", MINIMAL + "method: {tau: 0.5}\n"))
    assert recipe.resolved()["method"]["tau"] == 0.5


def test_evaluation_falls_back_to_the_sampling_settings() -> None:
    recipe = load_recipe("ocr", overrides=["sample.steps=5", "sample.guidance=2.0"])
    assert (recipe.eval_steps, recipe.eval_guidance) == (5, 2.0)
    recipe = load_recipe("ocr", overrides=["eval.steps=9", "eval.guidance=0.0"])
    assert (recipe.eval_steps, recipe.eval_guidance) == (9, 0.0)


# --- extends -------------------------------------------------------------------------------------------------


def test_extends_merges_sections_and_replaces_values(tmp_path: Path) -> None:
    write(tmp_path, "base/root.yaml", MINIMAL + "name: root\ndescription: d\nseed: 1\ntrain: {steps: 5, lr: 0.1}\n")
    write(tmp_path, "base/middle.yaml", "extends: root.yaml\ntrain: {lr: 0.2}\n")
    leaf = load_recipe(write(tmp_path, "leaf.yaml", "extends: base/middle.yaml\ntrain: {warmup_steps: 2}\n"))
    assert (leaf.seed, leaf.train.steps, leaf.train.lr, leaf.train.warmup_steps) == (1, 5, 0.2, 2)
    assert (leaf.name, leaf.description) == ("leaf", "")


def test_weights_are_replaced_as_a_whole(tmp_path: Path) -> None:
    """Of objectives and tags: what is not named has no weight. Several ``--set`` are one layer."""
    objective = "reward.geneval.objective"
    for overrides, weights in (
        ([f"{objective}={{strict: 1}}"], {"strict": 1}),
        ([f"{objective}.soft=1", f"{objective}.accuracy=2"], {"soft": 1, "accuracy": 2}),
    ):
        assert load_recipe("geneval", overrides=overrides).reward.geneval.objective == weights
    recipe = write(tmp_path, "mean.yaml", MINIMAL + "reward: {ocr: {objective: {accuracy: 1, similarity: 1}}}\n")
    assert load_recipe(recipe, overrides=["reward.ocr.objective={exact: 1}"]).reward.ocr.objective == {"exact": 1}
    train = load_recipe("geneval", overrides=["prompts.train.tags={counting: 2}"]).prompts.train
    assert (train.tags, train.count) == ({"counting": 2}, 960)


def test_extends_takes_a_shipped_name(tmp_path: Path) -> None:
    recipe = load_recipe(write(tmp_path, "mine.yaml", "extends: ocr\nseed: 5\n"))
    assert (recipe.seed, recipe.prompts) == (5, load_recipe("ocr").prompts)


def test_a_cycle_of_extends_is_refused(tmp_path: Path) -> None:
    write(tmp_path, "a.yaml", "extends: b.yaml\n")
    path = write(tmp_path, "b.yaml", "extends: a.yaml\n")
    with pytest.raises(UserError, match=r"b.yaml -> a.yaml -> b.yaml"):
        load_recipe(path)


@pytest.mark.parametrize("value", ["nowhere.yaml", "[ocr]", "''", "3"])
def test_a_wrong_extends_is_refused(tmp_path: Path, value: str) -> None:
    with pytest.raises(UserError, match="extends"):
        load_recipe(write(tmp_path, "a.yaml", f"extends: {value}\n"))


# --- keys that a later layer replaces ------------------------------------------------------------------------


def test_another_method_drops_inherited_keys_it_does_not_have() -> None:
    """ocr.yaml sets tau; dpo has none; beta, gamma and k stay."""
    base = load_recipe("ocr").method
    method = load_recipe("ocr", overrides=["method.name=dpo"]).method
    assert method.name == "dpo"
    assert (method.k, method.beta, method.gamma) == (base.k, base.beta, base.gamma)


@pytest.mark.parametrize("order", [["method.name=dpo", "method.tau=0.1"], ["method.tau=0.1", "method.name=dpo"]])
def test_a_key_given_together_with_a_method_must_belong_to_it(order: list[str]) -> None:
    with pytest.raises(UserError, match=r"method\.tau: the method 'dpo' has no such key \(it belongs to gdro, top1"):
        load_recipe("ocr", overrides=order)


def test_an_online_method_also_drops_keys_of_the_store() -> None:
    """geneval.yaml may set the groups of a step; a round has none."""
    recipe = load_recipe("ocr", overrides=["sample.images_per_prompt=10", "train.groups_per_step=4"])
    layered = build_recipe(merge_layers([recipe.resolved(), {"method": {"name": "flow-grpo"}}]))
    assert (layered.sample.images_per_prompt, layered.train.groups_per_step) == (16, 8)  # the defaults, unread
    assert layered.sample.steps == recipe.sample.steps


def test_an_online_method_is_not_a_group_method() -> None:
    online, offline = load_recipe("ocr-flow-grpo"), load_recipe("ocr")
    assert online.online_method is online.method and offline.online_method is None
    assert offline.group_method is offline.method
    with pytest.raises(TypeError, match="flow-grpo does not train on stored groups"):
        _ = online.group_method
    assert load_recipe("ocr-flow-grpo", overrides=["method.inner_epochs=3"]).online_method.steps_per_round == 6  # type: ignore[union-attr]


def test_returning_to_a_method_gives_its_defaults_not_the_dropped_values(tmp_path: Path) -> None:
    write(tmp_path, "one.yaml", MINIMAL + "method: {name: gdro, tau: 0.7}\n")
    two = write(tmp_path, "two.yaml", "extends: one.yaml\nmethod: {name: rank}\n")
    assert "tau" not in load_recipe(two).resolved()["method"]
    assert load_recipe(two, overrides=["method.name=gdro"]).resolved()["method"]["tau"] == 0.05


def test_a_prompt_file_replaces_an_inherited_builtin_set_and_back(tmp_path: Path) -> None:
    file = write(tmp_path, "p.txt", 'a sign "A"\n')
    source = load_recipe("ocr", overrides=[f"prompts.train.file={file}"]).prompts.train
    assert (source.file, source.builtin, source.count) == (file, None, None)
    recipe = write(tmp_path, "r.yaml", f"extends: ocr\nprompts: {{train: {{file: {file}, count: 1}}}}\n")
    source = load_recipe(recipe, overrides=["prompts.train.builtin=ocr-train"]).prompts.train
    assert (source.file, source.builtin, source.count) == (None, "ocr-train", None)


def test_changing_the_count_keeps_the_builtin_set() -> None:
    source = load_recipe("ocr", overrides=["prompts.train.count=3"]).prompts.train
    assert (source.builtin, source.count) == ("ocr-train", 3)


# --- paths ---------------------------------------------------------------------------------------------------


def test_paths_are_resolved_beside_the_recipe_that_names_them_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    beside = write(tmp_path, "a/prompts.txt", 'x "A"\n')
    write(tmp_path, "b/prompts.txt", 'x "B"\n')
    only_here = write(tmp_path, "b/here.txt", 'x "C"\n')
    base = MINIMAL.replace("{builtin: ocr-train, count: 8}", "{file: prompts.txt}")
    write(tmp_path, "a/base.yaml", base.replace("{builtin: ocr-test, count: 4}", "{file: here.txt}"))
    leaf = write(tmp_path, "b/leaf.yaml", "extends: ../a/base.yaml\n")
    monkeypatch.chdir(tmp_path / "b")
    prompts = load_recipe(leaf).prompts
    assert (prompts.train.file, prompts.eval.file) == (beside, only_here)


def test_a_local_model_folder_becomes_absolute_and_a_hub_id_stays(tmp_path: Path) -> None:
    (tmp_path / "flux").mkdir()
    recipe = write(tmp_path, "r.yaml", "extends: ocr\nmodel: {path: flux}\n")
    assert load_recipe(recipe).model.path == str(tmp_path / "flux")
    assert load_recipe(recipe, overrides=["model.path=org/name"]).model.path == "org/name"
    adapter = write(tmp_path, "lora.yaml", "extends: ocr\ntrain: {lora: {init: flux}}\n")
    assert load_recipe(adapter).train.lora.init == str(tmp_path / "flux")


# --- --set ---------------------------------------------------------------------------------------------------


def test_set_values_are_yaml() -> None:
    overrides = [
        "train.lr=1e-5",  # YAML 1.1 would read text
        "eval.steps=null",
        "train.lora.targets=[to_q, to_k]",
        "train.lora={rank: 4}",
        "method.share_noise=false",
        "seed=1",
        "seed=2",  # the last counts
    ]
    recipe = load_recipe("ocr", overrides=overrides)
    assert recipe.train.lr == 1e-5
    assert recipe.eval.steps is None
    assert (recipe.train.lora.targets, recipe.train.lora.rank) == (("to_q", "to_k"), 4)
    assert recipe.method.share_noise is False
    assert recipe.seed == 2


@pytest.mark.parametrize("text", ['"a #1"', "'a #1'", "a#1", '"#1"'])
def test_a_set_value_may_have_a_number_sign_in_quotes_or_in_a_word(text: str) -> None:
    assert load_recipe("ocr", overrides=[f"description={text}"]).description == text.strip("'\"")


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("seed", "key=value"),
        ("=3", "key=value"),
        ("train..lr=3", "key=value"),
        ("train.lr=[1", "not valid YAML"),
        ("extends=ocr", "--recipe"),
        ("method={1: 2}", "is not a name"),
        ("seed=*a", "aliases"),
        ("description=a #1", "the value of --set description has a # that YAML takes for a comment: put the text in"),
        ("description=#1", "has a # that YAML"),
        ("train.trackers=[wandb] # one", "has a # that YAML"),
    ],
)
def test_a_wrong_set_is_refused(override: str, words: str) -> None:
    with pytest.raises(UserError, match=words):
        load_recipe("ocr", overrides=[override])


# --- digests and differences ---------------------------------------------------------------------------------


def test_the_digest_depends_on_the_values_and_not_on_the_name(tmp_path: Path) -> None:
    base = load_recipe("ocr")
    assert load_recipe(write(tmp_path, "copy.yaml", "extends: ocr\ndescription: other\n")).digest() == base.digest()
    assert load_recipe("ocr", overrides=["method.tau=0.06"]).digest() != base.digest()
    assert load_recipe("ocr", overrides=[f"seed={base.seed}"]).digest() == base.digest()


def test_digest_ignores_the_order_of_keys_and_is_fixed() -> None:
    """sha256 of {"a":1,"b":[2]} begins with these twelve digits (from sha256sum)."""
    assert digest({"b": [2], "a": 1}) == digest({"a": 1, "b": [2]}) == "0855bfc20eb6"


def test_differences_name_changed_added_and_removed_keys() -> None:
    before = load_recipe("ocr", overrides=["seed=1", "method.tau=0.05", "train.lr=3e-4"])
    after = load_recipe("ocr", overrides=["seed=2", "train.lr=0.5", "method.name=rank"])
    lines = [str(difference) for difference in differences(before, after)]
    assert lines == [
        "seed: 1 -> 2",
        'method.name: "gdro" -> "rank"',
        "method.tau: 0.05 -> (absent)",
        "train.lr: 0.0003 -> 0.5",
        "ablation.tau: [0.5, 0.05, 0.025, 0] -> (absent)",
    ]
    assert differences(before, before) == ()
    (added,) = differences({"a": 1}, {"a": 1, "b": None})
    assert str(added) == "b: (absent) -> null"
