"""The rules of a prompt source: which keys apply to which set."""

from __future__ import annotations

from typing import Any

import pytest

from gdro_cli.config.keys import describe_fields
from gdro_cli.config.load import load_recipe
from gdro_cli.config.rules import source_problems
from gdro_cli.config.sections import PromptSource, RewardSection
from gdro_cli.errors import UserError
from gdro_cli.identity import digest


def messages(reward: str, **keys: Any) -> list[str]:
    problems = source_problems(PromptSource(**keys), path="here", reward=RewardSection(kind=reward))
    return [f"{problem.path}: {problem.message}" for problem in problems]


def message(*overrides: str) -> str:
    with pytest.raises(UserError) as caught:
        load_recipe("ocr", overrides=overrides)
    return str(caught.value)


@pytest.mark.parametrize(
    ("reward", "keys"),
    [
        ("geneval", {"builtin": "geneval-train", "count": 9, "seed": 2, "tags": {"position": 7, "counting": 0.5}}),
        ("geneval", {"builtin": "geneval-test", "tags": {"position": 1, "colors": 0}, "plurals": "naive"}),
        ("geneval", {"builtin": "geneval-coco-test", "plurals": "correct"}),
        ("geneval", {"file": "evaluation_metadata.jsonl", "count": 3}),
        ("ocr", {"builtin": "ocr-train", "two_line_share": 0.5, "min_letters": 3, "max_letters": 3}),
    ],
)
def test_valid_sources(reward: str, keys: dict[str, Any]) -> None:
    assert messages(reward, **keys) == []


@pytest.mark.parametrize(
    ("reward", "keys", "expected"),
    [
        (
            "geneval",
            {"builtin": "geneval-train", "two_line_share": 0.5, "min_letters": 9},
            [
                "here.two_line_share: only applies to a built-in OCR set, not to 'geneval-train': remove it",
                "here.min_letters: only applies to a built-in OCR set, not to 'geneval-train': remove it",
            ],
        ),
        (
            "ocr",
            {"builtin": "ocr-train", "tags": {"colors": 1}, "plurals": "correct"},
            [
                "here.tags: only applies to a built-in GenEval set, not to 'ocr-train': remove it",
                "here.plurals: only applies to a geneval-coco set, not to 'ocr-train': remove it",
            ],
        ),
        (
            "geneval",
            {"file": "a.jsonl", "tags": {"colors": 1}, "plurals": "correct"},
            [
                "here.tags: only applies to a `builtin` set, not to a `file`: remove it",
                "here.plurals: only applies to a `builtin` set, not to a `file`: remove it",
            ],
        ),
        (
            "geneval",
            {"builtin": "geneval-train", "skip_bad": True},
            ["here.skip_bad: only applies to a `file`, not to a `builtin` set: remove it"],
        ),
        (
            "geneval",
            {"builtin": "geneval-validation", "plurals": "correct"},
            ["here.plurals: only applies to a geneval-coco set, not to 'geneval-validation': remove it"],
        ),
        (
            "geneval",
            {"builtin": "geneval-train", "tags": {"colours": 1, "position": 2}},
            [
                "here.tags.colours: is not a tag (they are: single_object, two_object, counting, colors, position, "
                "color_attr); did you mean `colors`?"
            ],
        ),
        (
            "geneval",
            {"builtin": "geneval-train", "tags": {"colors": 0}},
            ["here.tags: gives no tag a weight above 0: give one, or remove it"],
        ),
        (
            "geneval",
            {"builtin": "geneval-train", "tags": {}},
            ["here.tags: gives no tag a weight above 0: give one, or remove it"],
        ),
        (
            "geneval",
            {"builtin": "geneval-cocotest"},
            [
                "here.builtin: 'geneval-cocotest' is not a built-in set (they are: geneval-train, geneval-validation, "
                "geneval-test, geneval-coco-train, geneval-coco-validation, geneval-coco-test); "
                "did you mean `geneval-coco-test`?"
            ],
        ),
    ],
)
def test_invalid_sources(reward: str, keys: dict[str, Any], expected: list[str]) -> None:
    assert messages(reward, **keys) == expected


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("prompts.train.tags={colors: 1}", "prompts.train.tags: only applies to a built-in GenEval set"),
        ("prompts.train.tags.colors=1", "prompts.train.tags: only applies to a built-in GenEval set"),
        ("prompts.eval.tags={colors: -1}", "prompts.eval.tags.colors: must be at least 0, not -1."),
        ("prompts.eval.tags={colors: .inf}", "prompts.eval.tags.colors: must be a finite number, not inf."),
        ("prompts.eval.tags={colors: many}", "prompts.eval.tags.colors: must be a number, not 'many'."),
        ("prompts.eval.tags=[colors]", "prompts.eval.tags: must be a section of keys and values"),
        (
            "prompts.eval.plurals=corect",
            "prompts.eval.plurals: must be 'naive' or 'correct', not 'corect'; did you mean `correct`?",
        ),
    ],
)
def test_a_problem_in_a_recipe_is_one_sentence(override: str, expected: str) -> None:
    text = message(override)
    assert expected in f"{text}."
    assert "\n" not in text


def test_weights_7_and_7_0_are_the_same() -> None:
    whole, decimal = (PromptSource(builtin="geneval-train", tags={"position": weight}) for weight in (7, 7.0))
    assert digest(whole) == digest(decimal)
    assert PromptSource.model_validate(whole.model_dump(mode="json")) == whole


def test_the_documented_type_of_tags_is_numbers() -> None:
    types = {doc.path: doc.type for doc in describe_fields()}
    assert types["prompts.train.tags"] == "section of numbers | null"
    assert types["ablation"] == "section of lists"
