"""Stage ``evaluate``: base and trained model on held-out prompts, same seeds, with paired confidence intervals.

The pictures of both are group stores with score tables of their own, so an interrupted evaluation resumes, and the base
model's pictures are made once for all runs that share them.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from gdro_cli.config.base import digest
from gdro_cli.config.recipe import Recipe
from gdro_cli.core.measures import Measure
from gdro_cli.core.scores import Interval
from gdro_cli.core.verdict import Verdict
from gdro_cli.data.imagefolder import refuse_used
from gdro_cli.data.scores import ScoreTable
from gdro_cli.errors import PrerequisiteError
from gdro_cli.files import write_json
from gdro_cli.models.adapters import Ema, load_lora_state
from gdro_cli.models.base import FlowModel
from gdro_cli.runtime.distributed import Engine
from gdro_cli.runtime.environment import environment
from gdro_cli.runtime.interrupt import STOPPING, StopFlag
from gdro_cli.runtime.progress import Reporter
from gdro_cli.runtime.run import RunFolder
from gdro_cli.stages.evaluation.image_folder import write_pictures
from gdro_cli.stages.evaluation.measures import quality_measures, signal_measures
from gdro_cli.stages.evaluation.quality import Rated, change_between, comparable, pair_verdict, rate_tables
from gdro_cli.stages.reporting.evaluation_report import write_csv, write_report
from gdro_cli.stages.reporting.image_sheet import draw_grid
from gdro_cli.stages.reporting.model_card import write_card
from gdro_cli.stages.runs.finished_run import ADAPTER_NOTE
from gdro_cli.stages.runs.identity import find_run
from gdro_cli.stages.runs.results import RESULTS_KIND, RESULTS_SCHEMA
from gdro_cli.stages.runs.weights import RunWeights, evaluated_weights
from gdro_cli.stages.sampling.sample import fill_store, training_store
from gdro_cli.stages.scoring.score import refuse_failures, score_missing
from gdro_cli.stages.setup.judging import open_judge, open_judge_pool, open_judge_table
from gdro_cli.stages.setup.rewards import open_pool, open_reward, open_table
from gdro_cli.stages.setup.workspace import (
    SamplingPlan,
    evaluation_plan,
    open_engine,
    open_model,
    open_prompts,
    open_store,
    store_identity,
    store_path,
    stores_folder,
    training_plan,
)
from gdro_cli.stages.training.trainer import attach_adapter
from gdro_cli.stages.training.training_data import expected_inputs, run_inputs


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
        return rows | ({"pictures": str(self.grid)} if self.grid else {})


def run(recipe: Recipe, workspace: Path, reporter: Reporter, *, export: Path | None = None) -> EvalResult:
    """Evaluate the finished run of ``recipe`` against its base model.

    ``export`` is a folder for the pictures of both in the official GenEval layout.

    Raises:
        UserError: ``export`` is not empty.
        PrerequisiteError: there is no finished run, or the model or the reward engine is missing.
        StoreError: damaged files, or more failed images than ``reward.max_failed_share``.
        Interrupted: stopped by the user; finished shards are kept.
    """
    engine = open_engine(recipe)
    with StopFlag(on_request=lambda: reporter.say(STOPPING)) as stop:
        model = open_model(recipe, engine=engine)

        def find() -> tuple[RunFolder, RunWeights]:
            if export is not None:
                refuse_used(export)
            return trained_run(recipe, workspace, model)

        folder, weights = engine.from_main(find)
        with engine.together():
            plan = evaluation_plan(recipe, model, images_per_prompt=recipe.eval.images_per_prompt)
            evaluation = _Evaluation(recipe, model, plan, engine, reporter, stop)
        base = evaluation.measure(stores_folder(workspace), weights="base")
        with applied(recipe, model, weights):
            trained = evaluation.measure(folder.path / "evaluations", weights=weights.identity)

        def conclude() -> EvalResult:
            stop.check("stopped before the report was written; all pictures are scored: run the command again to go on")
            with folder.lock():
                result = report(recipe, workspace, folder, weights, base, trained, evaluation.protocol)
            if export is not None:
                stopped = f"stopped while the pictures were written, and nothing of {export} is left; the report is in"
                stopped = f"{stopped} {result.page}: run the command again to go on"
                pictures = {"base": base.rewards, "trained": trained.rewards}
                write_pictures(export, pictures, check=lambda: stop.check(stopped))
            return result

        result = engine.from_main(conclude)
        engine.end()
    return result


def trained_run(recipe: Recipe, workspace: Path, model: FlowModel) -> tuple[RunFolder, RunWeights]:
    """The run that ``gdro train`` made of this recipe, and the weights of it that the recipe evaluates.

    Raises:
        PrerequisiteError: it is not there or not finished.
    """
    folder = find_trained(recipe, workspace, model)
    weights = None if folder is None else evaluated_weights(folder, recipe)
    if folder is None or weights is None:
        raise PrerequisiteError(
            f"there is no trained model of the recipe {recipe.name} in {workspace}: run `gdro train` with the same"
            " recipe, --set and --out first"
        )
    return folder, weights


def find_trained(recipe: Recipe, workspace: Path, model: FlowModel) -> RunFolder | None:
    """The run of this recipe, if its store and its training have been begun."""
    if recipe.online_method is not None:
        return find_run(recipe, workspace, expected_inputs(recipe, model))
    prompts = open_prompts(recipe, recipe.prompts.train)
    identity = store_identity(recipe, model, training_plan(recipe, model), prompts)
    if not store_path(recipe, stores_folder(workspace), identity).exists():
        return None
    store, _ = training_store(recipe, workspace, model)
    return find_run(recipe, workspace, run_inputs(store, open_table(recipe, store)))


@contextmanager
def applied(recipe: Recipe, model: FlowModel, weights: RunWeights) -> Iterator[None]:
    """Attach the trained adapter; inside, the model is the one to evaluate."""
    parameters = attach_adapter(recipe, model)
    load_lora_state(model, weights.adapter)
    if recipe.eval.weights == "raw":
        yield
        return
    ema = Ema(parameters, recipe.train.ema.rate, recipe.train.ema.max_decay)
    ema.load(weights.ema)
    with ema.applied():
        yield


@dataclass(frozen=True, slots=True)
class _Tables:
    """The complete tables of one model's pictures."""

    rewards: ScoreTable
    judgements: ScoreTable | None


