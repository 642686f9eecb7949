"""Stage ``evaluate``: base and trained model on held-out prompts, same seeds, with paired confidence intervals.

The images of both are group stores with score tables of their own, so an interrupted evaluation resumes, and the base
model's images are made once for all runs that share them.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from gdro_cli.config.recipe import Recipe
from gdro_cli.core.measures import Measure
from gdro_cli.core.scores import Interval
from gdro_cli.core.verdict import Verdict
from gdro_cli.data.imagefolder import refuse_used
from gdro_cli.data.scores import ScoreTable
from gdro_cli.files import write_json
from gdro_cli.identity import digest
from gdro_cli.runtime.environment import environment
from gdro_cli.runtime.run import RunFolder
from gdro_cli.stages.evaluation.image_folder import write_images
from gdro_cli.stages.evaluation.measures import quality_measures, signal_measures
from gdro_cli.stages.evaluation.quality import Rated, change_between, comparable, pair_verdict, rate_tables
from gdro_cli.stages.reporting.evaluation_report import write_csv, write_report
from gdro_cli.stages.reporting.image_sheet import draw_grid
from gdro_cli.stages.reporting.model_card import write_card
from gdro_cli.stages.runs.results import RESULTS_KIND, RESULTS_SCHEMA
from gdro_cli.stages.runs.weights import ADAPTER_NOTE, RunWeights, applied, named_run, trained_run
from gdro_cli.stages.sampling.fill_store import fill_store
from gdro_cli.stages.scoring.fill_table import refuse_failures, score_missing
from gdro_cli.stages.setup.scorers import open_judge_pool, open_judge_table, open_reward_pool, open_reward_table
from gdro_cli.stages.setup.session import Session
from gdro_cli.stages.setup.store import evaluation_plan, open_store, store_identity, stores_folder


@dataclass(frozen=True, slots=True)
class Comparison:
    """One quantity of both models, and the paired difference trained - base."""

    name: str
    base: Interval
    trained: Interval
    difference: Interval

    def to_json(self) -> dict[str, Any]:
        """The three intervals as JSON."""
        return {name: asdict(getattr(self, name)) for name in ("base", "trained", "difference")}


@dataclass(frozen=True, slots=True)
class EvalResult:
    """What ``gdro eval`` found and where it lies."""

    comparisons: tuple[Comparison, ...]
    """The task's headline first, then its other measures, then what the judge says."""
    signals: tuple[Comparison, ...]
    verdict: Verdict
    protocol: str
    """The protocol's name."""
    failed: int
    """Images without a reward, base and trained together."""
    unjudged: int
    """Images without u, base and trained together, where there is a judge."""
    seen: int
    """Prompts that are in the training or validation prompts, too."""
    step: int
    """The step of the evaluated weights."""
    results: Path
    page: Path
    grid: Path | None

    @property
    def summary(self) -> dict[str, str]:
        """What the command line shows beside the tables."""
        rows = {
            "prompts": str(self.comparisons[0].base.prompts),
            "images per model": str(self.comparisons[0].base.images),
            "weights of step": str(self.step),
            "protocol": self.protocol,
        }
        if self.seen:
            rows["not held out"] = f"{self.seen} prompts are also in prompts.train or prompts.validation"
        if self.failed:
            rows["images without a score"] = str(self.failed)
        if self.unjudged:
            rows["images without a judgement"] = str(self.unjudged)
        rows |= {"results": str(self.results), "report": str(self.page)}
        return rows | ({"images": str(self.grid)} if self.grid else {})


