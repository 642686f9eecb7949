"""Pictures that are not finite are no pictures: not scored, not judged, not kept.

They are made as a training that blew up makes them: what the model reads of a prompt is nan, and so is all it draws.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from gdro_cli.config.recipe import Recipe
from gdro_cli.core.signals import ImageSignals
from gdro_cli.errors import StoreError
from gdro_cli.models.adapters import Ema
from gdro_cli.models.base import Conditioning
from gdro_cli.models.latents import NOT_FINITE, complete, to_images
from gdro_cli.runtime.run import RunFolder
from gdro_cli.stages.evaluation.validation import Validation
from gdro_cli.stages.reporting.image_sheet import CELL, FAINT
from gdro_cli.stages.sampling.fill_store import sample_groups
from gdro_cli.stages.setup.model import attach_adapter
from gdro_cli.stages.setup.session import Session
from gdro_cli.stages.setup.store import training_plan
from gdro_cli.stages.training.online import OnlineSteps
from gdro_cli.stages.training.rollout import prompts_of_round

pytestmark = pytest.mark.filterwarnings("error::RuntimeWarning")
MakeRecipe = Callable[..., Recipe]


def broken(texts: Conditioning) -> Conditioning:
    """What the model reads of a prompt, all nan."""
    return {
        name: torch.full_like(text, torch.nan) if text.is_floating_point() else text for name, text in texts.items()
    }


def test_decoder_output_that_is_not_finite_is_not_an_image() -> None:
    pixels = torch.zeros(5, 3, 8, 8)
    pixels[1, 0, 3, 3], pixels[2, 1, 0, 0], pixels[3, 2, 7, 7] = torch.nan, torch.inf, -torch.inf
    images = to_images(pixels)
    assert [image is None for image in images] == [False, True, True, True, False]
    assert all(np.all(np.asarray(image) == 128) for image in (images[0], images[4]))
    assert len(complete([images[0], images[4]])) == 2
    with pytest.raises(ValueError, match=NOT_FINITE):
        complete(images)


@pytest.mark.slow
def test_an_evaluation_point_leaves_them_out(make_recipe: MakeRecipe, tmp_path: Path) -> None:
    """Prompt 0 of 2 cannot be drawn: reward, axes and signals are missing, and the numbers are those of prompt 1."""
    recipe = make_recipe(eval={"validation_images_per_prompt": 2})
    with ExitStack() as stack:
        run = tmp_path / "runs" / "small"
        validation = Validation.open(Session(recipe, tmp_path), run, stack)
        whole = validation.look(step=0)
        assert whole is not None and whole.failed == whole.unjudged == 0
        validation.base = whole
        validation.conditioning[0] = broken(validation.conditioning[0])
        found = validation.look(step=1)
        assert found is not None
        first, second = found.rows[:2], found.rows[2:]
        assert second == whole.rows[2:]
        for row in first:
            assert (row.value, row.reason) == (None, NOT_FINITE)
            assert row.details["u"] is None and row.details["unjudged"] == NOT_FINITE
            assert not {field.name for field in fields(ImageSignals)} & row.details.keys()
        assert found.groups[first[0].prompt_id]["diversity"] is None
        assert (found.failed, found.unjudged) == (2, 2)
        point, _ = validation._row(1, found, False, 0.0)
        assert (point["prompts"], point["images"], point["failed"], point["unjudged"]) == (1, 2, 2, 2)
        assert point["reward"] == pytest.approx(sum(row.measured() or 0 for row in second) / 2)
        with Image.open(run / "validation" / "step-000001.png") as sheet:
            assert sheet.getpixel((60 + CELL // 2, 38 + CELL // 2)) == FAINT
            assert sheet.getpixel((60 + CELL + 8 + CELL // 2, 38 + CELL // 2)) != FAINT
        validation.conditioning = [broken(text) for text in validation.conditioning]
        with pytest.raises(StoreError, match=rf"none of the 4 .* \({NOT_FINITE}\): lower train\.lr"):
            validation.look(step=2)


@pytest.mark.slow
def test_a_round_leaves_them_out(make_online: MakeRecipe, tmp_path: Path) -> None:
    """The three pictures of one of the two prompts have no reward, and no update learns from them."""
    recipe = make_online()
    with ExitStack() as stack:
        source = OnlineSteps(Session(recipe, tmp_path))
        parameters = attach_adapter(recipe, source.model)
        source.open(stack, RunFolder(tmp_path), Ema(parameters, 0.001, 0.5))
        (first, _), (second, _) = prompts_of_round(source.prompts, 0, count=2, seed=source.seed)
        source.conditioning[first.id] = broken(source.conditioning[first.id])
        assert source.prepare(0)
        made = source.round
        assert made is not None and made.metrics["failed"] == 3
        assert not made.rollout.clean[:3].isfinite().any() and made.rollout.clean[3:].isfinite().all()
        assert not made.advantages[:3].any() and made.advantages.isfinite().all()
        found = source.gradient(0)
        assert math.isfinite(found.metrics["loss"]) and found.metrics["images"] <= 3
        source.conditioning[second.id] = broken(source.conditioning[second.id])
        source.round = None
        with pytest.raises(StoreError, match=rf"none of the 6 .* of round 1 .* \({NOT_FINITE}\): lower train\.lr"):
            source.prepare(0)


def test_a_store_takes_none(make_recipe: MakeRecipe, tmp_path: Path) -> None:
    """Finite latents that the autoencoder makes no picture of."""
    session = Session(make_recipe(), tmp_path)
    model: Any = session.model
    prompts = session.prompts("train").records[:1]
    (group,) = sample_groups(model, prompts, training_plan(session), batch_size=4)
    assert len(group.images) == 4
    for parameter in model._network("vae").parameters():
        parameter.data.fill_(torch.nan)
    with pytest.raises(StoreError, match=rf"an image of prompt {prompts[0].id} .* is not finite.* another dtype"):
        sample_groups(model, prompts, training_plan(session), batch_size=4)
