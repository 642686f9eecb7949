"""Kill jobs at random moments, start them again, and check that nothing is lost or changed.

    python -m tests.faults.campaign --kills 200

Each stage (sample, score, train, eval, ablate) runs once undisturbed. Then it starts again and again from the end of
the stage before it, and is killed (SIGKILL) at random moments until it finishes. After each kill all finished parts
must still exist and be complete; the final result must equal the undisturbed one, bit for bit. The table shows kills
and violations per stage; the exit code is 1 after a violation, 2 if the time was too short. The moments follow from
``--seed``, as far as a machine's speed allows.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import random
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.support.jobs import PATIENCE, finish, start, write_recipe

STAGES: Mapping[str, Sequence[str]] = {
    "sample": ["sample"],
    "score": ["score"],
    "train": ["train"],
    "eval": ["eval"],
    "ablate": ["ablate", "--param", "tau", "--values", "0.05,0.5"],
}
POLL_SECONDS = 0.01
"""Seconds between two looks at the workspace."""
_TIMES = ("seconds", "created", "images_per_second")


@dataclass
class Tally:
    """Counts of one stage."""

    kills: int = 0
    starts: int = 0
    ends: int = 0
    """How often it finished."""
    violations: list[str] = field(default_factory=list)


# -- finished parts, and what must stay the same ----------------------------------------------------------------------


def finished_parts(workspace: Path) -> dict[str, str]:
    """Digests of everything that counts as done: manifests of store shards, and shards of score tables."""
    digests = {}
    for pattern in ("**/shards/[0-9]*/manifest.json", "**/scores/*/[0-9]*.jsonl"):
        for path in workspace.glob(pattern):
            digests[path.relative_to(workspace).as_posix()] = hashlib.sha256(path.read_bytes()).hexdigest()
    return digests


def newest_steps(workspace: Path) -> dict[str, int]:
    """Step of the newest checkpoint of each run."""
    steps: dict[str, int] = {}
    for manifest in workspace.glob("runs/*/checkpoints/step-*/manifest.json"):
        path = manifest.parent
        run = path.parents[1].name
        steps[run] = max(steps.get(run, 0), int(path.name.rpartition("-")[2]))
    return steps


def broken_parts(workspace: Path) -> Iterator[str]:
    """Everything that counts as done but is not complete."""
    for manifest in workspace.glob("**/shards/[0-9]*/manifest.json"):
        files = json.loads(manifest.read_bytes())["files"]
        yield from (
            f"{manifest.parent / name}" for name, entry in files.items() if not _fits(manifest.parent / name, entry)
        )
    for path in workspace.glob("**/scores/*/[0-9]*.jsonl"):
        head, _, rows = path.read_bytes().partition(b"\n")
        if json.loads(head)["sha256"] != hashlib.sha256(rows).hexdigest():
            yield str(path)
    for manifest in workspace.glob("runs/**/checkpoints/step-*/manifest.json"):
        yield from _broken_checkpoint(manifest.parent)
    for path in workspace.rglob("*.json"):
        if any(part.startswith(".") for part in path.relative_to(workspace).parts):
            continue  # unfinished, by its name
        try:
            json.loads(path.read_bytes())
        except ValueError:
            yield str(path)


def _broken_checkpoint(folder: Path) -> Iterator[str]:
    from gdro_cli.errors import StoreError
    from gdro_cli.runtime.checkpoint import load_checkpoint

    try:
        load_checkpoint(folder)
    except StoreError as error:
        yield str(error)


def _fits(path: Path, entry: Mapping[str, Any]) -> bool:
    if not path.is_file():
        return False
    data = path.read_bytes()
    return len(data) == entry["bytes"] and hashlib.sha256(data).hexdigest() == entry["sha256"]


def contents(workspace: Path) -> dict[str, Any]:
    """What is equal in two workspaces after the same stages: all bits, without times."""
    parts: dict[str, Any] = dict(finished_parts(workspace))
    for pattern in (
        "runs/*/*.safetensors",
        "runs/*/checkpoints/**/*.safetensors",
        "runs/*/best/checkpoints/**/*.safetensors",
    ):
        for path in workspace.glob(pattern):
            parts[path.relative_to(workspace).as_posix()] = hashlib.sha256(path.read_bytes()).hexdigest()
    for path in workspace.glob("runs/*/metrics.jsonl"):
        rows = [_timeless(json.loads(line)) for line in path.read_bytes().splitlines()]
        parts[path.relative_to(workspace).as_posix()] = rows
    for pattern in ("runs/*/results.json", "ablations/*/ablation.json"):
        for path in workspace.glob(pattern):
            parts[path.relative_to(workspace).as_posix()] = _timeless(json.loads(path.read_bytes()))
    return parts


def _timeless(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _timeless(inner) for key, inner in value.items() if not key.startswith(_TIMES)}
    return [_timeless(inner) for inner in value] if isinstance(value, list) else value


def left_behind(workspace: Path) -> list[str]:
    """Unfinished checkpoints and shards, of which a finished job leaves none."""
    half = {*workspace.rglob("checkpoints/.*"), *workspace.rglob("shards/.*")}
    return sorted(path.relative_to(workspace).as_posix() for path in half)


# -- moments ----------------------------------------------------------------------------------------------------------


def kill_at_random(
    process: subprocess.Popen[str], workspace: Path, moments: random.Random, *, usual: float
) -> str | None:
    """Kill the process at a random moment; returns its messages if it finished before.

    Half of the moments are times. The others come shortly after a new file in the workspace, while files are being
    written.
    """
    by_time = moments.random() < 0.5
    wait, changes, pause = moments.uniform(0.2, 1.0) * usual, moments.randint(1, 12), moments.uniform(0, 0.05)
    began, before = time.monotonic(), _entries(workspace)
    while process.poll() is None:
        if by_time and time.monotonic() - began >= wait:
            break
        if not by_time:
            now = _entries(workspace)
            changes -= now != before
            before = now
            if changes <= 0:
                time.sleep(pause)
                break
        if time.monotonic() - began > PATIENCE:
            process.kill()
            raise AssertionError(f"{process.args} did not end within {PATIENCE:g} s")
        time.sleep(POLL_SECONDS)
    process.kill()
    _, errors = process.communicate()
    return None if process.returncode == -9 else errors


def _entries(workspace: Path) -> int:
    return hash(tuple(sorted((str(path), len(files)) for path, _, files in os.walk(workspace))))


# -- the campaign -----------------------------------------------------------------------------------------------------


class Campaign:
    """An undisturbed workspace, and copies of it in which jobs are killed."""

    def __init__(self, folder: Path, *, seed: int, stages: Sequence[str], deadline: float) -> None:
        self.folder, self.stages, self.deadline = folder, list(stages), deadline
        self.moments = random.Random(seed)
        self.recipe = write_recipe(folder / "small.yaml")
        self.usual: dict[str, float] = {}
        self.expected: dict[str, dict[str, Any]] = {}
        self.tallies = {stage: Tally() for stage in stages}

    def undisturbed(self) -> None:
        """Run every stage once, and keep the workspace before it and the contents after it."""
        workspace = self.folder / "undisturbed"
        workspace.mkdir()
        for stage in self.stages:
            shutil.copytree(workspace, self.folder / f"before-{stage}")
            began = time.monotonic()
            code, _, errors = finish(start(STAGES[stage], recipe=self.recipe, workspace=workspace))
            if code:
                raise AssertionError(f"{stage} fails undisturbed: {errors}")
            self.usual[stage], self.expected[stage] = time.monotonic() - began, contents(workspace)

    def run(self, kills: int) -> None:
        """Kill the stages this number of times in all."""
        share = -(-kills // len(self.stages))
        for stage in self.stages:
            while self.tallies[stage].kills < share and time.monotonic() < self.deadline:
                self._once(stage, most=share - self.tallies[stage].kills)
                done, wrong = self.tallies[stage].kills, len(self.tallies[stage].violations)
                print(f"{stage}: {done} of {share} kills, {wrong} violations", file=sys.stderr, flush=True)

    def _once(self, stage: str, *, most: int) -> None:
        """Run a stage to its end, with at most ``most`` kills on the way."""
        tally, workspace = self.tallies[stage], self.folder / "disturbed"
        shutil.rmtree(workspace, ignore_errors=True)
        shutil.copytree(self.folder / f"before-{stage}", workspace)
        done, steps = finished_parts(workspace), newest_steps(workspace)
        while most > 0:
            process = start(STAGES[stage], recipe=self.recipe, workspace=workspace)
            tally.starts += 1
            messages = kill_at_random(process, workspace, self.moments, usual=self.usual[stage])
            if messages is not None:
                if process.returncode:
                    tally.violations.append(f"{stage} fails: {messages.strip().splitlines()[-1:]}")
                break
            tally.kills, most = tally.kills + 1, most - 1
            tally.violations += [f"counted as complete: {part}" for part in broken_parts(workspace)]
            now, newest = finished_parts(workspace), newest_steps(workspace)
            tally.violations += [f"lost or made again: {name}" for name in done if now.get(name) != done[name]]
            tally.violations += [f"steps of {run} lost" for run in steps if newest.get(run, 0) < steps[run]]
            done, steps = now, newest
        code, _, errors = finish(start(STAGES[stage], recipe=self.recipe, workspace=workspace))
        tally.starts, tally.ends = tally.starts + 1, tally.ends + 1
        if code:
            tally.violations.append(f"{stage} does not continue: {errors.strip().splitlines()[-1:]}")
            return
        actual, expected = contents(workspace), self.expected[stage]
        changed = [name for name in sorted(expected.keys() | actual.keys()) if actual.get(name) != expected.get(name)]
        tally.violations += [f"differs from the undisturbed job: {name}" for name in changed]
        tally.violations += [f"left behind: {name}" for name in left_behind(workspace)]

    @property
    def kills(self) -> int:
        return sum(tally.kills for tally in self.tallies.values())

    @property
    def violations(self) -> list[str]:
        return [f"{stage}: {violation}" for stage, tally in self.tallies.items() for violation in tally.violations]

    def table(self) -> str:
        """Kills and verdicts per stage."""
        lines = [f"{'stage':8} {'kills':>6} {'starts':>7} {'ends':>5}  verdict"]
        for stage, tally in self.tallies.items():
            verdict = f"{len(tally.violations)} violations" if tally.violations else "nothing lost, nothing changed"
            lines.append(f"{stage:8} {tally.kills:6} {tally.starts:7} {tally.ends:5}  {verdict}")
        return "\n".join(lines)


def main() -> int:
    """Run a campaign and print its table."""
    options = argparse.ArgumentParser(description="Kill jobs at random moments and check that nothing is lost.")
    options.add_argument("--kills", type=int, default=200)
    options.add_argument("--seed", type=int, default=0)
    options.add_argument("--minutes", type=float, default=180.0, help="start nothing new after this time")
    options.add_argument("--stages", default=",".join(STAGES), help="in this order, from an empty folder")
    arguments = options.parse_args()
    stages = arguments.stages.split(",")
    if not set(stages) <= set(STAGES):
        options.error(f"stages are {', '.join(STAGES)}")
    with tempfile.TemporaryDirectory(prefix="gdro-faults-") as folder:
        deadline = time.monotonic() + 60 * arguments.minutes
        campaign = Campaign(Path(folder), seed=arguments.seed, stages=stages, deadline=deadline)
        campaign.undisturbed()
        campaign.run(arguments.kills)
    print(campaign.table())
    print("\n".join(campaign.violations))
    if campaign.violations:
        return 1
    if campaign.kills < arguments.kills:
        print(f"there was time for {campaign.kills} of {arguments.kills} kills")
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
