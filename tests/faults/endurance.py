"""Long jobs, watched: do memory and open files stay flat, and logs and metrics within bounds?

    python -m tests.faults.endurance                 # 2,000 training steps and 5,000 scored images

A store of very small pictures is made, scored and trained on by ``gdro`` in processes of their own, as a user starts
them. Twice a second the memory (what would be freed if the processes ended) and the open files of a job and its
children are taken. The first third of a job is its start; of the rest the medians of the first and the last third are
compared. The exit code is 1 if memory grew by more than ``--growth`` or open files by any.
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
class Watched:
    """What a job held while it ran, look by look."""

    memory: list[int] = field(default_factory=list)
    """Bytes."""
    files: list[int] = field(default_factory=list)
    seconds: float = 0.0

    def thirds(self, values: Sequence[int]) -> tuple[float, float]:
        """Medians at the beginning and at the end, without the job's start."""
        steady = values[len(values) // 3 :]
        part = max(1, len(steady) // 3)
        return statistics.median(steady[:part]), statistics.median(steady[-part:])

    @property
    def growth(self) -> float:
        """Of memory, as a share."""
        before, after = self.thirds(self.memory)
        return after / before - 1

    @property
    def more_files(self) -> int:
        """Open files at the end beyond those at the beginning."""
        before, after = self.thirds(self.files)
        return round(after - before)


def watch(process: subprocess.Popen[str], log: Path) -> Watched:
    """Look at a job and its children until it ends; raises where it fails."""
    found, began, root = Watched(), time.monotonic(), psutil.Process(process.pid)
    while process.poll() is None:
        with suppress(psutil.Error):
            family = [root, *root.children(recursive=True)]
            held = [(each.memory_full_info().uss, each.num_fds()) for each in family]
            found.memory.append(sum(memory for memory, _ in held))
            found.files.append(sum(files for _, files in held))
        time.sleep(PAUSE)
    found.seconds = time.monotonic() - began
    if process.returncode:
        raise SystemExit(f"{process.args} failed:\n{log.read_text()[-2000:]}")
    return found


def carry_out(stage: str, recipe: Path, workspace: Path) -> tuple[Watched, int]:
    """A stage, watched, and the bytes that it printed."""
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
    asked = options.parse_args()
    prompts = -(-asked.images // IMAGES_PER_PROMPT)
    with tempfile.TemporaryDirectory(prefix="gdro-endurance-") as name:
        folder = Path(name)
        recipe = write_recipe(
            folder / "small.yaml",
            prompts={"train": {"builtin": "ocr-train", "count": prompts}},
            sample={"images_per_prompt": IMAGES_PER_PROMPT, "steps": 1, "prompts_per_shard": 8},
            train={"steps": asked.steps, "checkpoint_every": 100, "eval_every": 500},
        )
        carry_out("sample", recipe, folder)
        jobs = {
            f"score, {prompts * IMAGES_PER_PROMPT} images": carry_out("score", recipe, folder),
            f"train, {asked.steps} steps": carry_out("train", recipe, folder),
        }
        metrics = next(folder.glob("runs/*/metrics.jsonl")).stat().st_size
    print(f"{'job':24} {'seconds':>8} {'looks':>6} {'MB':>7} {'growth':>8} {'files':>6} {'more':>5} {'printed':>9}")
    bad = False
    for job, (seen, printed) in jobs.items():
        bad |= seen.growth > asked.growth or seen.more_files > 0
        print(
            f"{job:24} {seen.seconds:8.0f} {len(seen.memory):6} {seen.thirds(seen.memory)[1] / 1e6:7.0f}"
            f" {seen.growth:+8.2%} {seen.thirds(seen.files)[1]:6.0f} {seen.more_files:+5} {printed / 1e3:6.1f} kB"
        )
    print(f"metrics of the training: {metrics / asked.steps:.0f} bytes a step")
    return int(bad)


if __name__ == "__main__":
    sys.exit(main())
