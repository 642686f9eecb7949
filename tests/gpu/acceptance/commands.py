"""The command line on the device: the main job, a stop and a resume, an ablation, a process group."""

from __future__ import annotations

import json
import shutil
import signal
import time
from pathlib import Path
from unittest import mock

import torch

from gdro_cli.config.load import load_recipe
from gdro_cli.config.sweep import plan_sweep
from gdro_cli.errors import Interrupted, PrerequisiteError
from gdro_cli.stages.ablation import ablate, trials
from gdro_cli.stages.runs.results import read_results
from gdro_cli.stages.setup.session import Session
from tests.gpu.acceptance.bench import Bench, end, sets, start
from tests.gpu.acceptance.rows import Section

RECIPE = ("--recipe", "geneval-fast")
STOP_AT = 10
SMALL = ("prompts.train.count=24", "prompts.validation.count=4", "train.groups_per_step=4", "train.steps=4")


def main_job(bench: Bench, section: Section) -> None:
    """``gdro train`` and ``gdro eval`` of the embedded model with the GenEval reward."""
    out = bench.work / "main"
    for command in ("train", "eval"):
        section.exit_code(f"gdro {command}", end(bench.gdro(command, *RECIPE, *bench.geneval, "--out", out)))
    (run,) = (out / "runs").iterdir()
    overall = read_results(run).measures["overall"]
    values = f"{overall.base.mean:.3f} -> {overall.trained.mean:.3f}"
    if bench.tiny:
        section.skip("overall score on held-out prompts", f"{values}, but a tiny run learns nothing")
        return
    low = overall.difference.low
    section.check("overall score on held-out prompts", overall.rose, f"{values}, low {low:+.3f}", "interval above 0")


def stop_and_resume(bench: Bench, section: Section) -> None:
    """A training that SIGTERM cuts and a second start ends has the losses of one that was never stopped."""
    steps = 12 if bench.tiny else 60
    settings = [*bench.geneval, *sets(f"train.steps={steps}", "train.eval_every=0", "train.log_every=1")]
    if not bench.tiny:
        settings += sets("prompts.train.count=48")
    whole, cut = bench.work / "whole", bench.work / "cut"
    shutil.rmtree(cut, ignore_errors=True)
    section.exit_code("undisturbed", end(bench.gdro("train", *RECIPE, *settings, "--out", whole)))
    shutil.copytree(whole, cut, ignore=shutil.ignore_patterns("runs"))  # the same images and scores
    process = bench.gdro("train", *RECIPE, *settings, "--out", cut)
    while process.poll() is None and len(losses(cut)) < (2 if bench.tiny else STOP_AT):
        time.sleep(0.005)
    process.send_signal(signal.SIGTERM)
    section.exit_code("SIGTERM", end(process), Interrupted.exit_code)
    stopped = len(losses(cut))
    section.check("SIGTERM: steps done", 0 < stopped < steps, stopped, f"between 1 and {steps - 1}")
    section.exit_code("second start", end(bench.gdro("train", *RECIPE, *settings, "--out", cut)))
    a, b = losses(whole), losses(cut)
    section.check("losses of all steps", len(a) == len(b) == steps, [len(a), len(b)], [steps, steps])
    worst = max(abs(x - y) / max(abs(x), 1e-6) for x, y in zip(a, b, strict=True))
    section.at_most("largest relative difference of a loss", worst, 1e-3)


def losses(out: Path) -> list[float]:
    """The losses in the metrics of the folder's only run, as far as it is."""
    rows = []
    for path in out.glob("runs/*/metrics.jsonl"):
        for line in path.read_text(encoding="utf-8").splitlines():
            try:
                rows.append(json.loads(line))
            except ValueError:  # a line that is being written
                break
    return [row["loss"] for row in rows if row["kind"] == "train"]


def ablation(bench: Bench, section: Section) -> None:
    """Three cells in this process leave nothing on the device; more jobs than GPUs are refused."""
    changes = [*bench.geneval[1::2], *SMALL]
    recipe = load_recipe("geneval-fast", overrides=[*changes, "train.eval_every=4"])
    after: list[float | None] = []
    shutil.rmtree(bench.work / "ablation", ignore_errors=True)  # finished cells would not run again

    def note() -> None:
        free_devices()
        after.append(bench.allocated())

    free_devices = trials.free_devices
    with mock.patch.object(trials, "free_devices", note):
        result = ablate.run(Session(recipe, bench.work / "ablation"), plan_sweep(recipe, ["tau"], ["0.5,0.05,0"]))
    finished = len(result.ablation.cells) - len(result.ablation.failed)
    section.check("cells that finished", finished == 3, finished, 3)
    section.check("cells after which the memory was looked at", len(after) == 3, len(after), 3)
    growth = None if bench.pretended else (after[-1] or 0) - (after[0] or 0)
    section.at_most("growth of the memory from the first cell to the last, GB", growth, 0.01)
    gpus, out = torch.cuda.device_count(), bench.work / "refused"
    refused = end(bench.gdro("ablate", *RECIPE, "--param", "tau", "--jobs", str(gpus + 1), "--out", out))
    section.exit_code("more jobs than GPUs", refused, PrerequisiteError.exit_code)
    said, sentence = " ".join(refused[1].split()), f"--jobs {gpus + 1} needs as many GPUs, but there are {gpus}"
    section.check("more jobs than GPUs: the sentence", sentence in said, said[-200:], sentence)


def process_group(bench: Bench, section: Section) -> None:
    """A training as the only process of a group of torch's launcher, whose messages NCCL carries."""
    if bench.pretended:
        section.skip("gdro train in a group of one: exit code")
        return
    launcher = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "1", "-m")
    job = ("train", *RECIPE, *bench.geneval, *sets(*SMALL, "train.eval_every=2"), "--out", bench.work / "group")
    section.exit_code("gdro train in a group of one", end(start(*launcher, "gdro_cli", *job)))
    section.exit_code("sum and gather of the group", end(start(*launcher, "tests.gpu.acceptance.group")))
