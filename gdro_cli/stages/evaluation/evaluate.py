"""Stage ``evaluate``: base and trained model on held-out prompts, same seeds, with paired confidence intervals.

The images of both are group stores with score tables of their own, so an interrupted evaluation resumes, and the base
model's images are made once for all runs that share them.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from gdro_cli.config.recipe import Recipe
from gdro_cli.data.imagefolder import refuse_used
from gdro_cli.files import write_json
from gdro_cli.identity import digest
from gdro_cli.runtime.environment import environment
from gdro_cli.runtime.run import RunFolder
from gdro_cli.stages.evaluation.image_folder import write_images
from gdro_cli.stages.evaluation.results import Tables, compare_models
from gdro_cli.stages.reporting.evaluation_report import write_csv, write_report
from gdro_cli.stages.reporting.image_sheet import draw_grid
from gdro_cli.stages.reporting.model_card import write_card
from gdro_cli.stages.runs.results import RESULTS, Results
from gdro_cli.stages.runs.weights import ADAPTER_NOTE, RunWeights, applied, named_run, trained_run
from gdro_cli.stages.sampling.fill_store import fill_store
from gdro_cli.stages.scoring.fill_table import refuse_failures, score_by, score_missing, score_with_reward
from gdro_cli.stages.setup.scorers import (
    check_servers,
    leave_device,
    open_judge_pool,
    open_judge_table,
    open_reward_table,
    open_table_of,
)
from gdro_cli.stages.setup.session import Session
from gdro_cli.stages.setup.store import evaluation_plan, open_store, stores_folder


@dataclass(frozen=True, slots=True)
class EvalResult:
    """What ``gdro eval`` found, and the run that it was written into."""

    results: Results
    run: Path

    @property
    def file(self) -> Path:
        """The results as JSON."""
        return self.run / RESULTS

    @property
    def page(self) -> Path:
        """The report."""
        return self.run / "report.html"

    @property
    def grid(self) -> Path | None:
        """The image grid; None where the recipe asks for none."""
        return None if self.results.grid is None else self.run / self.results.grid

    @property
    def summary(self) -> dict[str, str]:
        """What the command line shows beside the tables."""
        results = self.results
        headline = next(iter(results.measures.values()), None)
        rows = {
            "prompts": str(headline.base.prompts if headline else 0),
            "images per model": str(headline.base.images if headline else 0),
            "weights of step": str(results.weights.step),
            "protocol": results.protocol_name,
        }
        if results.seen:
            rows["not held out"] = f"{results.seen} prompts are also in prompts.train or prompts.validation"
        if results.failed:
            rows["images without a score"] = str(results.failed)
        if results.unjudged:
            rows["images without a judgement"] = str(results.unjudged)
        rows |= {"results": str(self.file), "report": str(self.page)}
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
                result = write_results(session, folder, weights, base, trained)
            if export is not None:
                stopped = (
                    f"stopped while the images were exported; nothing of {export} is left, and the report is in"
                    f" {result.page}: run the command again to continue"
                )
                tables = {"base": base.rewards, "trained": trained.rewards}
                write_images(export, tables, check=lambda: stop.check(stopped))
            return result

        return engine.from_main(conclude)


def _measure(session: Session, folder: Path, *, weights: str) -> Tables:
    """Sample, score and judge the held-out prompts with the model as it is now, in a store below ``folder``."""
    recipe, engine = session.recipe, session.engine
    who = "base model" if weights == "base" else "trained model"
    plan = evaluation_plan(session, images_per_prompt=recipe.eval.images_per_prompt)

    def open_tables() -> Tables:
        store = open_store(session, folder, plan, session.prompts("eval"), weights=weights)
        others = {reward.name: open_table_of(store, reward, command="gdro eval") for reward in session.other_rewards}
        tables = Tables(open_reward_table(session, store), open_judge_table(session, store), others)
        scorers = [(session.reward, tables.rewards), (session.judge, tables.judgements)]
        for scorer, table in [*scorers, *((reward, others[reward.name]) for reward in session.other_rewards)]:
            if scorer is not None and table is not None:
                check_servers(scorer, table)
        return tables

    tables = engine.from_main(open_tables)
    fill_store(session, tables.rewards.store, plan, label=f"sampling, {who}")
    score_with_reward(session, tables.rewards, label=f"scoring, {who}")
    for reward in session.other_rewards:
        score_by(session, reward, tables.others[reward.name], label=f"scoring, {who}, {reward.name}")
        with engine.together():
            allowed = recipe.reward.max_failed_share
            refuse_failures(tables.others[reward.name], allowed=allowed, key="reward.max_failed_share")
    judges = open_judge_pool(session)
    if session.judge is not None and judges is not None and tables.judgements is not None:
        leave_device(session, session.judge)
        allowed = recipe.judge.max_failed_share
        score_missing(session, tables.judgements, judges, label=f"judging, {who}", refuse_empty=True, allowed=allowed)
        with engine.together():
            refuse_failures(tables.judgements, allowed=allowed, key="judge.max_failed_share")
    return tables


def write_results(
    session: Session, folder: RunFolder, weights: RunWeights, base: Tables, trained: Tables
) -> EvalResult:
    """Compare the two models, and write results.json, the CSV, the image grid and report.html into the run."""
    recipe = session.recipe
    out = folder.path / "evaluations" / f"results-{_evaluation_digest(recipe, base, trained)}"
    grid = draw_grid(out.with_suffix(".png"), base.rewards, trained.rewards, prompts=recipe.eval.grid_prompts)
    shown = None if grid is None else str(grid.relative_to(folder.path))
    results = compare_models(session, base, trained, run=folder.path.name, weights=weights, grid=shown)
    write_json(out.with_suffix(".json"), results.to_json())  # one per evaluation
    folder.write_json(RESULTS, results.to_json())  # the latest
    write_csv(folder.path / "results.csv", results)
    write_report(
        folder.path / "report.html",
        results,
        folder.metrics(),
        workspace=session.workspace,
        recipe=recipe.resolved(),
        environment=environment(),
    )
    if (folder.path / ADAPTER_NOTE).is_file():  # a training that was killed at its very end has none
        write_card(folder.path)
    return EvalResult(results, folder.path)


def _evaluation_digest(recipe: Recipe, *models: Tables) -> str:
    """Of what was scored and judged, and how intervals are made of it."""
    scored = [table for tables in models for table in (tables.rewards, tables.judgements, *tables.others.values())]
    return digest([recipe.eval.bootstrap, *(None if table is None else table.digest for table in scored)])
