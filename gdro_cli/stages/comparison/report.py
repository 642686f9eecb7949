"""A comparison of runs as a page, as JSON and as a table; the same comparison gives the same bytes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from gdro_cli.core.scores import Interval
from gdro_cli.files import json_bytes
from gdro_cli.identity import differences
from gdro_cli.stages.comparison.matched_reward import EvaluatedRun, MatchedPoint
from gdro_cli.stages.comparison.result import Comparison
from gdro_cli.stages.reporting import charts
from gdro_cli.stages.reporting.csv_table import csv_bytes
from gdro_cli.stages.reporting.html import data_uri, flat, render
from gdro_cli.stages.reporting.number_format import MISSING, signed

COMPARISON_SCHEMA = 2
SHEET_SIDE = 1400
"""Pixels of a sheet of validation images; its captions must stay readable."""


def page(comparison: Comparison, runs: Sequence[EvaluatedRun]) -> bytes:
    """The comparison as one HTML file that needs nothing else."""
    matching = comparison.matching
    curves = {run.name: [p for p in run.points if p.protocol == matching.protocol] for run in runs}
    groups = {group.name: group.curves for group in comparison.seed_groups}
    return render(
        "compare.html.j2",
        runs=[_facts(run) for run in runs],
        settings=_settings(runs),
        measures=list(dict.fromkeys(gain.measure for gain in comparison.gains)),
        gains={(gain.measure, gain.run): gain for gain in comparison.gains},
        matching=matching,
        points=[_point(point, run, matching.reward) for point, run in zip(matching.points, runs, strict=True)],
        seed_groups=comparison.seed_group_table,
        times=comparison.times_table,
        time_chart=charts.time_chart(groups, level=matching.reward),
        runs_chart=charts.runs_chart(curves, level=matching.reward),
        tradeoff_chart=charts.tradeoff_chart(curves, level=matching.reward),
        bootstrap=runs[0].results.bootstrap,
        protocol=list(flat(runs[0].results.protocol)),
    )


def _facts(run: EvaluatedRun) -> dict[str, Any]:
    results = run.results
    return {
        "name": run.name,
        "recipe": results.recipe,
        "method": results.method.get("name", MISSING),
        "weights": str(results.weights),
        "prompts": len(results.prompts),
        "images": len(results.images.trained),
        "failed": results.failed,
        "unjudged": results.unjudged if results.judged else None,
        "level": results.verdict.level,
        "reasons": results.verdict.reasons,
    }


def _settings(runs: Sequence[EvaluatedRun]) -> list[tuple[str, list[str]]]:
    """The keys in which the runs' recipes differ, each with its value in every run."""
    first = runs[0].settings
    cells: dict[str, list[str]] = {}
    for number, run in enumerate(runs[1:], start=1):
        for difference in differences(first, run.settings) if first and run.settings else ():
            before, after = difference.texts
            cells.setdefault(difference.path, [before] * len(runs))[number] = after
    return list(cells.items())


def _point(point: MatchedPoint, run: EvaluatedRun, reward: float | None) -> dict[str, Any]:
    own = point.values["reward"]
    return {
        "run": point.run,
        "step": MISSING if point.step is None else str(point.step),
        "values": list(point.values.values()),
        "distance": MISSING if own is None or reward is None else signed(own - reward),
        "verdict": point.verdict or MISSING,
        "sheet": None if point.sheet is None else data_uri(run.path / point.sheet, side=SHEET_SIDE),
    }


def json_document(comparison: Comparison, runs: Sequence[EvaluatedRun]) -> bytes:
    """The comparison as JSON."""
    measures: dict[str, dict[str, Any]] = {}
    for gain in comparison.gains:
        intervals = {"trained": gain.trained, "difference": gain.difference}
        pair = {name: None if value is None else asdict(value) for name, value in intervals.items()}
        measures.setdefault(gain.measure, {})[gain.run] = pair
    return json_bytes(
        {
            "kind": "gdro comparison",
            "schema": COMPARISON_SCHEMA,
            "runs": [_facts(run) for run in runs],
            "first": comparison.runs[0],
            "protocol": runs[0].results.protocol,
            "bootstrap": runs[0].results.bootstrap,
            "measures": measures,
            "matched": asdict(comparison.matching),
            "seed_groups": [asdict(group) for group in comparison.seed_groups],
        }
    )


def csv_table(comparison: Comparison) -> bytes:
    """The comparison as one long table: what ``kind`` of number of which measure and run; missing ones are empty."""
    table: list[list[Any]] = [["kind", "measure", "run", "step", "mean", "low", "high", "prompts", "images"]]
    for gain in comparison.gains:
        table.append(["trained", gain.measure, gain.run, "", *_cells(gain.trained)])
        if gain.run != comparison.runs[0]:
            table.append(["difference to first", gain.measure, gain.run, "", *_cells(gain.difference)])
    for point in comparison.matching.points:
        for name, value in point.values.items():
            table.append(["matched reward", name, point.run, point.step, value, "", "", "", ""])
    for group in comparison.seed_groups:
        for name, costs in (("training", group.costs), ("to matched reward", group.costs_to_reward)):
            for kind, seconds in () if costs is None else asdict(costs).items():
                table.append([f"seconds, {name}", kind, group.name, "", seconds, "", "", "", ""])
    return csv_bytes(table)


def _cells(value: Interval | None) -> list[Any]:
    if value is None:
        return ["", "", "", 0, 0]
    return [value.mean, value.low, value.high, value.prompts, value.images]
