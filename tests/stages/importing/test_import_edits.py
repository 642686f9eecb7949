"""``gdro import`` of edited images for a model that edits: the images that were edited come with them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from gdro_cli.config.load import build_recipe
from gdro_cli.config.recipe import Recipe
from gdro_cli.errors import StoreError, UserError
from gdro_cli.images import fit, open_image
from gdro_cli.models.latents import to_pixels
from gdro_cli.runtime.metrics import train_rows
from gdro_cli.stages.importing import import_data
from gdro_cli.stages.importing.import_data import Import
from gdro_cli.stages.setup.session import Session
from gdro_cli.stages.training import train
from tests.support.own_data import write_table
from tests.support.shared import shared
from tests.support.tiny_families import build_flux, build_qwen_image_edit

pytestmark = pytest.mark.slow

SIZE = {"height": 32, "width": 48}


@pytest.fixture(scope="session")
def editor(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return shared(tmp_path_factory, "qwen-image-edit", build_qwen_image_edit)


def recipe(model: Path, data: Path, method: str = "dpo") -> Recipe:
    prompts = [{"prompt": 'write "HI"', "image": "before-0.png"}]
    held_out = {"file": str(write_table(data / "prompts.jsonl", *prompts))}
    return build_recipe(
        {
            "name": "edits",
            "model": {"path": str(model)},
            "prompts": {"train": {"imported": "mine"}, "validation": held_out, "eval": held_out},
            "sample": {"steps": 2, "guidance": 2.0, "prompts_per_shard": 1, **SIZE},
            "reward": {"workers": 1},
            "method": {"name": method, "k": 2 if method == "dpo" else 1, **({} if method == "dpo" else {"gamma": 0})},
            "train": {"scores": "preference", "steps": 2, "groups_per_step": 2, "micro_batch": 1, "eval_every": 0},
        }
    )


def pairs(folder: Path) -> list[dict[str, Any]]:
    """Two edits of two images with one instruction."""
    folder.mkdir()
    rows = []
    for number in range(2):
        names = {name: f"{name}-{number}.png" for name in ("before", "good", "bad")}
        for place, name in enumerate(names.values()):
            noise = np.random.default_rng([number, place]).integers(0, 256, (40, 60, 3), dtype=np.uint8)
            Image.fromarray(noise).save(folder / name)
        before, good, bad = names.values()
        rows.append({"prompt": "make it snow", "chosen": good, "rejected": bad, "source": before})
    return rows


def bring(recipe: Recipe, workspace: Path, data: Path, **options: Any) -> import_data.ImportResult:
    return import_data.run(Session(recipe, workspace), Import(data, "mine", **options))


def test_pairs_of_edits_are_encoded_with_their_sources_and_trained_on(editor: Path, tmp_path: Path) -> None:
    rows = pairs(tmp_path / "data")
    data, dpo = write_table(tmp_path / "data" / "data.jsonl", *rows), recipe(editor, tmp_path / "data")
    result = bring(dpo, tmp_path / "out", data, keep_images=True)
    model = Session(dpo, tmp_path / "out").model
    (groups,) = (result.store.read_shard(number) for number in range(len(result.store.shards)))
    for group, row, stored in zip(groups, rows, result.store.images(0)[::2], strict=True):
        assert group.conditioning.keys() == {"prompt_embeds", "source_latents"}  # guidance has its own text in sampling
        assert "group" not in group.prompt.metadata  # the images tell the prompts apart
        before = fit(open_image(tmp_path / "data" / row["source"]), **SIZE, how="crop")
        expected = model.encode_images(to_pixels([before]))[0]
        torch.testing.assert_close(group.conditioning["source_latents"], expected, rtol=1e-4, atol=1e-5)
        assert stored.prompt.source is not None and stored.prompt.source.tobytes() == before.tobytes()
    for method in ("dpo", "sft"):
        trained = train.run(Session(recipe(editor, tmp_path / "data", method), tmp_path / "out"))
        losses = [row["loss"] for row in train_rows(trained.run.metrics())]
        assert len(losses) == 2 and np.isfinite(losses).all()
    Image.new("RGB", (60, 40)).save(tmp_path / "data" / "before-1.png")
    with pytest.raises(StoreError, match=r"was imported from something else \(data: "):
        bring(dpo, tmp_path / "out", data)


def test_edits_without_a_source_are_refused_and_a_source_that_nothing_edits_is_ignored(
    editor: Path, tmp_path: Path
) -> None:
    rows = pairs(tmp_path / "data")
    mine, data = recipe(editor, tmp_path / "data"), tmp_path / "data" / "data.jsonl"
    write_table(data, rows[0], {name: value for name, value in rows[1].items() if name != "source"})
    with pytest.raises(UserError, match=r"data\.jsonl line 2: it has no `source`, the image that was edited"):
        bring(mine, tmp_path / "out", data)
    write_table(data, rows[0], {**rows[1], "source": ["before-0.png", "before-1.png"]})
    with pytest.raises(UserError, match=r"data\.jsonl line 2: source is a list, and a prompt edits one image: name "):
        bring(mine, tmp_path / "out", data)
    (tmp_path / "data" / "before-1.png").write_bytes(b"no")
    write_table(data, *rows)
    with pytest.raises(UserError, match=r"data\.jsonl line 2: before-1\.png cannot be used: it is not an image"):
        bring(mine, tmp_path / "out", data)
    plain = recipe(build_flux(tmp_path / "flux"), tmp_path / "data")
    result = bring(plain, tmp_path / "out", data)
    note = "keys that no form has were ignored: `source` in 2 lines, which only a model that edits images reads"
    assert note in result.data.notes
    assert [prompt.metadata for prompt in result.store.prompts] == [{}, {"group": "2"}]
    with pytest.raises(UserError, match=r"prompts\.eval: 1 of 1 prompts have an image to edit, .* remove `image`, or"):
        Session(plain, tmp_path / "out").prompts("eval")
    write_table(tmp_path / "data" / "prompts.jsonl", {"prompt": 'write "HI"'})
    with pytest.raises(
        UserError, match=r"prompts\.eval: 1 of 1 prompts have no image to edit, .* give each prompt its `im"
    ):
        Session(mine, tmp_path / "out").prompts("eval")
