"""One rule that chooses the settings of every method on stored groups, on validation prompts.

    python -m tests.benchmarks.tune ocr --cores 0,1
    python -m tests.benchmarks.tune geneval --cores 0,1

Every method is trained once with each of six settings, with a training seed that no reported result uses. The setting
with the highest corrected score at an evaluation point whose verdict is healthy is chosen; the point of the untrained
model does not count. After a stop the same command continues.
"""

from __future__ import annotations

import argparse
import itertools
import queue
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from gdro_cli.config.load import load_recipe
from gdro_cli.runtime.metrics import ValidationRow
from gdro_cli.stages.runs.identity import find_run
from gdro_cli.stages.setup.model import open_model
from gdro_cli.stages.setup.session import Session
from tests.benchmarks.head_to_head import gdro, recipes_of

SEED = 100
RATES = ["1e-3", "6e-4", "3e-4"]
BETAS = {"ocr": (6, 12), "geneval": (3, 6)}
STABILISED = {"ocr": "1", "geneval": "0.25"}
"""The gamma that each method with a stabilisation is tried with, beside 0."""
LEFT_OUT = {"flow-grpo", "dance-grpo", "dpo-stabilised", "dpo-plain"}
"""Online methods have other keys. The other DPO, with or without stabilisation, is among the settings of DPO."""


def settings_of(method: str, task: str) -> list[list[str]]:
    """The six settings that a method is tried with."""
    key, values = {
        "sft": ("tau", ["0", "0.05"]),
        "regression": ("penalty", ["0.03", "0.1", "0.3"]),  # only its product with beta counts
        "crd": ("penalty", ["0.3", "1", "3"]),
        "nft": ("mixing", ["0.1", "1"]),  # without beta
    }.get(method, ("gamma", ["0", STABILISED[task]]))
    rates = [f"train.lr={lr}" for lr in RATES[: 6 // len(values)]]
    if key == "gamma":
        low, high = BETAS[task]
        rates = [f"train.lr={lr} method.beta={beta}" for lr, beta in (("1e-3", low), ("1e-3", high), ("6e-4", high))]
    return [[*rate.split(), f"method.{key}={value}"] for rate, value in itertools.product(rates, values)]


def entry(point: ValidationRow) -> str:
    """A point as a cell of the table: reward / corrected score, ``!`` where it isn't healthy."""
    return f"{point.reward:.3f}/{point.corrected:.3f}{'' if point.verdict == 'healthy' else '!'}"


def main() -> None:
    """Train, and print the table and the choices."""
    options = argparse.ArgumentParser(description="Try every method with the same settings, and choose by one rule.")
    options.add_argument("task", choices=("ocr", "geneval"))
    options.add_argument("--methods", help="default: all on stored groups that have a recipe")
    options.add_argument("--cores", default="0", help="numbers of cores, e.g. 0,1")
    options.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="for every training")
    options.add_argument("--out", type=Path, default=Path("gdro-tune"))
    arguments = options.parse_args()
    task, out = arguments.task, arguments.out / arguments.task
    known = {method: recipe for method, recipe in recipes_of(task).items() if method not in LEFT_OUT}
    methods = [*known] if arguments.methods is None else arguments.methods.split(",")
    if unknown := {*methods} - {*known}:
        options.error(f"{', '.join(sorted(unknown))}: methods are {', '.join(known)}")
    cores: queue.Queue[int] = queue.Queue()
    for core in arguments.cores.split(","):
        cores.put(int(core))
    model = open_model(load_recipe(f"{task}-fast"))
    shared = [part for override in arguments.set for part in ("--set", override)]
    score = ["score", "--recipe", f"{task}-fast", "--out", str(out), *shared]
    gdro(score, log=out / "logs" / "score.log", core=None)  # the store that all share

    def train(method: str, setting: Sequence[str]) -> list[ValidationRow]:
        recipe, changes = known[method]
        overrides = [*changes, *arguments.set, *setting, f"train.seed={SEED}"]
        core = cores.get()
        try:
            sets = [part for override in overrides for part in ("--set", override)]
            log = out / "logs" / f"{method}.log"
            gdro(["train", "--recipe", recipe, "--out", str(out), *sets], log=log, core=core)
        finally:
            cores.put(core)
        run = find_run(Session(load_recipe(recipe, overrides=overrides), out, model=model, planning=True))
        assert run is not None
        return [row for row in run.metrics() if isinstance(row, ValidationRow) and row.step]

    with ThreadPoolExecutor(cores.qsize()) as pool:
        jobs = {
            method: [(setting, pool.submit(train, method, setting)) for setting in settings_of(method, task)]
            for method in methods
        }
        for method, tried in jobs.items():
            results = [(setting, job.result()) for setting, job in tried]
            healthy = [
                (point.corrected or 0.0, setting, point.step)
                for setting, points in results
                for point in points
                if point.verdict == "healthy"
            ]
            print(f"\n{method}: chosen {max(healthy, default=None)}")
            for setting, points in results:
                print(f"| {', '.join(setting)} | {', '.join(map(entry, points))} |", flush=True)


if __name__ == "__main__":
    main()
