"""What a change gains: the main job and its parts by two installations, in ratios taken in one run.

    python -m tests.benchmarks.before_after OLD/.venv/bin/python NEW/.venv/bin/python [--rounds 3]

Both sides run the same commands with one thread, alternating, each time in an empty folder. A part is the median of its
times in ``metrics.jsonl`` and the stores; the job is the processor time of `gdro train` and `gdro eval` with all their
processes. A round takes about eight minutes.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import subprocess
import tempfile
from collections import defaultdict
from pathlib import Path
from typing import Any

FLOW_GRPO = ["train.steps=6", "train.eval_every=0"]
"""Three rounds of two updates."""


def run(python: Path, folder: Path, *arguments: str) -> float:
    """Run a `gdro` command in ``folder``; returns the processor time of its processes in seconds."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command: list[str | Path] = [python, "-P", "-m", "gdro_cli", *arguments, "--out", folder / "out"]
    subprocess.run(command, cwd=folder, env=environment, check=True, stdout=subprocess.DEVNULL)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def rows(file: Path) -> list[dict[str, Any]]:
    """The rows of a file of JSON lines."""
    return [json.loads(line) for line in file.read_text().splitlines()]


def steps(folder: Path, run_name: str, key: str) -> list[float]:
    """``key`` of each training step but the first, which warms up."""
    (file,) = folder.glob(f"out/runs/{run_name}-*/metrics.jsonl")
    return [row[key] for row in rows(file) if row["kind"] == "train"][1:]


def sampling(folder: Path) -> list[float]:
    """Seconds per shard of the trained model's evaluation images, but for the first, which loads the model."""
    stores = folder.glob("out/runs/*/evaluations/*/times.jsonl")
    return [row["seconds"] for file in stores for row in rows(file) if row["shard"] > 0]


def measure(python: Path) -> dict[str, list[float]]:
    """The times of one side, once."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        job = run(python, folder, "train", "--recipe", "ocr-fast") + run(python, folder, "eval", "--recipe", "ocr-fast")
        overrides = [part for override in FLOW_GRPO for part in ("--set", override)]
        run(python, folder, "train", "--recipe", "ocr-flow-grpo", *overrides)
        return {
            "GDRO step": steps(folder, "ocr-fast", "seconds"),
            "Flow-GRPO update": steps(folder, "ocr-flow-grpo", "seconds_updates"),
            "sampling, trained model": sampling(folder),
            "`gdro train` and `gdro eval`, processor time": [job],
        }


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("old", type=Path)
    parser.add_argument("new", type=Path)
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    sides: tuple[dict[str, list[float]], dict[str, list[float]]] = (defaultdict(list), defaultdict(list))
    for _ in range(options.rounds):
        for side, python in zip(sides, (options.old, options.new), strict=True):
            for name, times in measure(python.absolute()).items():
                side[name] += times
    print("| | before | after | ratio |\n|---|---|---|---|")
    for name in sides[0]:
        old, new = (statistics.median(side[name]) for side in sides)
        print(f"| {name} | {old:.3f} s | {new:.3f} s | {new / old:.2f} |")


if __name__ == "__main__":
    main()
