"""What each key affects and who uses it, as sweeps, runs and stores read it."""

from __future__ import annotations

import pytest

from gdro_cli.config.keys import describe_fields, field_doc, foreign_keys, values_that_affect
from gdro_cli.config.load import load_recipe


def test_every_key_says_what_it_affects() -> None:
    assert [doc.path for doc in describe_fields() if not doc.section and not doc.affects] == []


def test_the_innermost_annotation_counts() -> None:
    """A key's own, otherwise that of its section. Prompt sources are one class in three sections."""
    assert field_doc("train.micro_batch").affects == {"speed"}
    assert field_doc("train.lora.rank").affects == {"training"}
    assert field_doc("reward.geneval.objective").affects == {"training"}
    assert field_doc("reward.geneval.detector").affects == {"scores", "measurement"}
    assert field_doc("method.tau").affects == field_doc("method.noise_level").affects == {"training"}
    by_split = {split: field_doc(f"prompts.{split}.count").affects for split in ("train", "validation", "eval")}
    assert by_split == {"train": {"images", "training"}, "validation": {"measurement"}, "eval": {"evaluation"}}


def test_a_key_that_is_not_set_has_the_value_it_falls_back_to() -> None:
    recipe = load_recipe("ocr", overrides=["seed=7", "sample.steps=5", "eval.guidance=2.5"])
    assert values_that_affect(recipe, "training")["train"]["seed"] == 7
    measured = values_that_affect(recipe, "measurement")["eval"]
    assert (measured["steps"], measured["guidance"]) == (5, 2.5)


@pytest.mark.parametrize(("name", "task"), [("ocr", "ocr"), ("geneval", "geneval")])
def test_keys_of_another_task_are_left_out(name: str, task: str) -> None:
    scores = values_that_affect(load_recipe(name), "scores")["reward"]
    assert set(scores) == {"kind", task}


def test_keys_of_another_method_are_left_out() -> None:
    online = values_that_affect(load_recipe("ocr-flow-grpo"), "images", "training", "speed")
    assert "images_per_prompt" not in online["sample"]
    assert not {"groups_per_step", "rounds", "group_gradient", "cache_reference", "prefetch"} & online["train"].keys()
    assert "noise_level" in online["method"] and not {"tau", "eta", "k"} & online["method"].keys()
    assert {"train.rounds", "method.tau", "method.eta"} < foreign_keys("flow-grpo").keys()
    assert "train.rounds" not in foreign_keys("dpo")


def test_a_key_for_stored_groups_names_their_methods() -> None:
    stored = ("gdro", "rank", "top1", "dpo", "sft", "regression", "dgpo", "nft")
    assert field_doc("train.rounds").methods == field_doc("method.beta").methods == stored
    assert field_doc("train.groups_per_step").instead == "method.prompts_per_round"
    assert field_doc("reward.ocr.engine").reward == "ocr"
