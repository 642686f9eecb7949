"""``gdro``: one command per stage. Each loads a recipe, runs its stage and prints the result.

From ``gdro train`` to the loss: the stage's ``train.run`` calls ``Trainer.train``. That asks its source for a gradient
(``GroupSteps.gradient``), and ``GroupGradient`` computes it with a loss of ``gdro_cli.core.losses``.
"""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer

from gdro_cli import __version__
from gdro_cli.cli import launch, show, tables
from gdro_cli.cli.group import Commands
from gdro_cli.cli.options import (
    ABLATION_RECIPE,
    DEFAULT_OUT,
    DEFAULT_RECIPE,
    AdapterOption,
    AtRewardOption,
    DataArgument,
    DataNameOption,
    DebugOption,
    DryRunOption,
    EvaluatedRunArgument,
    ExportOption,
    FitOption,
    FolderArgument,
    FormatOption,
    FormOption,
    ImagesOption,
    ImportScoresOption,
    JobsOption,
    KeepImagesOption,
    ListImagesOption,
    MergeOption,
    ModelOption,
    OutOption,
    ParamOption,
    ProcessesOption,
    PublicOption,
    PushOption,
    RecipeOption,
    RewardOption,
    RunArgument,
    RunsArgument,
    ScoresNameOption,
    SeedsOption,
    SetOption,
    ShellArgument,
    ValuesOption,
    WatchOption,
    WorkerOption,
)
from gdro_cli.cli.rewards import rewards
from gdro_cli.errors import StoreError, UserError
from gdro_cli.runtime.interrupt import work_begins

_COMPLETE = "_GDRO_COMPLETE"
"""With this variable a shell asks typer to complete a command line."""


app = typer.Typer(
    name="gdro",
    cls=Commands,
    help="Post-train rectified-flow text-to-image models with Group-level Direct Reward Optimization.",
    epilog="The main job, on any machine: gdro train --recipe ocr.yaml, then gdro eval --recipe ocr.yaml",
    no_args_is_help=True,
    # typer's two options would stand in every --help: `gdro completion` prints its script, which sets this variable
    add_completion=_COMPLETE in os.environ,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"gdro_cli {__version__}")
        raise typer.Exit


