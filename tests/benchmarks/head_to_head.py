"""Every method on one task: trained, evaluated and compared, with several training seeds each.

    python -m tests.benchmarks.head_to_head ocr --cores 0,1          # docs/results.md, "Head to head"
    python -m tests.benchmarks.head_to_head geneval --cores 0,1

It runs the commands that a user would run, one after the other: ``gdro score`` for the store that the offline methods
share, ``gdro train`` and ``gdro eval`` of each recipe with each seed. Then it compares them, as ``gdro compare`` does.
After a stop the same command continues. With ``--cores`` each of these cores runs one training at a time, on one
thread, so that all methods are timed alike. Trainings do not share reference errors (``train.cache_reference=false``),
so that each computes its own.
"""

from __future__ import annotations

import argparse
import os
import queue
import subprocess
import sys
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from threading import Event, Lock

from PIL import Image, ImageDraw, ImageFont

from gdro_cli.config.layers import shipped_recipes
from gdro_cli.config.load import load_recipe
from gdro_cli.runtime.metrics import validation_rows
from gdro_cli.runtime.run import RunFolder
from gdro_cli.stages.comparison.compare import compare
from gdro_cli.stages.comparison.result import Comparison
from gdro_cli.stages.reporting.charts import time_chart
from gdro_cli.stages.reporting.image_sheet import LINE, MARGIN
from gdro_cli.stages.runs.identity import find_run
from gdro_cli.stages.setup.model import open_model
from gdro_cli.stages.setup.session import Session
from tests.benchmarks.head_to_head_tables import head_to_head_tables

METHODS = ("fast", "dpo", "rank", "top1", "sft", "regression", "dgpo", "nft", "flow-grpo", "dance-grpo")
"""Last parts of the recipes' names, GDRO's first."""
VARIANTS: Mapping[str, Mapping[str, tuple[str, ...]]] = {
    "ocr": {
        "dpo-stabilised": ("dpo", "method.beta=12", "method.gamma=1"),
        "crd": ("regression", "method.target=crd", "method.penalty=0.3"),
    },
    "geneval": {
        "dpo-plain": ("dpo", "method.gamma=0"),
        "crd": ("regression", "method.target=crd", "method.penalty=3"),
    },
}
"""By the task: a method's recipe, and what it is changed in."""
PROMPTS, ROW_NAME = 2 * LINE + MARGIN, 60
"""Pixels of a sheet of validation images above and left of its images."""


def recipes_of(task: str) -> dict[str, tuple[str, list[str]]]:
    """The methods that have a recipe for a task: the recipe, and its ``--set``."""
    found: dict[str, tuple[str, list[str]]] = {}
    for method in METHODS:
        if f"{task}-{method}" in shipped_recipes():
            found[method] = f"{task}-{method}", []
            for name, (base, *overrides) in VARIANTS[task].items():
                if base == method:
                    found[name] = f"{task}-{base}", [f"name={task}-{name}", *overrides]
    return found


def gdro(arguments: Sequence[str], *, log: Path, core: int | None) -> None:
    """Run a command with its output in a log; ends the program if it fails."""
    environment = dict(os.environ) if core is None else {**os.environ, "OMP_NUM_THREADS": "1"}
    pinned = None if core is None else partial(os.sched_setaffinity, 0, {core})
    command = [sys.executable, "-m", "gdro_cli", *arguments]
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("ab") as file:
        code = subprocess.run(command, stdout=file, stderr=file, env=environment, preexec_fn=pinned).returncode
    print(f"{'failed' if code else 'done':7} gdro {' '.join(arguments)}", flush=True)
    if code:
        raise SystemExit(f"the log {log} has the reason")


def sheet_of(comparison: Comparison, run: str, out: Path) -> Path | None:
    """The validation images of a run at the matched reward."""
    sheet = next(point.sheet for point in comparison.matching.points if point.run == run)
    return None if sheet is None else out / "runs" / run / sheet


def last_verdict(run: Path) -> str | None:
    """The verdict at a run's last evaluation point."""
    return validation_rows(RunFolder(run).metrics())[-1].verdict


