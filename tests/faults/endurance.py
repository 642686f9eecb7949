"""Watch long jobs: memory and open files must stay flat, and logs and metrics within bounds.

    python -m tests.faults.endurance                 # 2,000 training steps and 5,000 scored images

``gdro`` makes a store of very small images, scores it and trains on it, in processes like a user's. Twice a second the
script reads the memory (what would be freed if the processes ended) and the open files of a job and its children. It
leaves out the first third of a job, its start; of the rest it compares the medians of the first and the last third. The
exit code is 1 if memory grows by more than ``--growth``, or if there are more open files.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

import psutil  # comes with accelerate

from tests.support.jobs import start, write_recipe

PAUSE = 0.5
IMAGES_PER_PROMPT = 16


@dataclass
class Usage:
    """What a job used while it ran, sample by sample."""

    memory: list[int] = field(default_factory=list)
    """Bytes."""
    files: list[int] = field(default_factory=list)
    seconds: float = 0.0

    def thirds(self, values: Sequence[int]) -> tuple[float, float]:
        """Medians of the first and the last third, without the job's start."""
        steady = values[len(values) // 3 :]
        part = max(1, len(steady) // 3)
        return statistics.median(steady[:part]), statistics.median(steady[-part:])

    @property
    def growth(self) -> float:
        """Growth of memory, as a share."""
        before, after = self.thirds(self.memory)
        return after / before - 1

    @property
    def more_files(self) -> int:
        """Growth of the number of open files."""
        before, after = self.thirds(self.files)
        return round(after - before)


def watch(process: subprocess.Popen[str], log: Path) -> Usage:
    """Watch a job and its children until it ends; raises if it fails."""
    usage, began, root = Usage(), time.monotonic(), psutil.Process(process.pid)
    while process.poll() is None:
        with suppress(psutil.Error):
            family = [root, *root.children(recursive=True)]
            now = [(member.memory_full_info().uss, member.num_fds()) for member in family]
            usage.memory.append(sum(memory for memory, _ in now))
            usage.files.append(sum(files for _, files in now))
        time.sleep(PAUSE)
    usage.seconds = time.monotonic() - began
    if process.returncode:
        raise SystemExit(f"{process.args} failed:\n{log.read_text()[-2000:]}")
    return usage


def carry_out(stage: str, recipe: Path, workspace: Path) -> tuple[Usage, int]:
    """The usage of a stage, and the number of bytes that it printed."""
    log = workspace / f"{stage}.log"
    with log.open("w") as file:
        process = start([stage], recipe=recipe, workspace=workspace, output=file)
        return watch(process, log), log.stat().st_size


def main() -> int:
    """Run the jobs and print the table."""
    options = argparse.ArgumentParser(description="Watch memory and open files of long jobs.")
    options.add_argument("--steps", type=int, default=2000)
    options.add_argument("--images", type=int, default=5000)
    options.add_argument("--growth", type=float, default=0.02, help="share by which memory may grow")
    arguments = options.parse_args()
    prompts = -(-arguments.images // IMAGES_PER_PROMPT)
    with tempfile.TemporaryDirectory(prefix="gdro-endurance-") as name:
        folder = Path(name)
        recipe = write_recipe(
            folder / "small.yaml",
            prompts={"train": {"builtin": "ocr-train", "count": prompts}},
            sample={"images_per_prompt": IMAGES_PER_PROMPT, "steps": 1, "prompts_per_shard": 8},
            train={"steps": arguments.steps, "checkpoint_every": 100, "eval_every": 500},
        )
        carry_out("sample", recipe, folder)
        jobs = {
            f"score, {prompts * IMAGES_PER_PROMPT} images": carry_out("score", recipe, folder),
            f"train, {arguments.steps} steps": carry_out("train", recipe, folder),
        }
        metrics = next(folder.glob("runs/*/metrics.jsonl")).stat().st_size
    print(f"{'job':24} {'seconds':>8} {'samples':>7} {'MB':>7} {'growth':>8} {'files':>6} {'more':>5} {'printed':>9}")
    bad = False
    for job, (usage, printed) in jobs.items():
        bad |= usage.growth > arguments.growth or usage.more_files > 0
        print(
            f"{job:24} {usage.seconds:8.0f} {len(usage.memory):7} {usage.thirds(usage.memory)[1] / 1e6:7.0f}"
            f" {usage.growth:+8.2%} {usage.thirds(usage.files)[1]:6.0f} {usage.more_files:+5} {printed / 1e3:6.1f} kB"
        )
    print(f"metrics of the training: {metrics / arguments.steps:.0f} bytes a step")
    return int(bad)


if __name__ == "__main__":
    sys.exit(main())
