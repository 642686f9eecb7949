"""Stage ``evaluate``: base and trained model on held-out prompts, same seeds, with paired confidence intervals.

The pictures of both are group stores with score tables of their own, so an interrupted evaluation resumes, and the base
model's pictures are made once for all runs that share them.
"""

from __future__ import annotations

from contextlib import ExitStack, nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from gdro_cli.config.base import digest
from gdro_cli.config.recipe import Recipe
from gdro_cli.core.scores import Interval
from gdro_cli.data.imagefolder import refuse_used
from gdro_cli.data.scores import ScoreTable
from gdro_cli.errors import PrerequisiteError
from gdro_cli.files import sha256_file, write_json
from gdro_cli.models.adapters import Ema, load_lora_state
from gdro_cli.models.base import FlowModel
from gdro_cli.runtime.checkpoint import Checkpoint, latest_checkpoint, load_checkpoint
from gdro_cli.runtime.interrupt import STOPPING, StopFlag
from gdro_cli.runtime.progress import Reporter
from gdro_cli.runtime.run import RunFolder
from gdro_cli.stages.grid import draw_grid
from gdro_cli.stages.imagefolder import write_pictures
from gdro_cli.stages.rewards import Measure, measured, measures, open_table
from gdro_cli.stages.sample import fill_store, training_store
from gdro_cli.stages.score import refuse_failures, score_missing
from gdro_cli.stages.train import attach_adapter, find_run, run_inputs
from gdro_cli.stages.workspace import (
    SamplingPlan,
    evaluation_plan,
    open_model,
    open_prompts,
    open_store,
    store_identity,
    store_path,
    stores_folder,
    training_plan,
)

RESULTS_SCHEMA = 1


@dataclass(frozen=True, slots=True)
class Comparison:
    """One quantity of both models, and the paired difference trained - base."""

    name: str
    base: Interval
    trained: Interval
    difference: Interval


@dataclass(frozen=True, slots=True)
class EvalResult:
    """What ``gdro eval`` found and where it lies."""

    comparisons: tuple[Comparison, ...]
    failed: int
    """Images without a score, base and trained together."""
    results: Path
    grid: Path | None

    @property
    def summary(self) -> dict[str, str]:
        """What the command line shows beside the table."""
        rows = {
            "prompts": str(self.comparisons[0].base.prompts),
            "images per model": str(self.comparisons[0].base.images),
        }
        if self.failed:
            rows["images without a score"] = str(self.failed)
        rows["results"] = str(self.results)
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
    if export is not None:
        refuse_used(export)
    with StopFlag(on_request=lambda: reporter.say(STOPPING)) as stop:
        model = open_model(recipe)
        folder, path, checkpoint = finished_run(recipe, workspace, model)
        plan = evaluation_plan(recipe, model, images_per_prompt=recipe.eval.images_per_prompt)
        evaluation = _Evaluation(recipe, model, plan, reporter, stop)
        base = evaluation.measure(stores_folder(workspace), weights="base")
        with ExitStack() as stack:
            stack.enter_context(trained_weights(recipe, model, checkpoint))
            file = path / ("ema.safetensors" if recipe.eval.weights == "ema" else "adapter.safetensors")
            weights = f"{recipe.eval.weights} {sha256_file(file)}"
            trained = evaluation.measure(folder.path / "evaluations", weights=weights)
    if export is not None:
        write_pictures(export, {"base": base, "trained": trained})
    return report(recipe, folder, base, trained, evaluation.protocol | {"weights": recipe.eval.weights})


def finished_run(recipe: Recipe, workspace: Path, model: FlowModel) -> tuple[RunFolder, Path, Checkpoint]:
    """The run that ``gdro train`` made of this recipe, and folder and content of its last checkpoint.

    Raises:
        PrerequisiteError: it is not there or not finished.
    """
    folder = find_trained(recipe, workspace, model)
    path = None if folder is None else latest_checkpoint(folder.path)
    if folder is None or path is None:
        raise PrerequisiteError(
            f"there is no trained model of the recipe {recipe.name} in {workspace}: run `gdro train` with the same"
            " recipe, --set and --out first"
        )
    checkpoint = load_checkpoint(path)
    if checkpoint.step != recipe.train.steps:
        raise PrerequisiteError(
            f"the run {folder.path} stands at step {checkpoint.step} of {recipe.train.steps}: run `gdro train` with the"
            " same recipe, --set and --out to finish it"
        )
    return folder, path, checkpoint