class _Evaluation:
    """Samples and scores the held-out prompts, once per set of weights."""

    def __init__(
        self,
        recipe: Recipe,
        model: FlowModel,
        plan: SamplingPlan,
        engine: Engine,
        reporter: Reporter,
        stop: StopFlag,
    ) -> None:
        self.recipe, self.model, self.plan, self.engine = recipe, model, plan, engine
        self.reporter, self.stop = reporter, stop
        self.prompts = open_prompts(recipe, recipe.prompts.eval)
        self.judge = open_judge(recipe)

    @property
    def protocol(self) -> dict[str, Any]:
        """What two results must share to be compared."""
        identity = store_identity(self.recipe, self.model, self.plan, self.prompts)
        return {key: value for key, value in identity.items() if key not in ("model", "weights", "image_format")}

    def measure(self, folder: Path, *, weights: str) -> _Tables:
        """The complete tables of the model as it is now."""
        recipe, engine, reporter, stop = self.recipe, self.engine, self.reporter, self.stop
        who = "base model" if weights == "base" else "trained model"

        def open_tables() -> _Tables:
            identity = store_identity(recipe, self.model, self.plan, self.prompts, weights=weights)
            store = open_store(recipe, folder, identity, self.prompts, self.plan)
            judgements = None if self.judge is None else open_judge_table(self.judge, store)
            return _Tables(open_table(recipe, store), judgements)

        tables = engine.from_main(open_tables)
        store, label, share = tables.rewards.store, f"sampling, {who}", engine.local_world
        fill_store(self.model, store, self.plan, engine, recipe=recipe, reporter=reporter, stop=stop, label=label)
        pool, label = open_pool(recipe, sharing=share), f"scoring, {who}"
        score_missing(tables.rewards, pool, engine, reporter=reporter, stop=stop, label=label)
        with engine.together():
            refuse_failures(tables.rewards, allowed=recipe.reward.max_failed_share, key="reward.max_failed_share")
        if self.judge is None or tables.judgements is None:
            return tables
        pool, label = open_judge_pool(recipe, self.judge, sharing=share), f"judging, {who}"
        score_missing(tables.judgements, pool, engine, reporter=reporter, stop=stop, label=label, refuse_empty=True)
        with engine.together():
            refuse_failures(tables.judgements, allowed=recipe.judge.max_failed_share, key="judge.max_failed_share")
        return tables


def report(
    recipe: Recipe,
    workspace: Path,
    folder: RunFolder,
    weights: RunWeights,
    base: _Tables,
    trained: _Tables,
    protocol: dict[str, Any],
) -> EvalResult:
    """Compare the two models, and write results.json, the CSV, the picture grid and report.html into the run."""
    tables, reward = {"base": base, "trained": trained}, open_reward(recipe)
    rated = {name: rate_tables(reward, each.rewards, each.judgements) for name, each in tables.items()}
    before, after = rated["base"], rated["trained"]
    protocol = protocol | {
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
        seen=seen_before(recipe),
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


def seen_before(recipe: Recipe) -> int:
    """How many of the evaluation's prompts are in the training or validation prompts, too."""
    sources = recipe.prompts
    known = {
        record.prompt
        for source in (sources.train, sources.validation)
        for record in open_prompts(recipe, source).records
    }
    return sum(record.prompt in known for record in open_prompts(recipe, sources.eval).records)


def protocol_name(recipe: Recipe, protocol: dict[str, Any], *, prompts: int) -> str:
    """A short name of a protocol, such as ``ocr-128x2-5steps-1a2b3c4d5e6f``: equal names, comparable results."""
    return (
        f"{recipe.prompts.task}-{prompts}x{recipe.eval.images_per_prompt}-{recipe.eval_steps}steps-{digest(protocol)}"
    )


def _image_rows(rated: Rated, table: ScoreTable, workspace: Path) -> list[dict[str, Any]]:
    """The rows as JSON, each with the place of its picture below the workspace."""
    stored = [image for number in range(len(table.store.shards)) for image in table.store.images(number)]
    return [
        {**row.to_json(), "file": os.path.relpath(image.path, workspace)}
        for row, image in zip(rated.rows, stored, strict=True)
    ]


def compared(wanted: Iterable[Measure], base: Rated, trained: Rated, recipe: Recipe) -> Iterator[Comparison]:
    """Intervals of each measure that both models' pictures have, over prompts."""
    samples = recipe.eval.bootstrap
    for measure in wanted:
        if comparable(measure, base, trained):
            found = change_between(measure, base, trained, samples=samples)
            yield Comparison(measure.name, found.base, found.trained, found.difference)
