"""Recipes and --set values that are wrong in all the ways that a file can be wrong."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from gdro_cli.config.keys import describe_fields
from gdro_cli.config.load import load_recipe
from tests.support.faulty import Case, check, command, never_unexpected, outcome, rows

BASE = b"extends: ocr\n"


def _bomb() -> bytes:
    lines = [b"a0: &a0 [lol, lol, lol]"]
    lines += [f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]".encode() for n in range(1, 10)]
    return b"\n".join(lines)


FILES = [
    Case("billion laughs", _bomb(), 2, "anchors"),
    Case("alias of a section", BASE + b"sample: &s {steps: 3}\neval: *s\n", 2, "anchors"),
    Case("alias of itself", b"a: &a [*a]\n", 2, "anchors"),
    Case("alias of nothing", BASE + b"seed: *x\n", 2, "aliases"),
    Case("anchor without an alias", BASE + b"seed: &x 3\n", 2, "anchors"),
    Case("merge key", BASE + b"sample:\n  <<: {steps: 3}\n", 2, "sample.<<: unknown key"),
    Case("repeated key", b"seed: 1\nseed: 2\n", 2, "repeated key 'seed'"),
    Case("repeated key, once in quotes", b"seed: 1\n'seed': 2\n", 2, "repeated key 'seed'"),
    Case("repeated key, deep", BASE + b"train:\n  lora: {rank: 1, rank: 2}\n", 2, "repeated key 'rank'"),
    Case("python object", b"a: !!python/object:os.system x\n", 2, "not valid YAML"),
    Case("python call", b"a: !!python/object/apply:os.system [id]\n", 2, "not valid YAML"),
    Case("python name", b"a: !!python/name:os.system\n", 2, "not valid YAML"),
    Case("own tag", b"a: !mine 3\n", 2, "not valid YAML"),
    Case("binary tag", BASE + b"description: !!binary aGk=\n", 2, "tags (!name) are not supported"),
    Case("binary tag of nonsense", BASE + b"description: !!binary '*'\n", 2),
    Case("timestamp", BASE + b"seed: !!timestamp 2001-01-01\n", 2, "not supported"),
    Case("set", BASE + b"train: {trackers: !!set {wandb}}\n", 2, "not supported"),
    Case("text of a number", BASE + b"name: !!str 3\n", 2, "tags (!name) are not supported"),
    Case("UTF-16", "extends: ocr\n".encode("utf-16"), 2, "UTF-8"),
    Case("Latin-1", BASE + b"description: caf\xe9\n", 2, "UTF-8"),
    Case("byte order mark", b"\xef\xbb\xbfextends: ocr\n", 0),
    Case("NUL", BASE + b"seed: \x00\n", 2, "not valid YAML"),
    Case("escape sequence", BASE + b"description: \x1b[31m\n", 2, "not valid YAML"),
    Case("escaped NUL in a name", BASE + b'name: "a\\0b"\n', 2, "name: must be letters"),
    Case("half a surrogate pair in a name", BASE + b'name: "\\ud800"\n', 2, "name: must be text, not '\\ud800'"),
    Case("half a surrogate pair in a text", BASE + b'description: "\\udfff"\n', 2, "description: must be text"),
    Case("tab for indentation", b"train:\n\tsteps: 3\n", 2, "not valid YAML"),
    Case("CRLF", b"extends: ocr\r\nseed: 3\r\n", 0),
    Case("two documents", b"a: 1\n---\nb: 2\n", 2, "not valid YAML"),
    Case("unknown directive", b"%FOO bar\n---\nextends: ocr\n", 0),
    Case("list", b"- a\n", 2, "not a list of 1"),
    Case("number", b"3\n", 2, "must hold keys and values"),
    Case("null", b"null\n", 2, "prompts: is missing"),
    Case("only a comment", b"# nothing\n", 2, "prompts: is missing"),
    Case("key is true", b"true: 1\n", 2, "the key True is not a name"),
    Case("key is null", b"~: 1\n", 2, "the key ~ is not a name"),
    Case("key is empty", BASE + b"'': 1\n", 2, "unknown key"),
    Case("key is a list", b"? [a]\n: 1\n", 2, "the key a list of 1 is not a name"),
    Case("key with a line end", BASE + b'"a\\nb": 1\n', 2, "unknown key"),
    Case("key of 100 kB", BASE + b"? " + b"k" * 100_000 + b"\n: 1\n", 2, "unknown key"),
    Case("value of 100 kB", BASE + b"reward: {kind: " + b"v" * 100_000 + b"}\n", 2, "reward.kind"),
    Case("1 MB and one byte", b"#" * 1_000_001, 2, "1 MB"),
    Case("5,000 brackets", b"[" * 5000, 2, "nested too deeply"),
    Case("50 brackets", BASE + b"seed: " + b"[" * 50 + b"]" * 50, 2, "nested too deeply"),
    Case("49 brackets", BASE + b"seed: " + b"[" * 49 + b"]" * 49, 2, "seed: must be a whole number"),
    Case("900 sections", b"".join(b" " * n + b"a:\n" for n in range(900)), 2, "nested too deeply"),
    Case("50 sections", b"".join(b" " * n + b"a:\n" for n in range(50)), 2, "a: unknown key"),
    Case("integer of 5,000 digits", BASE + b"seed: " + b"9" * 5000, 2, "seed: must be a whole number"),
    Case("integer of 400 digits", BASE + b"train: {lr: " + b"9" * 400 + b"}", 2, "train.lr"),
    Case("number beyond all numbers", BASE + b"train: {lr: 1e400}\n", 2, "finite number"),
    Case("number near zero", BASE + b"train: {lr: 1e-400}\n", 2, "greater than 0"),
    Case("unclosed quote", b'name: "a\n', 2, "not valid YAML"),
    Case("reserved sign", b"name: @a\n", 2, "not valid YAML"),
    Case("extends itself", b"extends: recipe.yaml\n", 2, "extends itself"),
    Case("extends a number", b"extends: 3\n", 2, "`extends` must be a path"),
    Case("extends a list", b"extends: [ocr]\n", 2, "`extends` must be a path"),
    Case("extends nothing", b"extends: ''\n", 2, "`extends` must be a path"),
    Case("extends a missing file", b"extends: nowhere.yaml\n", 2, "neither a file beside it nor"),
    Case("extends a folder", b"extends: .\n", 2, "neither a file beside it nor"),
    Case("extends a NUL", b'extends: "a\\0b"\n', 2, "neither a file beside it nor"),
    Case("extends the home of an unknown user", b"extends: ~no-such-user/r.yaml\n", 2, "neither a file beside it nor"),
    Case("extends a name of 5,000 letters", b"extends: " + b"x" * 5000, 2, "neither a file beside it nor"),
    Case("model path of 5,000 letters", BASE + b"model: {path: " + b"x" * 5000 + b"}\n", 0),
    Case("prompt file in the home of an unknown user", BASE + b"prompts: {train: {file: ~no-such-user/p.txt}}\n", 0),
]


@rows(FILES)
def test_a_recipe_file(case: Case, tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_bytes(case.given)
    check(outcome(lambda: load_recipe(str(path))), case.code, case.words)


NAMES = [
    Case("nothing", "", 2),
    Case("a NUL", "a\0b", 2, "no recipe file"),
    Case("5,000 letters", "x" * 5000, 2, "no recipe file"),
    Case("the home of an unknown user", "~no-such-user/r.yaml", 2, "no recipe file"),
    Case("the root", "/", 2, "is a folder"),
    Case("a shipped one up", "../recipes/../ocr", 2, "no recipe file"),
    Case("a binary file", "/bin/sh", 2),
]


@rows(NAMES)
def test_a_recipe_s_name(case: Case) -> None:
    check(outcome(lambda: load_recipe(case.given)), case.code, case.words)


SETS = [
    Case("no equals sign", "seed", 2, "must look like key=value"),
    Case("no key", "=1", 2, "must look like key=value"),
    Case("empty part", "train..lr=1", 2, "must look like key=value"),
    Case("only dots", "...=1", 2, "must look like key=value"),
    Case("extends", "extends=ocr", 2, "cannot change `extends`"),
    Case("broken YAML", "seed=[1", 2, "not valid YAML"),
    Case("alias", "seed=*a", 2, "aliases"),
    Case("tag", "seed=!!python/name:os.system", 2, "not valid YAML"),
    Case("two documents", "seed=1\n---\n2", 2, "not valid YAML"),
    Case("NUL in a value", "seed=\0", 2, "not valid YAML"),
    Case("NUL in a key", "se\0ed=1", 2, "unknown key"),
    Case("below a plain value", "seed.x=1", 2, "seed: must be a whole number"),
    Case("below a choice", "method.name.x=1", 2, "method.name"),
    Case("key of 100 kB", "x" * 100_000 + "=1", 2, "unknown key"),
    Case("value of 100 kB", "reward.kind=" + "x" * 100_000, 2, "reward.kind"),
    Case("key that is a number", "train={1: 2}", 2, "is not a name"),
    Case("method is a list", "method=[]", 2, "method: must be a section"),
    Case("method name is a section", "method={name: {a: b}}", 2, "method"),
    Case("method name is null", "method={name: null}", 2, "method"),
    Case("ablation of a list", "ablation=[tau]", 2, "ablation"),
    Case("ablation of a section", "ablation={tau: {a: 1}}", 2, "ablation.tau"),
    Case("tags of a list", "prompts.train.tags=[position]", 2, "prompts.train.tags"),
    Case("weights below zero", "reward.geneval.objective={soft: -1}", 2, "reward.geneval.objective"),
    Case("weight of nothing", "reward.ocr.objective={confidence: 1}", 2, "reward.ocr.objective"),
    Case("weights not finite", "reward.geneval.objective={soft: .inf}", 2, "reward.geneval.objective"),
    Case(
        "user in the judge's address", "judge={kind: unified-reward, model: m, base_url: 'http://u:p@h/v1'}", 2, "key"
    ),
    Case(
        "query in the judge's address", "judge={kind: unified-reward, model: m, base_url: 'http://h?key=1'}", 2, "key"
    ),
]


@rows(SETS)
def test_a_setting(case: Case) -> None:
    check(outcome(lambda: load_recipe("ocr", overrides=[case.given])), case.code, case.words)


_FREE = (
    "prompts.train.tags",
    "prompts.validation.tags",
    "prompts.eval.tags",
    "reward.geneval.objective",
    "reward.ocr.objective",
    "ablation",
)
_KEYS = [doc for doc in describe_fields() if not doc.section and not doc.path.startswith(_FREE)]
WRONG_TYPES = [
    Case(f"{doc.path} a section", ("ocr" if "gdro" in doc.methods or not doc.methods else "", doc), 2) for doc in _KEYS
]


@rows(WRONG_TYPES)
def test_a_key_with_a_section_as_its_value_is_named(case: Case) -> None:
    _, doc = case.given
    overrides = [f"{doc.path}={{not: [what, 1]}}"]
    if doc.path.startswith("method.") and doc.methods:
        overrides.insert(0, f"method.name={doc.methods[0]}")
    check(outcome(lambda: load_recipe("ocr", overrides=overrides)), case.code, doc.path)


def test_the_command_line_also_refuses_half_a_surrogate_pair(tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_bytes(BASE + b'description: "\\ud800"\n')
    check(command("recipes", "show", str(path)), 2, "description: must be text")
    check(command("recipes", "check", str(path)), 2, "description: must be text")


_SCALARS = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.sampled_from([10**30, -(10**30), 0, 2**63, 2**64]),
    st.floats(),
    st.text(max_size=12),
)
_VALUES = st.recursive(
    _SCALARS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=6), inner, max_size=3),
    max_leaves=6,
)
_PATHS = st.sampled_from([doc.path for doc in describe_fields()]) | st.text(max_size=8)


@pytest.mark.slow
@settings(max_examples=100, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(changes=st.dictionaries(_PATHS, _VALUES, min_size=1, max_size=4))
def test_any_values_of_any_keys_load_or_are_refused(changes: dict[str, Any]) -> None:
    overrides = [f"{path}={json.dumps(value)}" for path, value in changes.items()]
    never_unexpected(lambda: load_recipe("ocr", overrides=overrides).resolved(), 2)


@settings(max_examples=100, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(data=st.binary(max_size=120) | st.text(alphabet="ab:-[]{}!&*?|>'\"#%@,\n \t\\0189.~<", max_size=60))
def test_any_bytes_are_a_recipe_or_are_refused(tmp_path: Path, data: bytes | str) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_bytes(BASE + (data.encode() if isinstance(data, str) else data))
    never_unexpected(lambda: load_recipe(str(path)), 2)
