"""From the score tables of both models to ``Results``: measures, signals, verdict and provenance."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from gdro_cli.config.recipe import Recipe
from gdro_cli.data.records import PromptRecord
from gdro_cli.data.scores import ScoreTable
from gdro_cli.errors import PrerequisiteError
from gdro_cli.identity import digest
from gdro_cli.stages.evaluation.measures import other_measure, reported_measures, signal_measures
from gdro_cli.stages.evaluation.quality import Rated, changes, pair_verdict, rate_tables
from gdro_cli.stages.runs.results import KIND, SCHEMA, ImageRow, Images, Results, Weights
from gdro_cli.stages.runs.weights import RunWeights
from gdro_cli.stages.setup.session import Session
from gdro_cli.stages.setup.store import evaluation_plan, store_identity


@dataclass(frozen=True, slots=True)
class Tables:
    """The complete tables of one model's images."""

    rewards: ScoreTable
    judgements: ScoreTable | None
    others: Mapping[str, ScoreTable] = field(default_factory=dict)
    """Those of the rewards in ``eval.rewards``, by name."""


def compare_models(
    session: Session, base: Tables, trained: Tables, *, run: str, weights: RunWeights, grid: str | None
) -> Results:
    """Compare the images of both models, on the same prompts and noise.

    Args:
        session: on the evaluated recipe.
        base: the base model's tables.
        trained: the trained model's tables.
        run: name of the run.
        weights: which of its weights drew the images.
        grid: the image grid, relative to the run.
    """
    recipe, reward, samples = session.recipe, session.reward, session.recipe.eval.bootstrap
    before, after = (
        rate_tables(reward, tables.rewards, tables.judgements, tables.others) for tables in (base, trained)
    )
    others = tuple(other_measure(name) for name in base.others)
    protocol = evaluation_protocol(session, base)
    return Results(
        kind=KIND,
        schema=SCHEMA,
        recipe=recipe.name,
        task=recipe.reward.kind,
        method=recipe.method.model_dump(mode="json"),
        run=run,
        protocol=protocol,
        protocol_name=protocol_name(recipe, protocol, prompts=len(before.prompts)),
        weights=Weights(
            kind=recipe.eval.weights,
            checkpoint=weights.checkpoint,
            step=weights.step,
            chosen_by=None if weights.chosen_by is None else dict(weights.chosen_by),
        ),
        measures=changes((*reported_measures(reward), *others), before, after, samples=samples),
        signals=changes(signal_measures(reward), before, after, samples=samples),
        verdict=pair_verdict(reward, before, after, samples=samples),
        failed=before.failed + after.failed,
        unjudged=before.unjudged + after.unjudged,
        seen=count_seen(session),
        bootstrap=samples,
        grid=grid,
        prompts=before.prompts,
        images=Images(
            base=_image_rows(before, base.rewards, session.workspace),
            trained=_image_rows(after, trained.rewards, session.workspace),
        ),
    )


def evaluation_protocol(session: Session, tables: Tables) -> dict[str, Any]:
    """What two evaluations must share to be compared."""
    plan = evaluation_plan(session, images_per_prompt=session.recipe.eval.images_per_prompt)
    identity = store_identity(session, plan, session.prompts("eval"))
    return {key: value for key, value in identity.items() if key not in ("model", "weights")} | {
        "reward": dict(tables.rewards.provenance),
        "judge": None if tables.judgements is None else dict(tables.judgements.provenance),
        **({"others": {name: dict(t.provenance) for name, t in tables.others.items()}} if tables.others else {}),
    }


def protocol_name(recipe: Recipe, protocol: dict[str, Any], *, prompts: int) -> str:
    """A short name of a protocol, such as ``ocr-128x2-5steps-1a2b3c4d5e6f``: equal names, comparable results."""
    return f"{recipe.reward.kind}-{prompts}x{recipe.eval.images_per_prompt}-{recipe.eval_steps}steps-{digest(protocol)}"


def _asks(record: PromptRecord) -> tuple[str, str | None]:
    """What a prompt asks for: its text, and the image that it edits."""
    return record.prompt, record.image_sha256


def count_seen(session: Session) -> int:
    """How many of the evaluation's prompts are also in the training or validation prompts.

    Imported training prompts are only known while their store is there.
    """
    seen = {_asks(record) for record in session.prompts("validation").records}
    try:
        seen |= {_asks(record) for record in session.prompts("train").records}
    except PrerequisiteError as error:
        session.reporter.say(f"whether held-out prompts were trained on cannot be said ({error})")
    return sum(_asks(record) in seen for record in session.prompts("eval").records)


def _image_rows(rated: Rated, table: ScoreTable, workspace: Path) -> tuple[ImageRow, ...]:
    """The rows, each with its image's path below the workspace."""
    stored = [image for number in range(len(table.store.shards)) for image in table.store.images(number)]
    return tuple(
        ImageRow(**row.to_json(), file=os.path.relpath(image.path, workspace))
        for row, image in zip(rated.rows, stored, strict=True)
    )
