"""Model cards: what they say, that nothing in them is markup by accident, and that nothing private is in them."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from gdro_cli.config.load import load_recipe
from gdro_cli.config.recipe import Recipe
from gdro_cli.embedded import tiny_model_path
from gdro_cli.errors import PrerequisiteError, StoreError
from gdro_cli.stages.reporting.markdown import Markdown, escape, fenced
from gdro_cli.stages.reporting.model_card import CardFolder, card, loading_code, write_card
from gdro_cli.stages.reporting.redaction import command, recipe_yaml, without_paths
from gdro_cli.stages.runs.finished_run import ADAPTER_NOTE, open_finished
from tests.support.rows import image_row, interval, results

MakeRecipe = Callable[..., Recipe]
MakeRun = Callable[..., Path]


def sides(base: float, trained: float) -> dict[str, Any]:
    means = {"base": base, "trained": trained, "difference": trained - base}
    return {name: interval(mean, mean - 0.1, mean + 0.1) for name, mean in means.items()}


def make_results(**changes: Any) -> dict[str, Any]:
    own = {
        "measures": {"u": sides(3.5, 3.6), "reward": sides(0.5, 0.75)},
        "signals": {"edge_density": sides(0.2, 0.3)},
        "verdict": {"level": "suspicious", "reasons": ["edge density rose by 50.0 %"]},
        "grid": "evaluations/results-0.png",
    }
    rows = [image_row(prompt, index) for prompt in range(2) for index in range(2)]
    return results(base=rows, trained=rows, **{**own, **changes})


def split(page: bytes) -> tuple[dict[str, Any], str]:
    """The metadata and the text of a card."""
    nothing, front, text = page.decode().split("---\n", 2)
    assert nothing == ""
    return yaml.safe_load(front), text


@pytest.fixture(scope="module")
def run(make_run: MakeRun, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = make_run(tmp_path_factory.mktemp("runs") / "small-0123", results=make_results())
    (path / "evaluations").mkdir()
    (path / "evaluations" / "results-0.png").write_bytes(b"image")
    return path


def test_a_card_says_what_was_trained_with_which_results_and_from_what(run: Path) -> None:
    front, text = split(write_card(run).read_bytes())
    assert front["library_name"] == "diffusers" and front["pipeline_tag"] == "text-to-image"
    assert {"gdro", "lora", "ocr", "flux"} <= set(front["tags"])
    assert "license" not in front and "base_model" not in front  # the embedded model is on no Hub
    for words in (
        "# small-0123",
        "trained to write the text that a prompt asks for, with GDRO",
        "| reward | 0.500 [0.400, 0.600] | 0.750 [0.650, 0.850] | +0.250 [+0.150, +0.350] |",
        "Suspicious: look at the images",
        "- edge density rose by 50.0 %",
        r"| edge\_density | share of pixels on an edge | 0.200 [0.100, 0.300] |",
        "](evaluations/results-0.png)",
        "| method.k | 3 |",
        "| train.lora.targets | all-linear |",
        "| digest of the store | aaaa11112222 |",
        "ema weights of the best checkpoint, step 4",
        "gdro train --recipe resolved.json",
        "pipe.load_lora_weights(",
        "This card grants no licence.",
    ):
        assert words in text
    assert text.index("| reward |") < text.index("| u |")
    assert "train.lr " not in text  # a default
    assert "not the weights" not in text


def test_a_card_says_which_reading_of_the_corrected_score_decides(make_run: MakeRun, tmp_path: Path) -> None:
    measures = {name: sides(0.5, 0.75) for name in ("corrected of the means", "corrected", "u", "reward")}
    judged = make_results(measures=measures, protocol={"judge": {"judge": "embedded"}})
    _, text = split(write_card(make_run(tmp_path / "run", results=judged)).read_bytes())
    assert text.index("| corrected |") < text.index("| corrected of the means |")
    assert "The verdict and the best checkpoint go by the first." in text


def test_a_card_of_imported_data_begins_with_the_import(make_run: MakeRun, tmp_path: Path) -> None:
    _, text = split(write_card(make_run(tmp_path / "run", recipe=load_recipe("own-pairs"))).read_bytes())
    assert "gdro import --recipe own-pairs DATA\ngdro train --recipe own-pairs\n" in text


def test_a_card_without_results_says_so(run: Path, tmp_path: Path) -> None:
    bare = shutil.copytree(run, tmp_path / "bare", ignore=shutil.ignore_patterns("results.json"))
    _, text = split(card(open_finished(bare), CardFolder()))
    assert "Not evaluated yet" in text and "Verdict" not in text and "![" not in text


def test_results_of_other_weights_are_said_to_be(run: Path, tmp_path: Path, make_run: MakeRun) -> None:
    other = make_results(weights={"kind": "raw", "checkpoint": "last", "step": 4}, seen=1, failed=2)
    _, text = split(card(open_finished(make_run(tmp_path / "run", results=other)), CardFolder()))
    assert "Measured: raw weights of the last checkpoint, step 4" in text
    assert "**These are not the weights in this folder**, which holds the ema weights of the best" in text
    assert "**1 of the prompts are also in the training" in text
    assert "2 images could not be scored" in text


def test_nothing_that_was_not_written_here_is_markup(make_run: MakeRun, tmp_path: Path) -> None:
    evil = "x|y <script>alert(1)</script> ](http://evil) ![p](q) `c` *b* _i_\n\n# head\n---\n| a | b |\n```"
    hostile = make_results(
        prompts=[{**prompt, "prompt": evil + "'\"\\"} for prompt in make_results()["prompts"]],
        measures={evil: sides(0.1, 0.2)},
        verdict={"level": "healthy", "reasons": [evil, "- nested"]},
        protocol_name=evil,
    )
    path = make_run(tmp_path / "run", results=hostile)
    for folder in (CardFolder(), CardFolder("adapter", evil), CardFolder("merged", evil, 0.01)):
        front, text = split(card(open_finished(path), folder))
        assert front["library_name"] == "diffusers"
        blocks = re.split(r"^(`{3,})\w+\n(.*?)\n\1$", text, flags=re.S | re.M)
        assert len(blocks) == 7  # the loading code, the commands, and what lies around them
        prose, (code, commands) = "".join(blocks[0::3]), blocks[2::3]
        compile(code, "card", "exec")
        assert commands.startswith("gdro train")
        assert not re.search(r"(?<!\\)<", prose)
        assert [line for line in prose.splitlines() if line.startswith("# ")] == ["# run"]
        assert r"\]\(http://evil\)" in prose and "](http://evil" not in prose.replace(r"\](", "").replace(r"\]\(", "")
        for table in re.findall(r"(?:^\|.*\n)+", prose, flags=re.M):
            cells = {len(re.findall(r"(?<!\\)\|", line)) for line in table.splitlines()}
            assert len(cells) == 1


def test_escaping() -> None:
    assert escape("plain text, 3.5 % (no)") == r"plain text, 3.5 % \(no\)"
    assert escape("- item") == r"\- item" and escape("12. item") == r"12\. item"
    assert escape(3) == "3" and escape("a\r\n\tb\x00") == "a b"
    assert escape(escape("*")) == r"\*" and isinstance(escape("*"), Markdown)
    assert fenced("a\n````\nb\n", "sh") == "`````sh\na\n````\nb\n`````"


def test_nothing_private_is_in_a_card_or_its_recipe(make_recipe: MakeRecipe, make_run: MakeRun, tmp_path: Path) -> None:
    model = shutil.copytree(tiny_model_path(), tmp_path / "hidden" / "my model")
    prompts = tmp_path / "hidden" / "prompts.txt"
    prompts.write_text('a sign that says "OPEN"\n')
    recipe = make_recipe(
        description=f"prompts of {prompts}, as in /home/me/notes.md",
        model={"path": str(model)},
        prompts={"train": {"builtin": None, "count": None, "file": str(prompts)}},
        judge={"kind": "unified-reward", "base_url": "http://10.0.0.7:8000/v1", "model": "/models/judge"},
    )
    found = open_finished(make_run(tmp_path / "hidden" / "run", recipe))
    pages = [card(found, folder).decode() for folder in (CardFolder(), CardFolder("adapter"), CardFolder("merged"))]
    for text in (*pages, recipe_yaml(recipe)):
        for private in (str(tmp_path), "hidden", "/home/me", "10.0.0.7", "/models"):
            assert private not in text
    assert "A LoRA adapter for the model my model," in pages[0] and str(found.model["digest"]) in pages[0]
    assert "from_pretrained('my model'" in pages[1] and "from_pretrained('path/to/this/folder'" in pages[2]
    assert "base_model" not in split(pages[0].encode())[0]
    (tmp_path / "recipe.yaml").write_text(recipe_yaml(recipe))
    again = load_recipe(str(tmp_path / "recipe.yaml"))
    assert (again.model.path, again.prompts.train.file) == ("my model", "prompts.txt")
    assert "init: lora.safetensors" in recipe_yaml(make_recipe(train={"lora": {"init": "hidden/lora.safetensors"}}))


def test_a_model_of_the_hub_is_named_and_linked(run: Path, tmp_path: Path) -> None:
    """The card of a run whose note and recipe name a Hub id and a commit."""
    copy = shutil.copytree(run, tmp_path / "run")
    for name, old, new in (
        (ADAPTER_NOTE, '"digest": "', '"commit": "'),
        (ADAPTER_NOTE, str(tiny_model_path()), "owner/some_model"),
        ("resolved.json", '"path": "tiny"', '"path": "owner/some_model"'),
    ):
        text = (copy / name).read_text()
        assert old in text
        (copy / name).write_text(text.replace(old, new))
    found = open_finished(copy)
    front, text = split(card(found, CardFolder("adapter", "me/mine")))
    assert (front["base_model"], front["base_model_relation"]) == ("owner/some_model", "adapter")
    assert r"A LoRA adapter for [owner/some\_model](https://huggingface.co/owner/some_model)," in text
    assert "FluxPipeline.from_pretrained('owner/some_model', dtype=torch.float32)" in text
    assert "pipe.load_lora_weights('me/mine')" in text
    front, text = split(card(found, CardFolder("merged", "me/mine")))
    assert front["base_model_relation"] == "finetune" and "lora" not in front["tags"]
    assert "from_pretrained('me/mine'" in text and "load_lora_weights" not in text


def test_commands_name_a_shipped_recipe_and_its_changes_or_the_file() -> None:
    smoke = load_recipe("smoke", overrides=["train.steps=7", "prompts.train.count=3", "method.name=dpo"])
    told = command(smoke, "train", file="x.yaml")
    assert told.startswith("gdro train --recipe smoke --set ") and "train.steps=7" in told
    sets = told.split(" --set ")[1:]
    assert load_recipe("smoke", overrides=sets).resolved()["method"] == smoke.resolved()["method"]
    assert command(load_recipe("ocr"), "eval", file="x.yaml") == "gdro eval --recipe ocr"
    renamed = load_recipe("smoke", overrides=["name=other"])
    assert command(renamed, "train", file="x.yaml") == "gdro train --recipe x.yaml"


def test_paths_in_text() -> None:
    assert without_paths("see /home/me/a.txt; ~/b/c.md, C:\\d\\e") == "see a.txt; c.md, e"
    assert without_paths("file:///home/me/x/y data:/home/me/y/z file://host/a/b me@host:/a/c") == (
        "file:y data:z file:b me@host:c"
    )
    same = "and/or 3/4 of black-forest-labs/FLUX.1-dev, https://huggingface.co/x/y"
    assert without_paths(same) == same


@pytest.mark.parametrize(
    ("file", "change", "error", "words"),
    [
        ("manifest.json", None, PrerequisiteError, "is not a run"),
        (ADAPTER_NOTE, None, PrerequisiteError, "is not finished"),
        ("pytorch_lora_weights.safetensors", None, PrerequisiteError, "is not finished"),
        ("pytorch_lora_weights.safetensors", b"other", StoreError, "is not the file that adapter.json describes"),
        (ADAPTER_NOTE, b'{"schema": 9}', StoreError, "was written by another version"),
        (ADAPTER_NOTE, b'{"schema": 1}', StoreError, "adapter.json is damaged"),
        ("manifest.json", b'{"inputs": 3}', StoreError, "manifest.json is damaged at inputs"),
    ],
)
def test_runs_without_a_card(
    run: Path, tmp_path: Path, file: str, change: bytes | None, error: type[Exception], words: str
) -> None:
    copy = shutil.copytree(run, tmp_path / "run")
    if change is None:
        (copy / file).unlink()
    else:
        (copy / file).write_bytes(change)
    with pytest.raises(error, match=words):
        open_finished(copy)


def test_loading_code_calls_the_pipeline_as_the_evaluation_did(run: Path) -> None:
    code = loading_code(open_finished(run), CardFolder())
    assert "height=64, max_sequence_length=26, num_inference_steps=3, width=64" in code
    assert "tiny_model_path()" in code


@pytest.mark.parametrize(
    ("part", "change"),
    [
        ("model", {"pipeline": "FluxPipeline\nimport os"}),
        ("model", {"pipeline": ["FluxPipeline"]}),
        ("model", {"family": []}),
        ("model", {"path": 5}),
        ("model", {"dtype": "float32); print('x'"}),
        ("call", {"x=print('x'), y": 1}),
        ("call", {"lambda": 1}),
    ],
)
def test_a_note_puts_no_code_into_the_card(run: Path, tmp_path: Path, part: str, change: dict[str, Any]) -> None:
    """Class, number format and arguments of a received run are known ones."""
    copy = shutil.copytree(run, tmp_path / "run")
    note = json.loads((copy / ADAPTER_NOTE).read_text())
    note[part] |= change
    (copy / ADAPTER_NOTE).write_text(json.dumps(note))
    with pytest.raises(StoreError, match=r"adapter\.json is damaged: it (names no|does not describe)"):
        open_finished(copy)


@pytest.mark.parametrize("environment", [{"packages": []}, {"devices": 5}, {"devices": None}, {"packages": None}])
def test_a_damaged_environment_is_a_sentence(run: Path, tmp_path: Path, environment: dict[str, Any]) -> None:
    """Packages that are no section and devices that are no list."""
    copy = shutil.copytree(run, tmp_path / "run")
    (copy / "environment.json").write_text(json.dumps(environment))
    with pytest.raises(StoreError, match=r"environment\.json is damaged at packages or devices"):
        open_finished(copy)
