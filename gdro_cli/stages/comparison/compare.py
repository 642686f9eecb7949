"""Several evaluated runs side by side: on the same prompts and noise, and at the same reward.

Means are compared only under one protocol. A run that trained longer has more reward and, perhaps, worse images; so
evaluation points are also compared where their rewards match.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Literal

from gdro_cli.config.load import build_recipe
from gdro_cli.core.evaluation_points import MissingLimits
from gdro_cli.core.measures import Measure
from gdro_cli.core.scores import Interval
from gdro_cli.errors import StoreError, UserError
from gdro_cli.files import sha256_file, write_bytes
from gdro_cli.identity import differences, digest
from gdro_cli.rewards.registry import reward_class
from gdro_cli.runtime.metrics import train_rows, validation_rows
from gdro_cli.runtime.run import RunFolder
from gdro_cli.runtime.terminal import printable
from gdro_cli.stages.comparison.matched_reward import EvaluatedRun, Gain, match
from gdro_cli.stages.comparison.report import csv_table, json_document, page
from gdro_cli.stages.comparison.result import Comparison
from gdro_cli.stages.comparison.seed_groups import group_seeds
from gdro_cli.stages.evaluation.measures import Measured, measure_of, measured
from gdro_cli.stages.reporting.evaluation_report import measure_names
from gdro_cli.stages.runs.identity import run_named
from gdro_cli.stages.runs.results import RESULTS, Results, read_results
from gdro_cli.stages.runs.store_times import read_batches
from gdro_cli.stages.setup.reward import missing_limits


def run(names: Sequence[str], *, at_reward: float | None = None, workspace: Path) -> Comparison:
    """Compare runs given as folders or by their names in ``workspace``; see ``compare``."""
    return compare([run_named(name, workspace) for name in names], at_reward=at_reward, workspace=workspace)


def compare(runs: Sequence[Path], *, at_reward: float | None, workspace: Path) -> Comparison:
    """Compare evaluated runs with the first of them, and write compare.html, compare.json and compare.csv.

    Args:
        runs: folders of at least two runs.
        at_reward: the reward at which evaluation points are matched; by default the lowest of the runs' highest.
        workspace: the files go into ``comparisons/<digest>/`` there.

    Raises:
        UserError: fewer than two runs, one of them twice or not evaluated, or protocols that differ.
        StoreError: a file is damaged, was written by another version, or cannot be written.
    """
    if at_reward is not None and not math.isfinite(at_reward):
        raise UserError(f"the reward to match at must be a finite number, not {at_reward}")
    opened = _open_all(runs)
    _refuse_differing(opened)
    first = opened[0].results
    gains = tuple(
        gain for name in measure_names(first.measures, reward_class(first.task)) for gain in _gains(name, opened)
    )
    identity = [[run.name, sha256_file(run.path / RESULTS), [p.to_json() for p in run.points]] for run in opened]
    folder = workspace / "comparisons" / digest([identity, at_reward])
    matching = match(opened, at_reward=at_reward)
    comparison = Comparison(
        runs=tuple(run.name for run in opened),
        gains=gains,
        matching=matching,
        seed_groups=group_seeds(opened, gains, matching),
        page=folder / "compare.html",
        files=(folder / "compare.json", folder / "compare.csv"),
    )
    contents = (page(comparison, opened), json_document(comparison, opened), csv_table(comparison))
    for path, data in zip((comparison.page, *comparison.files), contents, strict=True):
        write_bytes(path, data)
    return comparison


def _open_all(runs: Sequence[Path]) -> tuple[EvaluatedRun, ...]:
    if len(runs) < 2:
        raise UserError("a comparison needs at least two runs: name another one (gdro runs lists them)")
    twice = [path for path, count in Counter(path.resolve() for path in runs).items() if count > 1]
    if twice:
        raise UserError(f"the run {twice[0]} is named twice: a comparison is of different runs")
    names = [printable(path.resolve().name) for path in runs]
    return tuple(
        _open(path, name if names.count(name) == 1 else printable(str(path)))
        for path, name in zip(runs, names, strict=True)
    )


def _open(path: Path, name: str) -> EvaluatedRun:
    if not (path / RESULTS).is_file():
        raise UserError(f"the run {path} has no {RESULTS}: run `gdro eval {path}` first")
    results, folder = read_results(path), RunFolder(path)
    metrics, limits = folder.metrics(), _limits(folder)
    points = validation_rows(metrics)
    return EvaluatedRun(
        name=name,
        path=path,
        results=results,
        points=tuple(point for point in points if limits.allow(point)),
        steps=tuple(train_rows(metrics)),
        batches=read_batches(folder),
        settings=folder.recipe if (path / "recipe.json").is_file() else {},
        left_out=tuple(point.step for point in points if not limits.allow(point)),
    )


def _limits(folder: RunFolder) -> MissingLimits:
    """How much may be missing of a run's evaluation points, by its recipe."""
    source = folder.path / "resolved.json"
    return missing_limits(build_recipe(folder.read_object(source.name), source=str(source)))


def _refuse_differing(runs: Sequence[EvaluatedRun]) -> None:
    first = runs[0]
    tasks = {run.name: run.results.task for run in runs}
    if len(set(tasks.values())) > 1:
        listed = ", ".join(f"{name}: {task}" for name, task in tasks.items())
        raise UserError(f"runs of different tasks cannot be compared ({listed}): name runs of one task")
    differing = [
        f"{first.name} and {other.name} in {'; '.join(keys)}"
        for other in runs[1:]
        if (keys := differing_protocol(first.results, other.results))
    ]
    if differing:
        raise UserError(
            f"results of different protocols cannot be compared; these differ: {'; '.join(differing)};"
            " evaluate the runs with the same prompts and settings"
        )


def differing_protocol(a: Results, b: Results) -> list[str]:
    """Every key in which the protocols of two results differ, as ``reward.rule: "one" / "other"``."""
    return [f"{key.path}: {' / '.join(key.texts)}" for key in differences(a.protocol, b.protocol)]


# -- paired differences -----------------------------------------------------------------------------------------------


def values_of(measure: Measure, results: Results, *, model: Literal["base", "trained"]) -> Measured:
    """The values of one measure of the base or the trained model. Raises StoreError where one is not a number."""
    return measured(measure, results.prompts, sorted(results.rows(model), key=lambda row: row.index))


def _gains(name: str, runs: Sequence[EvaluatedRun]) -> Iterator[Gain]:
    first = runs[0].results
    measure = measure_of(name, reward_class(first.task))
    baseline = values_of(measure, first, model="trained")
    for number, run in enumerate(runs):
        change = run.results.measures.get(name)
        candidate = values_of(measure, run.results, model="trained")
        difference = _paired(candidate, baseline, first, run) if number else None
        yield Gain(name, run.name, None if change is None else change.trained, difference)


def _paired(candidate: Measured, baseline: Measured, first: Results, run: EvaluatedRun) -> Interval | None:
    same_prompts = [prompt.id for prompt in first.prompts] == [prompt.id for prompt in run.results.prompts]
    if not same_prompts or [len(v) for v in candidate.values] != [len(v) for v in baseline.values]:
        raise StoreError(f"the results of {run.path} have other images than their protocol says: run `gdro eval` again")
    return candidate.gain(baseline, samples=first.bootstrap) if candidate.comparable(baseline) else None
