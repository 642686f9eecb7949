"""Where the adapter is merged into the weights while images are drawn, and where it must not be."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
import torch

from gdro_cli.config.recipe import Recipe
from gdro_cli.models.adapters import Ema
from gdro_cli.models.families.flux import FluxFlow
from gdro_cli.runtime.run import RunFolder
from gdro_cli.stages.evaluation.validation import Validation
from gdro_cli.stages.sampling.fill_store import fill_store
from gdro_cli.stages.setup.model import attach_adapter
from gdro_cli.stages.setup.session import Session
from gdro_cli.stages.setup.store import open_training_store, training_plan
from gdro_cli.stages.training.online import OnlineSteps

pytestmark = pytest.mark.slow
MakeRecipe = Callable[..., Recipe]


@pytest.fixture
def changed(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """For each pass through the transformer, whether its first weights are not the base's."""
    passes: list[bool] = []
    velocity, base = FluxFlow._velocity, []

    def recorded(model: FluxFlow, *arguments: Any) -> Any:
        weight = next(layer for layer in model.transformer.modules() if hasattr(layer, "can_fold")).base_layer.weight
        if not base:
            base.append(weight.clone())
        passes.append(not torch.equal(weight, base[0]))
        return velocity(model, *arguments)

    monkeypatch.setattr(FluxFlow, "_velocity", recorded)
    return passes


def test_evaluation_points_and_stores_are_drawn_merged(
    make_recipe: MakeRecipe, tmp_path: Path, changed: list[bool]
) -> None:
    recipe = make_recipe()
    with ExitStack() as stack:
        session = Session(recipe, tmp_path)
        train_a_little(attach_adapter(recipe, session.model))
        validation = Validation.open(session, tmp_path / "runs" / "small", stack)
        session.model.velocity(*one_image(session), guidance=1.0, height=64, width=64)
        validation.look(step=1)
        fill_store(session, open_training_store(session), training_plan(session), label="sampling")
        session.model.velocity(*one_image(session), guidance=1.0, height=64, width=64)
    assert changed[0] is changed[-1] is False
    assert all(changed[1:-1]) and len(changed) > 2 * recipe.sample.steps


def test_rollouts_are_drawn_with_the_adapter_that_the_updates_train(
    make_online: MakeRecipe, tmp_path: Path, changed: list[bool]
) -> None:
    recipe = make_online()
    with ExitStack() as stack:
        source = OnlineSteps(Session(recipe, tmp_path))
        parameters = attach_adapter(recipe, source.model)
        train_a_little(parameters)
        source.open(stack, RunFolder(tmp_path), Ema(parameters, 0.001, 0.5))
        source.prepare(0)
    assert changed and not any(changed)


def train_a_little(parameters: list[torch.nn.Parameter]) -> None:
    with torch.no_grad():
        for parameter in parameters:
            parameter.add_(0.01)


def one_image(session: Session) -> tuple[torch.Tensor, torch.Tensor, Any]:
    model = session.model
    return model.noise([1], height=64, width=64), torch.tensor([0.5]), model.encode(["a red square"])
