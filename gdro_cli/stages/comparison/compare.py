"""Several evaluated runs side by side: on the same prompts and noise, and at the same reward.

Means are compared only under one protocol. A run that trained longer has more reward and, perhaps, worse pictures; so
the evaluation points are also compared where their rewards match.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from gdro_cli.config.sections import JudgeSection, RewardSection
from gdro_cli.core.evaluation_points import MissingLimits
from gdro_cli.core.measures import Measure
from gdro_cli.core.scores import Interval
from gdro_cli.data.records import PromptRecord
from gdro_cli.data.scores import ScoreRow
from gdro_cli.errors import StoreError, UserError
from gdro_cli.files import write_bytes
from gdro_cli.identity import Difference, differences, digest
from gdro_cli.rewards.registry import reward_class
from gdro_cli.runtime.run import RunFolder
from gdro_cli.runtime.terminal import printable
from gdro_cli.stages.comparison.matched_reward import EvaluatedRun, Gain, match
from gdro_cli.stages.comparison.report import csv_table, json_document, page
from gdro_cli.stages.comparison.result import Comparison
from gdro_cli.stages.comparison.seed_groups import arms
from gdro_cli.stages.evaluation.measures import Measured, measure_of, measured
from gdro_cli.stages.reporting.evaluation_report import measure_names, training_rows, validation_rows
from gdro_cli.stages.runs.identity import run_named
from gdro_cli.stages.runs.results import read_results
from gdro_cli.stages.runs.store_times import read_batches


def run(names: Sequence[str], *, at_reward: float | None = None, workspace: Path) -> Comparison:
    """Compare runs given as folders or by their names in ``workspace``; see ``compare``."""
    return compare([run_named(name, workspace) for name in names], at_reward=at_reward, workspace=workspace)


def load_results(run: Path) -> dict[str, Any]:
    """Read the results of a run.

    Raises:
        UserError: it was not evaluated.
        StoreError: the file is damaged, or another version wrote it.
    """
    path = run / "results.json"
    if not path.is_file():
        raise UserError(f"the run {run} has no results.json: run `gdro eval` with its recipe first")
    return read_results(RunFolder(run))


def differing_protocol(a: Mapping[str, Any], b: Mapping[str, Any]) -> list[str]:
    """Every key in which the protocols of two results differ, as ``reward.rule: "one" / "other"``."""
    return [_told(each) for each in differences(a["protocol"], b["protocol"])]


def _told(each: Difference) -> str:
    sides = ((each.before, each.before_present), (each.after, each.after_present))
    return f"{each.path}: " + " / ".join(
        json.dumps(v, ensure_ascii=False) if there else "(absent)" for v, there in sides
    )


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
    opened = _open(runs)
    _refuse_differing(opened)
    first = opened[0].results
    names = measure_names(first["measures"], reward_class(first["task"]))
    gains = tuple(gain for name in names for gain in _gains(name, opened))
    identity = [[run.name, run.results, list(run.points)] for run in opened]
    folder = workspace / "comparisons" / digest([identity, at_reward])
    matching = match(opened, at_reward=at_reward)
    found = Comparison(
        runs=tuple(run.name for run in opened),
        gains=gains,
        matching=matching,
        arms=arms(opened, gains, matching),
        page=folder / "compare.html",
        files=(folder / "compare.json", folder / "compare.csv"),
    )
    contents = (page(found, opened), json_document(found, opened), csv_table(found))
    for path, data in zip((found.page, *found.files), contents, strict=True):
        write_bytes(path, data)
    return found


def _open(runs: Sequence[Path]) -> tuple[EvaluatedRun, ...]:
    if len(runs) < 2:
        raise UserError("a comparison needs at least two runs")
    twice = [path for path, count in Counter(path.resolve() for path in runs).items() if count > 1]
    if twice:
        raise UserError(f"the run {twice[0]} is named twice: a comparison is of different runs")
    shown = [printable(path.resolve().name) for path in runs]
    names = Counter(shown)
    opened = []
    for path, own in zip(runs, shown, strict=True):
        results, folder = load_results(path), RunFolder(path)
        settings = folder.recipe if (path / "recipe.json").is_file() else {}
        metrics, limits = folder.metrics(), _limits(settings)
        points = validation_rows(metrics)
        opened.append(
            EvaluatedRun(
                name=own if names[own] == 1 else printable(str(path)),
                path=path,
                results=results,
                points=tuple(point for point in points if limits.allow(point)),
                rows=tuple(training_rows(metrics)),
                batches=read_batches(folder),
                settings=settings,
                left_out=tuple(int(point["step"]) for point in points if not limits.allow(point)),
            )
        )
    return tuple(opened)


def _limits(settings: Mapping[str, Any]) -> MissingLimits:
    """How much may be missing of a run's evaluation points, by its recipe; the defaults where that cannot be known."""
    shares = []
    for name, section in (("reward", RewardSection()), ("judge", JudgeSection())):
        own = settings.get(name)
        value = own.get("max_failed_share") if isinstance(own, Mapping) else None
        shares.append(float(value) if isinstance(value, int | float) else section.max_failed_share)
    return MissingLimits(*shares)


def _refuse_differing(runs: Sequence[EvaluatedRun]) -> None:
    first = runs[0]
    found = [
        f"{first.name} and {other.name} in {'; '.join(differing)}"
        for other in runs[1:]
        if (differing := differing_protocol(first.results, other.results))
    ]
    if found:
        raise UserError(
            f"results of different protocols cannot be compared; these differ: {'; '.join(found)};"
            " evaluate the runs with the same prompts and settings"
        )


# -- paired differences -----------------------------------------------------------------------------------------------


def values_of(measure: Measure, results: Mapping[str, Any], *, model: str) -> Measured:
    """The values of one measure of the base or the trained model. Raises StoreError for rows that cannot be."""
    try:
        prompts = [PromptRecord(p["id"], p["prompt"], p["target"], p["metadata"]) for p in results["prompts"]]
        rows = sorted(results["images"][model], key=lambda row: int(row["index"]))
        scores = [ScoreRow(r["prompt_id"], r["index"], r["value"], r["reason"], r["details"]) for r in rows]
    except (KeyError, TypeError, ValueError) as error:
        raise StoreError(f"the results of {results.get('run')} hold a damaged row: run `gdro eval` again") from error
    return measured(measure, prompts, scores)


def _gains(name: str, runs: Sequence[EvaluatedRun]) -> Iterable[Gain]:
    first = runs[0].results
    measure = measure_of(name, reward_class(first["task"]))
    baseline = values_of(measure, first, model="trained")
    for number_, run in enumerate(runs):
        found = run.results["measures"].get(name)
        trained = None if found is None or found["trained"] is None else Interval(**found["trained"])
        candidate = values_of(measure, run.results, model="trained")
        yield Gain(name, run.name, trained, None if number_ == 0 else _paired(candidate, baseline, first, run))


def _paired(candidate: Measured, baseline: Measured, first: Mapping[str, Any], run: EvaluatedRun) -> Interval | None:
    ids = [[prompt["id"] for prompt in results["prompts"]] for results in (first, run.results)]
    if ids[0] != ids[1] or [len(v) for v in candidate.values] != [len(v) for v in baseline.values]:
        raise StoreError(
            f"the results of {run.path} hold other pictures than their protocol says: run `gdro eval` again"
        )
    try:
        return candidate.gain(baseline, samples=int(first["bootstrap"]))
    except StoreError:  # nothing was measured in both, or nothing of one tag
        return None