def run(session: Session, *, path: Path | None = None, export: Path | None = None) -> EvalResult:
    """Evaluate a finished run against its base model.

    Args:
        session: on the recipe to evaluate with.
        path: the run's folder. Default: the run that ``gdro train`` makes of the recipe.
        export: a folder for the images of both models in the official GenEval layout.

    Raises:
        UserError: ``export`` is not empty.
        PrerequisiteError: there is no finished run, or the model or the reward engine is missing.
        StoreError: damaged files, or more failed images than ``reward.max_failed_share``.
        Interrupted: stopped by the user; finished shards are kept.
    """
    with session:
        engine, stop = session.engine, session.stop

        def find() -> tuple[RunFolder, RunWeights]:
            if export is not None:
                refuse_used(export)
            return trained_run(session) if path is None else named_run(session, path)

        folder, weights = engine.from_main(find)
        base = _measure(session, stores_folder(session.workspace), weights="base")
        with applied(session, weights):
            trained = _measure(session, folder.path / "evaluations", weights=weights.identity)

        def conclude() -> EvalResult:
            stop.check(
                "stopped before the report was written; all images are scored: run the command again to continue"
            )
            with folder.lock():
                result = report(session, folder, weights, base, trained)
            if export is not None:
                stopped = (
                    f"stopped while the images were exported; nothing of {export} is left, and the report is in"
                    f" {result.page}: run the command again to continue"
                )
                tables = {"base": base.rewards, "trained": trained.rewards}
                write_images(export, tables, check=lambda: stop.check(stopped))
            return result

        return engine.from_main(conclude)


@dataclass(frozen=True, slots=True)
class _Tables:
    """The complete tables of one model's images."""

    rewards: ScoreTable
    judgements: ScoreTable | None


def _measure(session: Session, folder: Path, *, weights: str) -> _Tables:
    """Sample, score and judge the held-out prompts with the model as it is now, in a store below ``folder``."""
    recipe, engine = session.recipe, session.engine
    who = "base model" if weights == "base" else "trained model"
    plan = evaluation_plan(session, images_per_prompt=recipe.eval.images_per_prompt)

    def open_tables() -> _Tables:
        store = open_store(session, folder, plan, session.prompts("eval"), weights=weights)
        return _Tables(open_reward_table(session, store), open_judge_table(session, store))

    tables = engine.from_main(open_tables)
    fill_store(session, tables.rewards.store, plan, label=f"sampling, {who}")
    score_missing(session, tables.rewards, open_reward_pool(session), label=f"scoring, {who}")
    with engine.together():
        refuse_failures(tables.rewards, allowed=recipe.reward.max_failed_share, key="reward.max_failed_share")
    judges = open_judge_pool(session)
    if judges is not None and tables.judgements is not None:
        score_missing(session, tables.judgements, judges, label=f"judging, {who}", refuse_empty=True)
        with engine.together():
            refuse_failures(tables.judgements, allowed=recipe.judge.max_failed_share, key="judge.max_failed_share")
    return tables


def protocol_of(session: Session) -> dict[str, Any]:
    """What two evaluations must share to be compared, beside reward and judge."""
    plan = evaluation_plan(session, images_per_prompt=session.recipe.eval.images_per_prompt)
    identity = store_identity(session, plan, session.prompts("eval"))
    return {key: value for key, value in identity.items() if key not in ("model", "weights")}


def report(session: Session, folder: RunFolder, weights: RunWeights, base: _Tables, trained: _Tables) -> EvalResult:
    """Compare the two models, and write results.json, the CSV, the image grid and report.html into the run."""
    recipe, workspace = session.recipe, session.workspace
    tables, reward = {"base": base, "trained": trained}, session.reward
    rated = {name: rate_tables(reward, each.rewards, each.judgements) for name, each in tables.items()}
    before, after = rated["base"], rated["trained"]
    protocol = protocol_of(session) | {
        "reward": dict(base.rewards.provenance),
        "judge": None if base.judgements is None else dict(base.judgements.provenance),
    }
    out = folder.path / "evaluations" / f"results-{_identity(tables.values(), recipe)}"
    result = EvalResult(
        comparisons=tuple(compared([*reward.measures, *quality_measures(reward)], before, after, recipe)),
        signals=tuple(compared(signal_measures(reward), before, after, recipe)),
        verdict=pair_verdict(reward, before, after, samples=recipe.eval.bootstrap),
        protocol=protocol_name(recipe, protocol, prompts=len(before.prompts)),
        failed=before.failed + after.failed,
        unjudged=before.unjudged + after.unjudged,
        seen=seen_before(session),
        step=weights.step,
        results=folder.path / "results.json",
        page=folder.path / "report.html",
        grid=draw_grid(out.with_suffix(".png"), base.rewards, trained.rewards, prompts=recipe.eval.grid_prompts),
    )
    results = {
        **_head(result, recipe, folder, weights, protocol),
        "prompts": [prompt.to_json() for prompt in before.prompts],
        "images": {name: _image_rows(rated[name], tables[name].rewards, workspace) for name in tables},
    }
    write_json(out.with_suffix(".json"), results)  # one per evaluation
    folder.write_json(result.results.name, results)  # the latest
    write_csv(folder.path / "results.csv", results)
    metrics, resolved = folder.metrics(), recipe.resolved()
    write_report(result.page, results, metrics, workspace=workspace, recipe=resolved, environment=environment())
    if (folder.path / ADAPTER_NOTE).is_file():  # an earlier version's run has none before its next `gdro train`
        write_card(folder.path)
    return result