@app.callback()
def every_command(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    """Options that come before a command."""


@app.command()
def init(
    folder: FolderArgument,
    model: ModelOption = "tiny",
    reward: RewardOption = "ocr",
    data: FormOption = None,
    debug: DebugOption = False,
) -> None:
    """Write a folder to begin with: a commented recipe, example prompts, and the commands to run."""
    from gdro_cli.stages.starting import init as stage

    tables.print_result("New job", stage.run(folder, model=model, reward=reward, data=data))


@app.command(name="import")
def import_data(
    data: DataArgument,
    name: DataNameOption = None,
    resize: FitOption = "crop",
    keep_images: KeepImagesOption = False,
    recipe: RecipeOption = DEFAULT_RECIPE,
    overrides: SetOption = None,
    out: OutOption = DEFAULT_OUT,
    dry_run: DryRunOption = False,
    debug: DebugOption = False,
    num_processes: ProcessesOption = 1,
) -> None:
    """Bring your own images, with scores, rankings or pairs, into a store that a recipe trains on."""
    named = () if name is None else ("--name", name)
    more = (*named, "--resize", resize, *(("--keep-images",) if keep_images else ()), str(data))
    job = launch.prepare("import", recipe=recipe, overrides=overrides, out=out, debug=debug, more=more)
    from gdro_cli.stages.importing import import_data as stage

    request = stage.Import(data, stage.import_name(data, job.recipe, name), resize, keep_images)
    if dry_run:
        return tables.print_plan("import", stage.describe(request, job.recipe, job.workspace))
    if launch.several(num_processes):
        return launch.run_in_processes(job, num_processes)
    tables.print_result("Import", stage.run(launch.start(job), request).summary)


@app.command()
def sample(
    recipe: RecipeOption = DEFAULT_RECIPE,
    overrides: SetOption = None,
    out: OutOption = DEFAULT_OUT,
    dry_run: DryRunOption = False,
    debug: DebugOption = False,
    num_processes: ProcessesOption = 1,
) -> None:
    """Generate groups: several images of each training prompt, once, with the untrained model."""
    job = launch.prepare("sample", recipe=recipe, overrides=overrides, out=out, debug=debug)
    if dry_run:
        return _describe(job, num_processes)
    if launch.several(num_processes):
        return launch.run_in_processes(job, num_processes)
    from gdro_cli.stages.sampling import sample as stage

    tables.print_result("Samples", stage.run(launch.start(job)).summary)


@app.command()
def score(
    recipe: RecipeOption = DEFAULT_RECIPE,
    overrides: SetOption = None,
    out: OutOption = DEFAULT_OUT,
    images: ImagesOption = None,
    export: ListImagesOption = None,
    scores: ImportScoresOption = None,
    name: ScoresNameOption = None,
    dry_run: DryRunOption = False,
    debug: DebugOption = False,
    num_processes: ProcessesOption = 1,
) -> None:
    """Score the stored images with the recipe's reward, or (--images) a folder of images from any tool.

    --export and --import bring in the scores of another program instead.
    """
    job = launch.prepare("score", recipe=recipe, overrides=overrides, out=out, debug=debug)
    others = {"--images": images, "--export": export, "--import": scores}
    chosen = [option for option, path in others.items() if path is not None]
    if len(chosen) > 1:
        raise UserError(f"{' and '.join(chosen)} each do one thing: give one of them")
    if chosen and (dry_run or num_processes > 1):
        raise UserError(f"{chosen[0]} cannot be combined with --dry-run or --num-processes: it works in this process")
    if (scores is None) != (name is None):
        raise UserError("--import FILE and --name NAME belong together: give both")
    if images is not None:
        return _score_folder(job, images)
    if export is not None:
        from gdro_cli.stages.scoring.exchange import export_images

        return tables.print_result("Images", export_images(launch.start(job), export))
    if scores is not None and name is not None:
        from gdro_cli.stages.scoring.exchange import import_scores

        return tables.print_result("Scores", import_scores(launch.start(job), scores, name))
    if dry_run:
        return _describe(job, num_processes)
    if launch.several(num_processes):
        return launch.run_in_processes(job, num_processes)
    from gdro_cli.stages.scoring import score as stage

    tables.print_result("Scores", stage.run(launch.start(job)).summary)


@app.command()
def train(
    recipe: RecipeOption = DEFAULT_RECIPE,
    overrides: SetOption = None,
    out: OutOption = DEFAULT_OUT,
    dry_run: DryRunOption = False,
    debug: DebugOption = False,
    num_processes: ProcessesOption = 1,
    watch: WatchOption = False,
) -> None:
    """Train an adapter: on scored groups (missing ones are made first), or online, depending on the method."""
    more = ("--watch",) if watch else ()
    job = launch.prepare("train", recipe=recipe, overrides=overrides, out=out, debug=debug, more=more)
    if dry_run:
        return _describe(job, num_processes)
    if launch.several(num_processes):
        return launch.run_in_processes(job, num_processes)
    from gdro_cli.stages.training import train as stage

    tables.print_result("Training", stage.run(launch.start(job), watch=watch).summary)


@app.command(name="eval")
def evaluate(
    run: EvaluatedRunArgument = None,
    recipe: RecipeOption = DEFAULT_RECIPE,
    overrides: SetOption = None,
    out: OutOption = DEFAULT_OUT,
    export: ExportOption = None,
    dry_run: DryRunOption = False,
    debug: DebugOption = False,
    num_processes: ProcessesOption = 1,
) -> None:
    """Measure the base and the trained model on held-out prompts, side by side."""
    path = None
    if run is not None:
        from gdro_cli.stages.runs.identity import run_named

        if recipe != DEFAULT_RECIPE:
            raise UserError("name a run or a recipe with --recipe, not both: a run contains its recipe")
        path = run_named(run, out)
    options = () if export is None else ("--export", str(export))
    job = launch.prepare("eval", recipe=recipe, overrides=overrides, out=out, debug=debug, run=path, more=options)
    if dry_run:
        return _describe(job, num_processes)
    if launch.several(num_processes):
        return launch.run_in_processes(job, num_processes)
    from gdro_cli.stages.evaluation import evaluate as stage

    result = stage.run(launch.start(job), path=path, export=export)
    tables.print_changes("Base against trained, held-out prompts (mean and 95 % interval)", result.results.measures)
    tables.print_changes("Signals of reward hacking", result.results.signals)
    tables.print_verdict(result.results.verdict)
    tables.print_result("Evaluation", result.summary)


@app.command()
def compare(
    runs: RunsArgument,
    at_reward: AtRewardOption = None,
    out: OutOption = DEFAULT_OUT,
    debug: DebugOption = False,
) -> None:
    """Compare evaluated runs on the same held-out prompts, and at the same validation reward."""
    from gdro_cli.stages.comparison import compare as stage

    work_begins()
    result = stage.run(runs, at_reward=at_reward, workspace=out)
    tables.print_table("Held-out prompts (mean, and paired difference to the first run)", *result.measure_table)
    tables.print_table("At matched reward (validation prompts)", *result.matched_table)
    tables.print_table("Methods: mean (lowest to highest) over training seeds", *result.seed_group_table)
    tables.print_table("Minutes, without evaluation points", *result.times_table)
    tables.print_result("Comparison", result.summary)


def _describe(job: launch.Job, num_processes: int) -> None:
    """``--dry-run``: report what the job would do."""
    from gdro_cli.stages.planning.dry_run import describe

    tables.print_plan(job.stage, describe(job.recipe, job.stage, job.workspace, world=num_processes))


def _score_folder(job: launch.Job, images: Path) -> None:
    """``gdro score --images``: score images of another tool with the recipe's reward."""
    from gdro_cli.stages.evaluation import image_folder as stage

    result = stage.run(launch.start(job), folder=images)
    tables.print_intervals(f"Images in {images} (mean and 95 % interval)", result.measures)
    tables.print_result("Scores", result.summary)


@app.command()
def ablate(
    param: ParamOption = None,
    values: ValuesOption = None,
    seeds: SeedsOption = 1,
    recipe: RecipeOption = ABLATION_RECIPE,
    overrides: SetOption = None,
    out: OutOption = DEFAULT_OUT,
    jobs: JobsOption = 1,
    dry_run: DryRunOption = False,
    debug: DebugOption = False,
    worker: WorkerOption = False,
) -> None:
    """Train with several values of one key (or two) on one store, and compare the evaluation points."""
    job = launch.prepare("ablate", recipe=recipe, overrides=overrides, out=out, debug=debug)
    from gdro_cli.config.sweep import plan_sweep

    sweep = plan_sweep(job.recipe, param or [], values, seeds=seeds)
    job = replace(job, recipe=sweep.recipe)
    if worker:
        launch.alone_on_its_device()
    elif "WORLD_SIZE" in os.environ and not dry_run:
        raise UserError(
            "gdro ablate starts its own processes: run it with --jobs N and without a launcher; if you use no launcher,"
            " `unset WORLD_SIZE`"
        )
    from gdro_cli.stages.ablation import ablate as stage
    from gdro_cli.stages.setup.session import Session

    if dry_run:
        return tables.print_cells(*stage.describe(Session(job.recipe, out, planning=True), sweep))
    if worker:
        work_begins()
        return stage.work(Session(job.recipe, out, launch.plain_reporter()), sweep)
    launch.check_devices(jobs, option="--jobs")
    session = launch.start(job)
    spread = launch.spread_cells(job, jobs, param=param or [], values=values or [], seeds=seeds)
    result = stage.run(session, sweep, spread=spread)
    tables.print_ablation(result)
    if result.ablation.failed:
        raise typer.Exit(StoreError.exit_code)


@app.command(name="export")
def export_run(
    run: RunArgument,
    adapter: AdapterOption = None,
    format: FormatOption = "diffusers",
    merge: MergeOption = None,
    push: PushOption = None,
    public: PublicOption = False,
    out: OutOption = DEFAULT_OUT,
    dry_run: DryRunOption = False,
    debug: DebugOption = False,
) -> None:
    """Package a finished run for others: its adapter, or the base model with the adapter merged in; --push uploads."""
    from gdro_cli.stages.exporting import export as stage

    export = stage.Export(run, adapter, merge, push, public, format)
    if dry_run:
        return tables.print_plan("export", stage.describe(export, out))
    work_begins()
    tables.print_result("Export", stage.run(export, out, launch.plain_reporter()))


@app.command()
def completion(shell: ShellArgument) -> None:
    """Print a script that completes commands and options with the Tab key: source <(gdro completion bash)."""
    from typer.completion import get_completion_script  # type: ignore[attr-defined]

    typer.echo(get_completion_script(prog_name="gdro", complete_var=_COMPLETE, shell=shell))


app.add_typer(show.recipes, name="recipes")
app.add_typer(rewards, name="rewards")
for _command in (show.prompts, show.runs, show.watch, show.env):
    app.command()(_command)
