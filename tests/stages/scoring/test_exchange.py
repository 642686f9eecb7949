"""``gdro score --export`` and ``--import``: the scores of another program are trained on like a reward's."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from gdro_cli.config.recipe import Recipe
from gdro_cli.errors import PrerequisiteError, StoreError, UserError
from gdro_cli.stages.scoring.exchange import export_images, import_scores
from gdro_cli.stages.setup.session import Session
from gdro_cli.stages.training import train
from gdro_cli.stages.training.offline import GroupSteps
from gdro_cli.stages.training.train import open_source

pytestmark = pytest.mark.slow

MakeRecipe = Callable[..., Recipe]


@pytest.fixture(scope="module")
def listed(tmp_path_factory: pytest.TempPathFactory, make_recipe: MakeRecipe) -> tuple[Path, list[dict[str, Any]]]:
    """A workspace whose store was listed, and the lines of the list."""
    workspace = tmp_path_factory.mktemp("listed")
    shown = export_images(Session(make_recipe(), workspace), workspace / "images.jsonl")
    assert shown["images"] == "16"
    return workspace, [json.loads(line) for line in (workspace / "images.jsonl").read_text().splitlines()]


def answer(folder: Path, lines: list[dict[str, Any]], name: str = "scores.jsonl") -> Path:
    path = folder / name
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def brightness(line: Mapping[str, Any]) -> float:
    with Image.open(line["path"]) as image:
        return sum(image.convert("L").tobytes()) / (64 * 64 * 255)


def test_the_list_names_every_image_with_its_prompt(listed: tuple[Path, list[dict[str, Any]]]) -> None:
    workspace, lines = listed
    assert len({line["id"] for line in lines}) == len(lines) == 16
    for line in lines:
        assert Path(line["path"]).is_file() and Path(line["path"]).is_relative_to(workspace)
        assert line["target"] in line["prompt"] and line["metadata"] == {}


def test_training_learns_from_imported_scores(
    listed: tuple[Path, list[dict[str, Any]]], make_recipe: MakeRecipe, tmp_path: Path
) -> None:
    workspace, lines = listed
    scores = {line["id"]: brightness(line) for line in lines}
    file = answer(tmp_path, [{"id": id_, "score": score} for id_, score in reversed(scores.items())])
    assert import_scores(Session(make_recipe(), workspace), file, "bright")["scored"] == "16 of 16 images"
    recipe = make_recipe(train={"scores": "bright"})
    source = open_source(Session(recipe, workspace))
    assert isinstance(source, GroupSteps)
    own = [round(value, 6) for group in source.dataset.rewards.tolist() for value in group]
    assert own == [round(scores[line["id"]], 6) for line in lines]
    by_reward = train.run(Session(make_recipe(train={"steps": 1, "eval_every": 0}), workspace)).run.path
    trained = train.run(Session(make_recipe(train={"steps": 1, "eval_every": 0, "scores": "bright"}), workspace))
    assert trained.run.path != by_reward

    again = import_scores(Session(make_recipe(), workspace), file, "bright")
    assert again["scored"] == "16 of 16 images"  # the same scores once more change nothing
    other = answer(tmp_path, [{"id": line["id"], "score": 0.5} for line in lines], "other.jsonl")
    with pytest.raises(StoreError, match="has other scores called bright: give them another name, or delete"):
        import_scores(Session(make_recipe(), workspace), other, "bright")


def test_missing_and_unknown_ids_and_errors_are_counted(
    listed: tuple[Path, list[dict[str, Any]]], make_recipe: MakeRecipe, tmp_path: Path
) -> None:
    workspace, lines = listed
    rows: list[dict[str, Any]] = [{"id": line["id"], "score": 0.1 * n} for n, line in enumerate(lines)]
    rows[3] = {"id": lines[3]["id"], "error": "too dark"}
    file = answer(tmp_path, [*rows[:-2], {"id": "0123456789ab-000", "score": 1.0}])
    counts = "scored: 13 of 16 images, with an error: 1, not in the file: 2, ids of no image: 1"
    with pytest.raises(UserError, match=rf"than reward.max_failed_share \(0.02\) allows \({counts}\)"):
        import_scores(Session(make_recipe(), workspace), file, "partial")
    with pytest.raises(PrerequisiteError, match="no imported scores called partial"):
        train.run(Session(make_recipe(train={"scores": "partial"}), workspace))  # nothing is half imported
    tolerant = make_recipe(reward={"max_failed_share": 0.2}, train={"scores": "partial"})
    assert import_scores(Session(tolerant, workspace), file, "partial")["with an error"] == "1"
    source = open_source(Session(tolerant, workspace))
    assert isinstance(source, GroupSteps)
    missing = source.dataset.rewards.isnan()
    assert int(missing.sum()) == 1 and source.dataset.counts.eligible == 3  # one group has two scores, k is 3
