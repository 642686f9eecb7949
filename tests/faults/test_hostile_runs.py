"""Untrusted recipes and runs: secrets in unusual places, markup and links, huge images and texts."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
from PIL import Image

from gdro_cli.config.load import load_recipe
from gdro_cli.images import MOST_PIXELS
from gdro_cli.rewards.base import UnreadableImageError, read_rgb
from gdro_cli.stages.reporting.model_card import CardFolder, card
from gdro_cli.stages.reporting.redaction import public_recipe
from tests.faults.test_security import finished_run
from tests.support.faulty import check, outcome

SECRET = "SECRET-0123"
JUDGE = ("judge.kind=unified-reward", "judge.model=m", "judge.base_url=http://h/v1")


@pytest.mark.parametrize(
    ("override", "words"),
    [
        (f'ablation={{judge.base_url: ["http://user:{SECRET}@host/v1"]}}', "ablation.judge.base_url: must not hold"),
        (f'ablation={{judge.base_url: [["http://user:{SECRET}@host/v1"]]}}', "must be text"),
        (f"ablation={{judge.api_key_env: [sk-{SECRET}]}}", "must be the name of an environment variable"),
        (
            f'ablation={{tau: {{values: [0], set: {{judge.api_key_env: "sk-{SECRET}"}}}}}}',
            "ablation.tau.set: must be the",
        ),
        (f"judge.base_url=http://host/v1?key={SECRET}", "must not hold"),
        (f"judge.base_url=http://host/v1#{SECRET}", "must not hold"),
        (f"judge.base_url=http://host/v1;key={SECRET}", "must not hold"),
        (f"judge.api_key_env=sk-{SECRET}", "must be the name of an environment variable"),
        (f"judge.api_key_env=hf_{SECRET.replace('-', '')}", "must be the name of an environment variable"),
        (f"judge.base_url http://u:{SECRET}@h", "--set 'judge.base_url' must look like key=value"),
        (f"judge.base_url http://u:{SECRET}@h?a=b", "--set 'judge.base_url' must look like key=value"),
        (f"judge.base_url:http://u:{SECRET}@h", "--set 'judge.base_url' must look like key=value"),
        (f"judge..base_url=http://u:{SECRET}@h", "must look like key=value"),
    ],
)
def test_a_secret_in_a_recipe_is_refused_and_not_repeated(override: str, words: str) -> None:
    """In every place where a recipe has an address or a key's variable."""
    result = outcome(lambda: load_recipe("smoke", overrides=[*JUDGE, override]))
    check(result, 2, words)
    assert "SECRET" not in result.message


def test_a_keys_variable_is_accepted() -> None:
    """The Hub's variable, in capitals, is also accepted."""
    for name in ("JUDGE_API_KEY", "_key2", "HF_TOKEN"):
        assert load_recipe("smoke", overrides=[*JUDGE, f"judge.api_key_env={name}"]).judge.api_key_env == name


def test_an_ablations_addresses_and_paths_are_hidden() -> None:
    """Like the values of the keys themselves."""
    values = "{judge.base_url: [http://inner.host/v1], prompts.train.file: [hidden/p.txt], model.path: [./hidden/m]}"
    shown = public_recipe(load_recipe("smoke", overrides=[f"ablation={values}"]))["ablation"]
    assert "inner.host" not in json.dumps(shown) and "hidden" not in json.dumps(shown)


def test_what_a_sweep_fixes_is_hidden_like_its_values() -> None:
    judge = "judge.kind: unified-reward, judge.model: ./hidden/m, judge.base_url: http://inner.host/v1"
    entry = f"{{values: [hidden/p.txt], set: {{{judge}, k: 3}}}}"
    shown = public_recipe(load_recipe("smoke", overrides=[f"ablation={{prompts.train.file: {entry}}}"]))
    assert shown["ablation"]["prompts.train.file"] == {
        "values": ["p.txt"],
        "set": {
            "judge.kind": "unified-reward",
            "judge.model": "m",
            "judge.base_url": "https://judge.invalid/v1",
            "k": 3,
        },
    }


def test_a_base_models_name_is_a_link_only_if_it_is_a_hub_id(tmp_path: Path) -> None:
    """Markup in a model's name stays text, and the card then names no base model."""
    recipe = load_recipe("smoke", overrides=["model.path=/nowhere/x"])
    evil = "x) <script>alert(1)</script> [y](javascript:alert(1)"
    run = replace(finished_run(tmp_path), recipe=recipe)
    page = card(replace(run, model={**run.model, "path": evil, "commit": "abc"}), CardFolder()).decode()
    prose = page.partition("## How to load it")[0]
    assert "](https://huggingface.co" not in prose and "<script" not in prose.replace("\\<script", "")
    assert "](javascript" not in prose and "base_model" not in page


def test_a_grid_is_an_image_in_the_run(tmp_path: Path) -> None:
    """It is not an address or a missing file."""
    (tmp_path / "a.png").write_bytes(b"image")
    assert finished_run(tmp_path, grid="a.png").grid == "a.png"
    for name in ("https://evil.example/track.png", "missing.png", "x" * 9999 + ".png"):
        assert finished_run(tmp_path, grid=name).grid is None


def test_an_image_of_too_many_pixels_is_not_decoded(tmp_path: Path) -> None:
    """Its score is missing with the reason."""
    side = int(MOST_PIXELS**0.5) + 1
    Image.new("1", (side, side)).save(tmp_path / "large.png")
    for source in (tmp_path / "large.png", Image.open(tmp_path / "large.png")):
        with pytest.raises(UnreadableImageError, match=f"{side} x {side} pixels, more than 33,554,432"):
            read_rgb(source)
