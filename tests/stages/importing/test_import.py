"""``gdro import`` on the embedded model: real files become a store that trainings read."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from gdro_cli.config.recipe import Recipe
from gdro_cli.data.imported_scores import imported_score_names, imported_scores
from gdro_cli.errors import Interrupted, PrerequisiteError, StoreError, UserError
from gdro_cli.images import fit, open_image
from gdro_cli.models.latents import to_pixels
from gdro_cli.runtime.checkpoint import latest_checkpoint
from gdro_cli.runtime.metrics import train_rows
from gdro_cli.runtime.progress import Reporter
from gdro_cli.stages.evaluation import evaluate
from gdro_cli.stages.importing import import_data
from gdro_cli.stages.importing.import_data import Import
from gdro_cli.stages.sampling import sample
from gdro_cli.stages.scoring import score
from gdro_cli.stages.setup.session import Session
from gdro_cli.stages.training import train
from gdro_cli.tiny.world import draw_sign
from tests.support import jobs

pytestmark = pytest.mark.slow

MakeRecipe = Callable[..., Recipe]
WORDS = ("OPEN", "SALE", "MILK", "TAXI")


def draw(folder: Path, sizes: Sequence[int] = (3, 3, 3, 3)) -> list[dict[str, Any]]:
    """Signs of the embedded world as files, and a row per prompt, with scores."""
    (folder / "images").mkdir(parents=True)
    rows = []
    for word, size in zip(WORDS, sizes, strict=True):
        rng = np.random.default_rng(len(word) + size)
        drawings = [draw_sign(word, colour="red", background="brick", rng=rng) for _ in range(size)]
        names = [f"images/{word}-{index}.png" for index in range(size)]
        for name, drawing in zip(names, drawings, strict=True):
            drawing.image.save(folder / name)
        scores = [round(0.9 - 0.2 * index, 1) for index in range(size)]
        rows.append({"prompt": drawings[0].prompt, "images": names, "scores": scores})
    return rows


def table(folder: Path, rows: Sequence[dict[str, Any]], name: str = "data.jsonl") -> Path:
    path = folder / name
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


@pytest.fixture
def recipe(make_recipe: MakeRecipe) -> Recipe:
    return own(make_recipe)


def own(make_recipe: MakeRecipe, *, scores: str | None = "score", **changes: Any) -> Recipe:
    """The small recipe on imported data called ``mine``."""
    source = {"builtin": None, "count": None, "imported": "mine"}
    more = {"train": {"scores": scores, **changes.pop("train", {})}}
    return make_recipe(prompts={"train": source}, **changes, **more)


def bring(recipe: Recipe, workspace: Path, data: Path, **options: Any) -> import_data.ImportResult:
    return import_data.run(Session(recipe, workspace), Import(data, "mine", **options))


def test_a_store_has_the_encoded_images_and_their_scores(tmp_path: Path, recipe: Recipe) -> None:
    rows = draw(tmp_path / "data", sizes=(3, 1, 4, 2))
    rows[0]["weight"] = 2.0
    photo = tmp_path / "data" / rows[0]["images"][1]
    with Image.open(photo) as image:
        image.resize((100, 80)).save(photo.with_suffix(".jpg"))
    rows[0]["images"][1] = "images/OPEN-1.jpg"
    with Image.open(tmp_path / "data" / rows[2]["images"][0]) as image:
        image.resize((40, 40)).save(tmp_path / "data" / rows[2]["images"][0])
    result = bring(recipe, tmp_path / "out", table(tmp_path / "data", rows))
    store, model = result.store, Session(recipe, tmp_path / "out").model

    assert [store.sizes[prompt.id] for prompt in store.prompts] == [3, 1, 4, 2]
    assert store.weights == {store.prompts[0].id: 2.0} and result.enlarged == 1
    assert not list(store.path.glob("shards/*/images/*"))  # the data has scores
    groups = [group for number in range(len(store.shards)) for group in store.read_shard(number)]
    for group, row in zip(groups, rows, strict=True):
        pictures = [open_image(tmp_path / "data" / name) for name in row["images"]]
        pixels = to_pixels([fit(picture, height=64, width=64, how="crop") for picture in pictures])
        assert torch.allclose(group.latents, model.encode_images(pixels), atol=1e-5)
        assert torch.equal(group.conditioning["prompt_embeds"], model.encode([row["prompt"]])[0]["prompt_embeds"])
        assert [origin["source"] for origin in group.origins] == row["images"]
    scores = [value.value for value in imported_scores(store, "score").rows()]
    assert scores == [score for row in rows for score in row["scores"]]

    again = bring(recipe, tmp_path / "out", tmp_path / "data" / "data.jsonl")
    assert again.shards_made == 0 and again.store.digest == store.digest


def test_other_data_of_the_same_name_is_refused(tmp_path: Path, recipe: Recipe) -> None:
    rows = draw(tmp_path / "data")
    data = table(tmp_path / "data", rows)
    store = bring(recipe, tmp_path / "out", data).store
    before = {path: path.stat().st_mtime_ns for path in store.path.rglob("*") if path.is_file()}
    with pytest.raises(StoreError, match=r"was imported from something else \(resize: .*choose another --name"):
        bring(recipe, tmp_path / "out", data, resize="pad")
    with pytest.raises(StoreError, match=r"\(data: other prompts, weights, source images or names of images\)"):
        bring(recipe, tmp_path / "out", table(tmp_path / "data", [*rows[:3], rows[3] | {"weight": 2}], "other.jsonl"))
    rows[0]["scores"][0] = 0.1
    with pytest.raises(StoreError, match=r"has other scores called score: give them another name"):
        bring(recipe, tmp_path / "out", table(tmp_path / "data", rows))
    with (tmp_path / "data" / rows[1]["images"][2]).open("ab") as file:
        file.write(b"x")
    with pytest.raises(StoreError, match=r"images/SALE-2.png has changed since it was imported as mine"):
        bring(recipe, tmp_path / "out", data)
    with pytest.raises(StoreError, match="was imported without images: choose another --name"):
        bring(recipe, tmp_path / "out", data, keep_images=True)
    assert before == {path: path.stat().st_mtime_ns for path in store.path.rglob("*") if path.is_file()}


def test_an_import_for_another_size_has_a_store_of_its_own(
    tmp_path: Path, recipe: Recipe, make_recipe: MakeRecipe
) -> None:
    data = table(tmp_path / "data", draw(tmp_path / "data"))
    bring(recipe, tmp_path / "out", data)
    wide = own(make_recipe, sample={"width": 32})
    with pytest.raises(PrerequisiteError, match="data for another model or image size.*run gdro import DATA"):
        train.run(Session(wide, tmp_path / "out"))
    assert bring(wide, tmp_path / "out", data).shards_made == 1


def test_an_unreadable_image_is_named_with_its_line_and_nothing_is_half_imported(
    tmp_path: Path, recipe: Recipe
) -> None:
    rows = draw(tmp_path / "data")
    broken = tmp_path / "data" / rows[2]["images"][1]
    content = broken.read_bytes()
    broken.write_bytes(content[:200])
    data = table(tmp_path / "data", rows)
    with pytest.raises(UserError, match=r"^data.jsonl line 3: images/MILK-1.png cannot be used: "):
        bring(recipe, tmp_path / "out", data)
    (tmp_path / "data" / rows[3]["images"][2]).write_bytes(b"")
    words = r"^2 images cannot be used; data.jsonl line 3: images/MILK.* line 4: images/TAXI-2.png .*; put good files"
    with pytest.raises(UserError, match=words):
        bring(recipe, tmp_path / "out", data)
    with pytest.raises(PrerequisiteError, match="the import of mine into .* is not complete"):
        train.run(Session(recipe, tmp_path / "out"))
    other = table(tmp_path / "data", rows[:2], "other.jsonl")
    assert bring(recipe, tmp_path / "out", other).shards_made == 1  # nothing of the first table was there
    broken.with_suffix(".txt").write_text("a sign")
    alone = tmp_path / "alone"
    alone.mkdir()
    for file in (broken, broken.with_suffix(".txt")):
        file.rename(alone / file.name)
    with pytest.raises(UserError, match=r"^MILK-1.png cannot be used: "):
        bring(recipe, tmp_path / "elsewhere", alone)


def test_a_stopped_import_continues_and_ends_like_an_undisturbed_one(
    tmp_path: Path, make_recipe: MakeRecipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = own(make_recipe, sample={"batch_size": 2})
    monkeypatch.setattr(import_data, "_SHARD_IMAGES", 1)  # two prompts in a shard, as the recipe says
    data = table(tmp_path / "data", draw(tmp_path / "data"))
    whole = bring(recipe, tmp_path / "whole", data).store

    session = Session(recipe, tmp_path / "out")
    encode, calls = session.model.encode_images, 0

    def stopping(pixels: torch.Tensor) -> torch.Tensor:
        nonlocal calls
        calls += 1
        if calls == 5:  # the second shard
            session.stop.requested = True
        return encode(pixels)

    monkeypatch.setattr(session.model, "encode_images", stopping)
    with pytest.raises(Interrupted, match="run the command again"):
        import_data.run(session, Import(data, "mine"))
    second = bring(recipe, tmp_path / "out", data)
    assert second.shards_made == 1
    digests = [[store.shard_digest(number) for number in range(2)] for store in (whole, second.store)]
    assert digests[0] == digests[1]


def test_two_processes_make_the_store_of_one(tmp_path: Path, recipe: Recipe) -> None:
    data = table(tmp_path / "data", draw(tmp_path / "data"))
    path = jobs.write_recipe(tmp_path / "small.yaml")
    stores = []
    for name, more in {"one": [], "two": ["--num-processes", "2"]}.items():
        process = jobs.start(["import", str(data), "--name", "mine", *more], recipe=path, workspace=tmp_path / name)
        code, output, errors = jobs.finish(process)
        assert code == 0, errors
        assert "--set prompts.train.imported=mine --set train.scores=score" in " ".join(output.split())
        (store,) = (tmp_path / name / "stores").iterdir()
        stores.append({file.relative_to(store): file.read_bytes() for file in store.glob("shards/*/*.safetensors")})
        stores[-1] |= {file.relative_to(store): file.read_bytes() for file in store.glob("scores/*/*.jsonl")}
    assert stores[0] == stores[1]


def test_a_recipe_trains_on_imported_scores_and_eval_needs_no_store_any_more(
    tmp_path: Path, make_recipe: MakeRecipe, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe, workspace = own(make_recipe, method={"k_policy": "whole"}), tmp_path / "out"
    bring(recipe, workspace, table(tmp_path / "data", draw(tmp_path / "data", sizes=(3, 2, 4, 2))))
    done = train.run(Session(recipe, workspace, Reporter()))
    assert "times that on its own" in capsys.readouterr().err
    noted = json.loads((done.run.path / "imported.json").read_text())
    assert noted["imported"] > 0 and noted["own"] > 0 and noted["prompts"] == 4
    assert latest_checkpoint(done.run.path) is not None
    shutil.rmtree(workspace / "stores")
    result = evaluate.run(Session(recipe, workspace), path=done.run.path)
    assert result.results.measures["reward"].trained.images == 8


def test_the_run_depends_on_the_scores(tmp_path: Path, make_recipe: MakeRecipe) -> None:
    rows = draw(tmp_path / "data")
    for row in rows:
        row["scores"] = {"first": row["scores"], "second": row["scores"][::-1]}
    bring(own(make_recipe, scores="first"), tmp_path / "out", table(tmp_path / "data", rows))
    runs = {
        name: train.run(Session(own(make_recipe, scores=name, train={"steps": 1, "eval_every": 0}), tmp_path / "out"))
        for name in ("first", "second")
    }
    assert runs["first"].run.path != runs["second"].run.path
    with pytest.raises(PrerequisiteError, match=r"no imported scores called frist; did you mean `first`\? \(it has"):
        train.run(Session(own(make_recipe, scores="frist"), tmp_path / "out"))


def test_pairs_train_dpo(tmp_path: Path, make_recipe: MakeRecipe) -> None:
    rows = [
        {"prompt": row["prompt"], "chosen": row["images"][0], "rejected": row["images"][1]}
        for row in draw(tmp_path / "data")
    ]
    recipe = own(make_recipe, scores="preference", method={"name": "dpo", "k": 2})
    bring(recipe, tmp_path / "out", table(tmp_path / "data", rows))
    steps = train_rows(train.run(Session(recipe, tmp_path / "out")).run.metrics())
    assert len(steps) == 4 and steps[0]["dropped_groups_share"] == 0.0
    assert steps[0]["loss_method"] == pytest.approx(math.log(2), abs=1e-4)  # -log sigmoid(0)


def test_demonstrations_train_sft_and_keep_their_images_for_a_reward(tmp_path: Path, make_recipe: MakeRecipe) -> None:
    data, sft = tmp_path / "data", {"name": "sft", "k": 1}
    draw(data, sizes=(1, 1, 1, 1))
    for file in sorted((data / "images").glob("*.png")):
        file.with_suffix(".txt").write_text(f'a red sign that says "{file.stem[:4]}" on a brick background')
    recipe = own(make_recipe, scores="demonstration", method=sft)
    store = bring(recipe, tmp_path / "out", data / "images").store
    assert imported_score_names(store) == ["demonstration"]
    steps = train_rows(train.run(Session(recipe, tmp_path / "out")).run.metrics())
    assert len(steps) == 4 and steps[0]["loss"] == steps[0]["loss_method"] > 0
    scored = score.run(Session(own(make_recipe, scores=None), tmp_path / "out"))
    assert scored.totals.images == 4 and scored.totals.mean == pytest.approx(1.0, abs=0.3)


def test_a_store_without_images_says_how_to_keep_them(tmp_path: Path, make_recipe: MakeRecipe, recipe: Recipe) -> None:
    data = table(tmp_path / "data", draw(tmp_path / "data"))
    bring(recipe, tmp_path / "out", data)
    with pytest.raises(StoreError, match="keeps no images: delete it and run `gdro import --keep-images`"):
        score.run(Session(own(make_recipe, scores=None), tmp_path / "out"))
    with pytest.raises(UserError, match="nothing to sample: its images are imported"):
        sample.run(Session(recipe, tmp_path / "out"))


def test_a_dry_run_makes_nothing(tmp_path: Path, recipe: Recipe) -> None:
    data = table(tmp_path / "data", draw(tmp_path / "data", sizes=(3, 1, 4, 2)))
    rows = dict(import_data.describe(Import(data, "mine"), recipe, tmp_path / "out"))
    assert rows["groups"] == "4 of 1 to 4 images" and rows["scores"] == "score (10 images)"
    assert rows["images become"] == "64 x 64, crop" and rows["store"].endswith("; none is made yet")
    assert rows["size"].startswith("latents 0 MB, texts at most 0 MB: on disk, and in the memory of each process")
    assert not (tmp_path / "out").exists()


def test_names_become_paths(recipe: Recipe) -> None:
    assert import_data.import_name(Path("a/My photos.jsonl"), recipe, "photos") == "photos"
    assert import_data.import_name(Path("a/photos.jsonl"), recipe, None) == "mine"
    for name in ("../up", "a b", ""):
        with pytest.raises(UserError, match="give --name letters, digits"):
            import_data.import_name(Path(f"x/{name}.jsonl") if not name else Path("x"), recipe, name or "/")


def test_an_image_of_the_same_size_is_read_again_if_its_file_was_written(tmp_path: Path, recipe: Recipe) -> None:
    rows = draw(tmp_path / "data")
    photo = tmp_path / "data" / rows[0]["images"][1]
    rows[0]["images"][1] = "images/OPEN-1.bmp"
    with Image.open(photo) as image:
        image.save(photo.with_suffix(".bmp"))
    data = table(tmp_path / "data", rows)
    bring(recipe, tmp_path / "out", data)
    content = photo.with_suffix(".bmp").read_bytes()
    photo.with_suffix(".bmp").write_bytes(content)
    assert bring(recipe, tmp_path / "out", data).shards_made == 0
    photo.with_suffix(".bmp").write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    with pytest.raises(StoreError, match="OPEN-1.bmp has changed since it was imported"):
        bring(recipe, tmp_path / "out", data)


def test_other_images_and_another_model_are_another_run(tmp_path: Path, make_recipe: MakeRecipe) -> None:
    recipe, out = own(make_recipe, train={"steps": 1, "eval_every": 0}), tmp_path / "out"
    rows = draw(tmp_path / "data")
    data = table(tmp_path / "data", rows)
    store = bring(recipe, out, data).store
    first = train.run(Session(recipe, out)).run.path
    steps = train_rows(train.run(Session(own(make_recipe, train={"steps": 2, "eval_every": 0}), out)).run.metrics())
    assert steps[0]["top1_error_gap"] == 0.0  # the reference's errors are those of this model

    start = own(make_recipe, train={"steps": 2, "eval_every": 0, "lora": {"init": str(first)}})
    steps = train_rows(train.run(Session(start, out)).run.metrics())
    assert steps[0]["top1_error_gap"] == 0.0 and steps[0]["s_rank_1"] == 0.0

    shutil.rmtree(store.path)
    shutil.copy(tmp_path / "data" / rows[1]["images"][0], tmp_path / "data" / rows[0]["images"][0])
    bring(recipe, out, data)
    again = train.run(Session(recipe, out))
    assert again.run.path != first and not again.was_finished
