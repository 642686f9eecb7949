"""A comparison of runs as a page, as JSON and as a table; the same comparison gives the same bytes."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from gdro_cli.core.scores import Interval
from gdro_cli.files import json_bytes
from gdro_cli.identity import Difference, differences
from gdro_cli.stages.comparison.matched_reward import EvaluatedRun, MatchedPoint
from gdro_cli.stages.comparison.result import Comparison
from gdro_cli.stages.comparison.seed_groups import arms_table, times_table
from gdro_cli.stages.reporting import charts
from gdro_cli.stages.reporting.csv_table import csv_bytes
from gdro_cli.stages.reporting.evaluation_report import weights_text
from gdro_cli.stages.reporting.html import MISSING, flat, picture, render, signed

COMPARISON_SCHEMA = 1
SHEET_SIDE = 1400
"""Pixels of a sheet of validation pictures; its captions must stay readable."""


def page(found: Comparison, runs: Sequence[EvaluatedRun]) -> bytes:
    """The comparison as one HTML file that needs nothing else."""
    matching = found.matching
    series = [
        charts.Series(run.name, tuple(p for p in run.points if p.get("protocol") == matching.protocol)) for run in runs
    ]
    gains = {(gain.measure, gain.run): gain for gain in found.gains}
    headline = found.gains[0].measure
    return render(
        "compare.html.j2",
        runs=[_facts(run) for run in runs],
        settings=_settings(runs),
        measures=list(dict.fromkeys(gain.measure for gain in found.gains)),
        trained={key: _json(gain.trained) for key, gain in gains.items()},
        difference={key: _json(gain.difference) for key, gain in gains.items()},
        matching=matching,
        points=[_point(point, run, matching.reward) for point, run in zip(matching.points, runs, strict=True)],
        arms=arms_table(found.arms, headline=headline),
        times=times_table(found.arms),
        time_chart=charts.time_chart({arm.name: arm.curves for arm in found.arms}, level=matching.reward),
        runs_chart=charts.runs_chart(series, level=matching.reward) if matching.protocol else None,
        tradeoff_chart=charts.tradeoff_chart(series, level=matching.reward) if matching.protocol else None,
        bootstrap=runs[0].results["bootstrap"],
        protocol=list(flat(runs[0].results["protocol"])),
    )


def _facts(run: EvaluatedRun) -> dict[str, Any]:
    results = run.results
    verdict = results["verdict"]
    return {
        "name": run.name,
        "recipe": results["recipe"],
        "method": results["method"].get("name", MISSING),
        "weights": weights_text(results["weights"]),
        "prompts": len(results["prompts"]),
        "images": len(results["images"]["trained"]),
        "failed": results["failed"],
        "unjudged": None if results["protocol"].get("judge") is None else results["unjudged"],
        "level": None if verdict is None else verdict["level"],
        "reasons": [] if verdict is None else verdict["reasons"],
    }


def _settings(runs: Sequence[EvaluatedRun]) -> list[tuple[str, list[str]]]:
    """The keys in which the runs' recipes differ, each with its value in every run."""
    first = runs[0].settings
    found: dict[str, list[str]] = {}
    for number, run in enumerate(runs[1:], start=1):
        for each in differences(first, run.settings) if first and run.settings else ():
            cells = found.setdefault(each.path, [_side(each, first=True)] * len(runs))
            cells[number] = _side(each, first=False)
    return list(found.items())


def _side(each: Difference, *, first: bool) -> str:
    value, there = (each.before, each.before_present) if first else (each.after, each.after_present)
    return json.dumps(value, ensure_ascii=False) if there else "(absent)"


def _point(point: MatchedPoint, run: EvaluatedRun, reward: float | None) -> dict[str, Any]:
    own = point.values["reward"]
    return {
        "run": point.run,
        "step": MISSING if point.step is None else str(point.step),
        "values": point.values,
        "distance": MISSING if own is None or reward is None else signed(own - reward),
        "verdict": point.verdict,
        "sheet": None if point.sheet is None else picture(run.path / point.sheet, side=SHEET_SIDE),
    }


def _json(value: Interval | None) -> dict[str, Any] | None:
    return None if value is None else asdict(value)


def json_document(found: Comparison, runs: Sequence[EvaluatedRun]) -> bytes:
    """The comparison as JSON."""
    measures: dict[str, dict[str, Any]] = {}
    for gain in found.gains:
        pair = {"trained": _json(gain.trained), "difference": _json(gain.difference)}
        measures.setdefault(gain.measure, {})[gain.run] = pair
    return json_bytes(
        {
            "kind": "gdro comparison",
            "schema": COMPARISON_SCHEMA,
            "runs": [_facts(run) for run in runs],
            "first": found.runs[0],
            "protocol": runs[0].results["protocol"],
            "bootstrap": runs[0].results["bootstrap"],
            "measures": measures,
            "matched": asdict(found.matching),
            "arms": [asdict(arm) for arm in found.arms],
        }
    )


def csv_table(found: Comparison) -> bytes:
    """The comparison as one long table: what ``kind`` of number of which measure and run; missing ones are empty."""
    table: list[list[Any]] = [["kind", "measure", "run", "step", "mean", "low", "high", "prompts", "images"]]
    for gain in found.gains:
        table.append(["trained", gain.measure, gain.run, "", *_cells(gain.trained)])
        if gain.run != found.runs[0]:
            table.append(["difference to first", gain.measure, gain.run, "", *_cells(gain.difference)])
    for point in found.matching.points:
        for name, value in point.values.items():
            table.append(["matched reward", name, point.run, point.step, value, "", "", "", ""])
    for arm in found.arms:
        for name, costs in (("training", arm.costs), ("to matched reward", arm.costs_to_reward)):
            for kind, seconds in () if costs is None else asdict(costs).items():
                table.append([f"seconds, {name}", kind, arm.name, "", seconds, "", "", "", ""])
    return csv_bytes(table)


def _cells(value: Interval | None) -> list[Any]:
    if value is None:
        return ["", "", "", 0, 0]
    return [value.mean, value.low, value.high, value.prompts, value.images]
