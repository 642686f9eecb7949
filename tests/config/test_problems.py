"""All problems of a recipe are reported at once, by dotted path, in plain words."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gdro_cli.config.keys import describe_fields, field_names
from gdro_cli.config.load import build_recipe, load_recipe
from gdro_cli.config.yamlfile import dump_yaml, dump_yaml_line, parse_yaml
from gdro_cli.errors import UserError

KINDS = "'ocr', 'geneval', 'clip', 'pickscore', 'hpsv2', 'aesthetic', 'http', 'vlm' or 'mix'"


def message(*overrides: str) -> str:
    with pytest.raises(UserError) as caught:
        load_recipe("ocr", overrides=["sample.images_per_prompt=16", *overrides])
    return str(caught.value)


def test_all_problems_are_reported_at_once_also_those_between_keys() -> None:
    text = message("method.k=99", "train.lr=-1", "sede=3", "sample.image_format=jpg", "sample.height=64")
    assert text.splitlines()[0].endswith("has 5 problems:")
    assert sorted(line.strip() for line in text.splitlines()[1:]) == [
        "method.k: 99 is more than sample.images_per_prompt (16): lower k or sample more images",
        "sample.image_format: must be 'png' or 'webp', not 'jpg'; did you mean `png`?",
        "sample.width: is missing: set both height and width, or neither",
        "sede: unknown key; did you mean `seed`?",
        "train.lr: must be greater than 0, not -1",
    ]


def test_a_rule_about_a_wrong_key_is_not_reported_as_well() -> None:
    """With images_per_prompt invalid, k may or may not be too large."""
    assert message("method.k=99", "sample.images_per_prompt=x").count("\n") == 0
    assert message("judge.model=m", "judge.kind=gpt").count("\n") == 0
    assert message("prompts.eval.min_letters=7", "prompts.eval.max_letters=x").count("\n") == 0


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        # unknown keys: a sibling, a key of another section, nothing alike
        ("method.taau=1", "method.taau: unknown key; did you mean `method.tau`?"),
        ("train.lora.rnk=1", "train.lora.rnk: unknown key; did you mean `train.lora.rank`?"),
        ("tau=1", "tau: unknown key; did you mean `method.tau`?"),
        ("steps=1", "steps: unknown key; did you mean `sample.steps` or `train.steps` or `eval.steps`?"),
        ("smaple.steps=1", "smaple: unknown key; did you mean `sample`?"),
        ("method.xyzzy=1", "method.xyzzy: unknown key."),
        ("method.pairs=all", "the method 'gdro' has no such key (it belongs to dpo): remove it."),
        # values
        ("method.tau=-0.1", "method.tau: must be at least 0, not -0.1."),
        ("method.beta=0", "method.beta: must be greater than 0, not 0."),
        (
            "method.name=dop",
            "'dpo', 'sft', 'regression', 'dgpo', 'nft', 'flow-grpo', 'dance-grpo', not 'dop'; did you mean `dpo`?",
        ),
        ("reward.max_failed_share=2", "reward.max_failed_share: must be at most 1, not 2."),
        ("method.sigma_min=1", "method.sigma_min: must be less than 1, not 1."),
        ("seed=true", "seed: must be a whole number, not true."),
        ("seed=1.5", "seed: must be a whole number, not 1.5."),
        ("seed='1'", "seed: must be a whole number, not '1'."),
        ("train.lr=.nan", "train.lr: must be a finite number, not nan."),
        ("method.share_noise=1", "method.share_noise: must be true or false, not 1."),
        ("method.share_noise=no", "method.share_noise: must be true or false, not 'no'."),
        ("reward.workers=many", "reward.workers: must be a whole number or 'auto', not 'many'."),
        ("eval.rewards=[http]", "reward.http.url: is missing"),
        ("reward={kind: mix, mix: {weights: {ocr: 1, http: 1}}}", "reward.http.url: is missing"),
        ("reward.ocr.objective={exact: 0}", "reward.ocr.objective: needs at least one weight above 0"),
        ("reward.geneval.objective={}", "reward.geneval.objective: needs at least one weight above 0"),
        ("reward.workers=0", "reward.workers: must be at least 1 or 'auto', not 0."),
        ("train.adam_betas=[0.9]", "train.adam_betas[1]: is missing."),
        ("train.adam_betas=[0.9, 1]", "train.adam_betas[1]: must be less than 1, not 1."),
        ("train.lora.targets=[a, 3]", "train.lora.targets[1]: must be text, not 3."),
        ("train.trackers=[wandbb]", "did you mean `wandb`?"),
        ("model=tiny", "model: must be a section of keys and values, not 'tiny'."),
        ("method=gdro", "method: must be a section of keys and values, not 'gdro'."),
        ("train=null", "train: must be a section of keys and values, not null."),
        ("name=a/b", "name: must be letters, digits, '.', '_' or '-'"),
        ("reward.kind=orc", f"reward.kind: must be {KINDS}, not 'orc'; did you mean `ocr`?"),
        ("reward.kind=[ocr]", f"reward.kind: must be {KINDS}, not a list of 1."),
        (
            "prompts.task=ocr",
            "prompts.task: is not a key any more, since what prompts must carry follows from reward.kind: remove it.",
        ),
        # rules between keys
        ("method.k=17", "method.k: 17 is more than sample.images_per_prompt (16)"),
        ("method={sigma_min: 0.2, sigma_max: 0.2}", "method.sigma_min: 0.2 must be below method.sigma_max (0.2)."),
        (
            "method.sigma_by_round=[[0, 1], [0.5, 0.8]]",
            "method.sigma_by_round: has levels for 2 rounds, but train.rounds is 1",
        ),
        (
            "method.sigma_by_round=[[0.8, 0.5]]",
            "method.sigma_by_round[0]: the lowest level, 0.8, must be below the highest, 0.5.",
        ),
        ("prompts.eval.builtin=ocr-tst", "prompts.eval.builtin: 'ocr-tst' is not a built-in set"),
        ("prompts.eval.min_letters=7", "prompts.eval.min_letters: 7 is more than prompts.eval.max_letters (6)."),
        ("prompts.eval={builtin: ocr-test, file: a}", "prompts.eval: names both a `file` and a `builtin` set"),
        ("prompts.eval={builtin: null}", "prompts.eval: needs a `file` or a `builtin` set."),
        ("prompts.eval={file: a, seed: 3}", "prompts.eval.seed: only applies to a `builtin` set"),
        ("train.warmup_steps=100000", "train.warmup_steps: 100000 is more than train.steps"),
        ("ablation={taau: [1]}", "ablation.taau: there is no recipe key 'taau'; did you mean `method.tau`?"),
        ("ablation={tau: []}", "ablation.tau: needs at least one value."),
        (
            "ablation={method.tau: [1]}",
            "ablation.method.tau: is the same key as ablation.tau: give it once, by that name.",
        ),
        ("ablation={tau: 1}", "ablation.tau: must be a list, not 1."),
    ],
)
def test_one_problem_is_one_sentence(override: str, expected: str) -> None:
    text = message(override)
    assert expected in f"{text}."  # a full stop in the table marks the end of the message
    assert "\n" not in text
    assert "pydantic" not in text


def test_built_in_prompts_must_fit_the_reward() -> None:
    text = message("reward.kind=geneval", "prompts.validation={file: a.jsonl}", "prompts.eval={file: a.jsonl}")
    assert "prompts.train.builtin: the prompts of 'ocr-train' have no include and tag" in text
    assert "which reward.kind 'geneval' needs (that have: geneval-train, " in text


def test_one_pass_needs_the_group_in_one_forward() -> None:
    text = message("train.group_gradient=one_pass", "train.micro_batch=2")
    assert "train.group_gradient: 'one_pass' needs a whole group" in text
    load_recipe("ocr", overrides=["train.group_gradient=one_pass", "train.micro_batch=6"])


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        (
            "method.k=4",
            "method.k: the method 'flow-grpo' has no such key (it belongs to gdro, rank, top1, dpo, sft, regression,"
            " dgpo, nft): remove it.",
        ),
        ("method.eta=0.3", "method.eta: the method 'flow-grpo' has no such key (it belongs to dance-grpo): remove it."),
        (
            "sample.images_per_prompt=8",
            "sample.images_per_prompt: has no meaning for method.name 'flow-grpo': remove it and set"
            " method.group_size.",
        ),
        (
            "train.groups_per_step=4",
            "train.groups_per_step: has no meaning for method.name 'flow-grpo': remove it and"
            " set method.prompts_per_round.",
        ),
        ("train.group_gradient=two_pass", "has no meaning for method.name 'flow-grpo': remove it."),
        ("model.compile=true", "model.compile: cannot be combined with method.name 'flow-grpo'"),
        ("method.updates_per_round=97", "method.updates_per_round: 97 is more than the 96 images of a round"),
        ("method.train_sample_steps=1", "method.train_sample_steps: must be at least 2, not 1."),
        ("method.timestep_fraction=0", "method.timestep_fraction: must be greater than 0, not 0."),
        ("method.advantage_std=globl", "method.advantage_std: must be 'global' or 'group', not 'globl'"),
    ],
)
def test_keys_that_an_online_method_does_not_use(override: str, expected: str) -> None:
    with pytest.raises(UserError) as caught:
        load_recipe("ocr-flow-grpo", overrides=[override])
    assert expected in f"{caught.value}."
    assert "\n" not in str(caught.value)


def test_missing_keys_are_named() -> None:
    with pytest.raises(UserError) as caught:
        build_recipe({"prompts": {"train": {"builtin": "ocr-train"}}}, source="here")
    lines = str(caught.value).splitlines()
    assert lines[0] == "here has 3 problems:"
    assert sorted(lines[1:]) == ["  name: is missing", "  prompts.eval: is missing", "  prompts.validation: is missing"]


# --- files that are not recipes ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"a: [1", "line 1, column 6 is not valid YAML"),
        (b"seed: 1\nseed: 2\n", "line 2, column 1 .* repeated key 'seed'"),
        (b"a: &x 1\n", r"anchors \(&name\) and tags \(!name\) are not supported"),
        (b"a: 1\nb: *x\n", "line 2, column 4 .* aliases"),
        (b"a: !!python/object:os.system 1\n", "not valid YAML"),
        (b"- a\n- b\n", "must hold keys and values .* not a list of 2"),
        (b"just text\n", "must hold keys and values"),
        (b"1: 2\n", "the key 1 is not a name"),
        (b"{[1, 2]: 3}\n", "the key a list of 2 is not a name"),
        (b"a: \x00\n", "not valid YAML"),
        (b"\xff\xfea\n", "not a text file in UTF-8"),
        (b"[" * 5000, "nested too deeply"),
        (b"".join(b" " * i + b"a:\n" for i in range(900)), "nested too deeply"),
        (b"extends: ocr\nseed: " + b"9" * 5000, "seed: must be a whole number, not inf"),
        (b"a: 1\n---\nb: 2\n", "not valid YAML"),
        (b"#" * 1_000_001, "1 MB"),
        (b"", "prompts: is missing"),
    ],
)
def test_a_file_that_is_not_a_recipe_is_one_sentence(tmp_path: Path, content: bytes, words: str) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_bytes(content)
    with pytest.raises(UserError, match=words) as caught:
        load_recipe(str(path))
    assert "recipe.yaml" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_byte_order_mark_is_accepted(tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text("\ufeffextends: ocr\n", encoding="utf-8")
    assert load_recipe(str(path)).reward.kind == "ocr"


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("3e-4", 3e-4),
        ("1.", 1.0),
        (".5", 0.5),
        ("-2", -2),
        ("010", 10),
        ("1_000", "1_000"),
        ("1:30", "1:30"),
        ("no", "no"),
        ("on", "on"),
        ("true", True),
        ("null", None),
        ("~", None),
        ("", None),
        ("2020-01-01", "2020-01-01"),
        ("'1'", "1"),
    ],
)
def test_scalars_follow_yaml_1_2(text: str, value: object) -> None:
    parsed = parse_yaml(text, source="test")
    assert parsed == value
    assert type(parsed) is type(value)


@pytest.mark.parametrize("text", ["1e-5", "1.5e5", "08", "1.", ".5", "-.inf", "null", "no", "1:30", "", "it's", "a\nb"])
def test_written_text_is_read_back_as_text(text: str) -> None:
    assert parse_yaml(dump_yaml({"key": text, "list": [text]}), source="test") == {"key": text, "list": [text]}
    assert parse_yaml(dump_yaml_line(text), source="test") == text


# --- random input --------------------------------------------------------------------------------------------

SCALARS = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8)
VALUES = st.recursive(
    SCALARS, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=6), inner, max_size=3)
)


@pytest.mark.slow
@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.sampled_from(field_names(sections=True)), VALUES), min_size=1, max_size=4))
def test_any_value_of_any_key_gives_a_recipe_or_an_error(changes: list[tuple[str, object]]) -> None:
    data: dict[str, object] = load_recipe("ocr").resolved()
    for path, value in changes:
        *parents, last = path.split(".")
        section: object = data
        for parent in parents:
            section = section.setdefault(parent, {}) if isinstance(section, dict) else None
        if isinstance(section, dict):
            section[last] = value
    try:
        recipe = build_recipe(data)
    except UserError as error:
        assert "recipe" in str(error)
    else:
        assert build_recipe(recipe.resolved()).resolved() == recipe.resolved()


@settings(max_examples=150, deadline=None)
@given(st.text(max_size=30))
def test_any_text_as_yaml_gives_a_value_or_an_error(text: str) -> None:
    try:
        parse_yaml(text, source="test")
    except UserError as error:
        assert str(error).startswith("test")


@settings(max_examples=150, deadline=None)
@given(st.recursive(st.none() | st.booleans() | st.integers(-(2**62), 2**62) | st.text(max_size=8), st.lists))
def test_any_plain_value_is_written_and_read_back(value: object) -> None:
    for text in (dump_yaml(value), dump_yaml_line(value)):
        assert parse_yaml(text, source="test") == value


# --- the documentation of the fields -------------------------------------------------------------------------


def test_every_key_is_documented() -> None:
    undocumented = [doc.path for doc in describe_fields() if not doc.text.endswith(".")]
    assert undocumented == []


def test_a_key_of_some_methods_names_them() -> None:
    methods = {doc.path: doc.methods for doc in describe_fields()}
    assert methods["method.tau"] == ("gdro", "top1", "sft", "regression")
    assert methods["method.pairs"] == ("dpo",)
    assert methods["method.beta"] == ("gdro", "rank", "top1", "dpo", "sft", "regression", "dgpo", "nft")
    assert methods["method.name"] == ()
    defaults = {doc.path: doc.default for doc in describe_fields()}
    assert defaults["method.group_size"] == "24 (dance-grpo: 12)"