def draw_grid(path: Path, sheets: Mapping[str, Path | None]) -> None:
    """Draw one row of images per method, below one row with their prompts."""
    drawn = {name: Image.open(sheet) for name, sheet in sheets.items() if sheet is not None}
    if not drawn:
        return
    first = next(iter(drawn.values()))
    label, row = 90, first.height - PROMPTS
    whole = Image.new("RGB", (first.width + label - ROW_NAME, PROMPTS + row * len(drawn)), "white")
    whole.paste(first.crop((ROW_NAME, 0, first.width, PROMPTS)), (label, 0))
    pen = ImageDraw.Draw(whole)
    for number, (name, sheet) in enumerate(drawn.items()):
        top = PROMPTS + number * row
        whole.paste(sheet.crop((ROW_NAME, PROMPTS, sheet.width, sheet.height)), (label, top))
        pen.text((4, top + row // 3), name.replace("-", "-\n", 1), fill="black", font=ImageFont.load_default(12))
    whole.save(path, optimize=True)


def main() -> None:
    """Train, evaluate and compare."""
    options = argparse.ArgumentParser(description="Train, evaluate and compare every method on one task.")
    options.add_argument("task", choices=("ocr", "geneval"))
    options.add_argument("--seeds", type=int, default=3, help="trainings of each method (default: 3)")
    options.add_argument("--methods", help="in addition to GDRO, which comes first (default: all with a recipe)")
    options.add_argument("--cores", default="", help="numbers of cores, e.g. 0,1; default: one training uses all")
    options.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="for every recipe")
    options.add_argument(
        "--at-reward",
        type=float,
        action="append",
        help="may be repeated; the pictures show the last one (default: the lowest of the runs' highest)",
    )
    options.add_argument("--out", type=Path, default=Path("gdro-head-to-head"))
    arguments = options.parse_args()

    known = recipes_of(arguments.task)
    chosen = [*known] if arguments.methods is None else ["fast", *filter(None, arguments.methods.split(","))]
    if unknown := {*chosen} - {*known}:
        options.error(f"{', '.join(sorted(unknown))}: the methods with a recipe are {', '.join(known)}")
    if not all(core.isdecimal() for core in arguments.cores.split(",") if core):
        options.error(f"--cores {arguments.cores}: give numbers of cores, e.g. 0,1")

    task, out = arguments.task, arguments.out / arguments.task
    recipes = {method: known[method] for method in chosen}
    cores: queue.Queue[int | None] = queue.Queue()
    for number in arguments.cores.split(","):
        cores.put(int(number) if number else None)

    # The first evaluation also samples and scores the base model's held-out images; the others wait for it.
    first, evaluated = Lock(), Event()

    def job(method: str, seed: int | None, *stages: str) -> list[str]:
        recipe, changes = recipes[method]
        online = load_recipe(recipe).online_method is not None
        overrides = [*changes, *arguments.set, *([] if online else ["train.cache_reference=false"])]
        overrides += [] if seed is None else [f"train.seed={seed}"]
        sets = [part for override in overrides for part in ("--set", override)]
        core = cores.get()
        try:
            for stage in stages:
                alone = stage == "eval" and not evaluated.is_set()
                with first if alone else nullcontext():
                    gdro(
                        [stage, "--recipe", recipe, "--out", str(out), *sets],
                        log=out / "logs" / f"{method}-{seed}.log",
                        core=core,
                    )
                if stage == "eval":
                    evaluated.set()
        finally:
            cores.put(core)
        return overrides

    def run_of(method: str, overrides: Sequence[str]) -> Path:
        recipe = recipes[method][0]
        loaded = load_recipe(recipe, overrides=overrides)
        run = find_run(Session(loaded, out, model=model, planning=True))
        if run is None:
            raise SystemExit(f"{out} has no run of {recipe} with {overrides}")
        return run.path

    model = open_model(load_recipe(recipes["fast"][0]))
    job("fast", None, "score")
    with ThreadPoolExecutor(cores.qsize()) as pool:
        # Seed by seed, so that a stop leaves complete comparisons, and all methods run on an equally busy machine.
        jobs = [
            (method, pool.submit(job, method, seed, "train", "eval"))
            for seed in range(1, arguments.seeds + 1)
            for method in recipes
        ]
        runs = [run_of(method, overrides.result()) for method, overrides in jobs]
    compared = [compare(runs, at_reward=reward, workspace=out) for reward in arguments.at_reward or [None]]
    comparison = compared[-1]
    last_verdicts = {
        group.name: [last_verdict(out / "runs" / name) for name in group.runs] for group in comparison.seed_groups
    }
    at_rewards = {each.matching.reward: each for each in compared if each.matching.reward is not None}
    print(*head_to_head_tables(task, at_rewards, last_verdicts), sep="\n", end="\n\n")
    grid = out / f"head-to-head-{task}.png"
    draw_grid(grid, {group.name: sheet_of(comparison, group.runs[0], out) for group in comparison.seed_groups})
    chart = time_chart({group.name: group.curves for group in comparison.seed_groups}, level=comparison.matching.reward)
    if chart is not None:
        grid.with_suffix(".svg").write_text(chart)
    print(f"images at the matched reward: {grid}; curves: {grid.with_suffix('.svg')}")


if __name__ == "__main__":
    main()