def find_trained(recipe: Recipe, workspace: Path, model: FlowModel) -> RunFolder | None:
    """The run of this recipe, if its store and its training have been begun."""
    prompts = open_prompts(recipe, recipe.prompts.train)
    identity = store_identity(recipe, model, training_plan(recipe, model), prompts)
    if not store_path(recipe, stores_folder(workspace), identity).exists():
        return None
    store, _ = training_store(recipe, workspace, model)
    return find_run(recipe, workspace, run_inputs(store, open_table(recipe, store)))


def trained_weights(recipe: Recipe, model: FlowModel, checkpoint: Checkpoint) -> Any:
    """Attach the trained adapter; a context manager, inside which the model is the one to evaluate."""
    parameters = attach_adapter(recipe, model)
    load_lora_state(model, checkpoint.tensors["adapter"])
    if recipe.eval.weights == "raw":
        return nullcontext()
    ema = Ema(parameters, recipe.train.ema.rate, recipe.train.ema.max_decay)
    ema.load(checkpoint.tensors["ema"])
    return ema.applied()


class _Evaluation:
    """Samples and scores the held-out prompts, once per set of weights."""

    def __init__(
        self, recipe: Recipe, model: FlowModel, plan: SamplingPlan, reporter: Reporter, stop: StopFlag
    ) -> None:
        self.recipe, self.model, self.plan, self.reporter, self.stop = recipe, model, plan, reporter, stop
        self.prompts = open_prompts(recipe, recipe.prompts.eval)

    @property
    def protocol(self) -> dict[str, Any]:
        """What two results must share to be compared."""
        identity = store_identity(self.recipe, self.model, self.plan, self.prompts)
        return {key: value for key, value in identity.items() if key not in ("model", "weights", "image_format")}

    def measure(self, folder: Path, *, weights: str) -> ScoreTable:
        """The complete score table of the model as it is now."""
        identity = store_identity(self.recipe, self.model, self.plan, self.prompts, weights=weights)
        store = open_store(self.recipe, folder, identity, self.prompts, self.plan)
        who = "base model" if weights == "base" else "trained model"
        reporter, stop = self.reporter, self.stop
        label = f"sampling, {who}"
        fill_store(self.model, store, self.plan, recipe=self.recipe, reporter=reporter, stop=stop, label=label)
        table = open_table(self.recipe, store)
        score_missing(self.recipe, table, reporter=reporter, stop=stop, label=f"scoring, {who}")
        refuse_failures(self.recipe, table)
        return table


def report(
    recipe: Recipe, folder: RunFolder, base: ScoreTable, trained: ScoreTable, protocol: dict[str, Any]
) -> EvalResult:
    """Compare the two tables, and write results.json and the picture grid into the run."""
    comparisons = tuple(compare(measure, base, trained, recipe) for measure in measures_of(recipe, base))
    failed = sum(row.value is None for table in (base, trained) for row in table.rows())
    out = folder.path / "evaluations" / f"results-{digest([base.digest, trained.digest, recipe.eval.bootstrap])}"
    grid = draw_grid(out.with_suffix(".png"), base, trained, prompts=recipe.eval.grid_prompts)
    rows = {name: [row.to_json() for row in table.rows()] for name, table in (("base", base), ("trained", trained))}
    results = {
        "kind": "gdro results",
        "schema": RESULTS_SCHEMA,
        "recipe": recipe.name,
        "run": folder.path.name,
        "protocol": {**protocol, "reward": dict(base.provenance)},
        "measures": {
            c.name: {k: asdict(getattr(c, k)) for k in ("base", "trained", "difference")} for c in comparisons
        },
        "failed": failed,
        "bootstrap": recipe.eval.bootstrap,
        "grid": None if grid is None else str(grid.relative_to(folder.path)),
        "images": rows,
    }
    write_json(out.with_suffix(".json"), results)  # one per evaluation
    path = folder.write_json("results.json", results)  # the latest
    return EvalResult(comparisons, failed, path, grid)


def measures_of(recipe: Recipe, table: ScoreTable) -> list[Measure]:
    """What can be reported of these prompts: a tag that none of them has is left out."""
    tags = {prompt.metadata.get("tag") for prompt in table.store.prompts}
    return [measure for measure in measures(recipe) if measure.tag is None or measure.tag in tags]


def compare(measure: Measure, base: ScoreTable, trained: ScoreTable, recipe: Recipe) -> Comparison:
    """Intervals of one quantity over prompts."""
    before, after = (measured(measure, table.store.prompts, table.rows()) for table in (base, trained))
    samples = recipe.eval.bootstrap
    intervals = (before.interval(samples=samples), after.interval(samples=samples), after.gain(before, samples=samples))
    return Comparison(measure.name, *intervals)