def _identity(tables: Iterable[_Tables], recipe: Recipe) -> str:
    """Of one evaluation: what was scored and judged, and how intervals are made of it."""
    scored = [table for each in tables for table in (each.rewards, each.judgements)]
    return digest([recipe.eval.bootstrap, *(None if table is None else table.digest for table in scored)])


def _head(
    result: EvalResult, recipe: Recipe, folder: RunFolder, weights: RunWeights, protocol: dict[str, Any]
) -> dict[str, Any]:
    """results.json without its prompts and images."""
    return {
        "kind": RESULTS_KIND,
        "schema": RESULTS_SCHEMA,
        "recipe": recipe.name,
        "task": recipe.prompts.task,
        "method": recipe.method.model_dump(mode="json"),
        "run": folder.path.name,
        "protocol": protocol,
        "protocol_name": result.protocol,
        "weights": {
            "kind": recipe.eval.weights,
            "checkpoint": weights.checkpoint,
            "step": weights.step,
            "chosen_by": weights.chosen_by,
        },
        "measures": {c.name: c.to_json() for c in result.comparisons},
        "signals": {c.name: c.to_json() for c in result.signals},
        "verdict": {"level": result.verdict.level, "reasons": list(result.verdict.reasons)},
        "failed": result.failed,
        "unjudged": result.unjudged,
        "seen": result.seen,
        "bootstrap": recipe.eval.bootstrap,
        "grid": None if result.grid is None else str(result.grid.relative_to(folder.path)),
    }


def seen_before(session: Session) -> int:
    """How many of the evaluation's prompts are also in the training or validation prompts."""
    seen = {record.prompt for split in ("train", "validation") for record in session.prompts(split).records}
    return sum(record.prompt in seen for record in session.prompts("eval").records)


def protocol_name(recipe: Recipe, protocol: dict[str, Any], *, prompts: int) -> str:
    """A short name of a protocol, such as ``ocr-128x2-5steps-1a2b3c4d5e6f``: equal names, comparable results."""
    return (
        f"{recipe.prompts.task}-{prompts}x{recipe.eval.images_per_prompt}-{recipe.eval_steps}steps-{digest(protocol)}"
    )


def _image_rows(rated: Rated, table: ScoreTable, workspace: Path) -> list[dict[str, Any]]:
    """The rows as JSON, each with the place of its image below the workspace."""
    stored = [image for number in range(len(table.store.shards)) for image in table.store.images(number)]
    return [
        {**row.to_json(), "file": os.path.relpath(image.path, workspace)}
        for row, image in zip(rated.rows, stored, strict=True)
    ]


def compared(wanted: Iterable[Measure], base: Rated, trained: Rated, recipe: Recipe) -> Iterator[Comparison]:
    """Intervals of each measure that both models' images have, over prompts."""
    samples = recipe.eval.bootstrap
    for measure in wanted:
        if comparable(measure, base, trained):
            found = change_between(measure, base, trained, samples=samples)
            yield Comparison(measure.name, found.base, found.trained, found.difference)
