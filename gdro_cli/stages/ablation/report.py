"""An ablation as a page, as JSON and as a table of its evaluation points."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

from gdro_cli.config.sweep import value_text
from gdro_cli.files import json_bytes, write_bytes
from gdro_cli.stages.ablation.images import Images
from gdro_cli.stages.ablation.result import FIGURES, Ablation, CellResult, kept_step
from gdro_cli.stages.reporting import charts
from gdro_cli.stages.reporting.csv_table import csv_bytes
from gdro_cli.stages.reporting.html import MISSING, flat, number, picture, render
from gdro_cli.stages.setup.reward import open_reward

ABLATION_KIND = "gdro ablation"
ABLATION_SCHEMA = 1
_POINT = ("u", "corrected", "verdict", "prompts", "images", "failed", "unjudged")
"""What the table says of a point beside its reward, where it has it."""


def write_files(found: Ablation, images: Images, folder: Path) -> tuple[Path, ...]:
    """Write report.html, ablation.json and ablation.csv; returns their paths. Raises StoreError."""
    contents = {
        "report.html": page(found, images),
        "ablation.json": json_document(found, images, folder),
        "ablation.csv": csv_table(found),
    }
    for name, data in contents.items():
        write_bytes(folder / name, data)
    return tuple(folder / name for name in contents)


def page(found: Ablation, images: Images) -> bytes:
    """The ablation as one HTML file that needs nothing else."""
    sweep = found.sweep
    panels = {found.reward: f"validation {found.reward}"}
    if found.judged:
        panels |= {"corrected": "corrected score", "u": "u (1 to 5)"}
    elif found.measure != found.reward:
        panels |= {found.measure: f"validation {found.measure}"}
    curves = {name: found.curves(name) for name in panels}
    points = [point for each in found.cells for point in each.points]
    return render(
        "ablation.html.j2",
        found=found,
        sweep=sweep,
        summary=found.summary(),
        chart=charts.sweep_chart(curves, panels),
        counts=(points[0]["prompts"], points[0]["images"]) if points else None,
        grid=_grid(found),
        pictures=images,
        shown=[[picture(file) for file in row.files] for row in images.rows],
        runs=[(each.cell.label, each.cell.seed, each.run.name, each.outcome.reason) for each in found.cells],
        recipe=list(flat(sweep.recipe.resolved())),
    )


def _grid(found: Ablation) -> dict[str, Any] | None:
    """The deciding measure by the values of two keys."""
    if len(found.sweep.axes) != 2:
        return None
    rows, columns = found.sweep.axes
    by_values = {each.cell.values: each.cell.label for each in found.cells}
    deciding = found.deciding()

    def cell(row: Any, column: Any) -> str:
        value = deciding[by_values[row, column]]
        return MISSING if value is None else number(value.mean)

    return {
        "rows": rows.name,
        "columns": columns.name,
        "heads": [value_text(value) for value in columns.values],
        "lines": [(value_text(row), [cell(row, column) for column in columns.values]) for row in rows.values],
    }


def json_document(found: Ablation, images: Images, folder: Path) -> bytes:
    """The ablation as JSON; its keys are explained in docs/ablations.md."""
    sweep = found.sweep
    figures = {name: found.over_seeds(name) for name in FIGURES}
    deciding, best = found.deciding(), found.best()
    return json_bytes(
        {
            "kind": ABLATION_KIND,
            "schema": ABLATION_SCHEMA,
            "recipe": sweep.recipe.name,
            "task": sweep.recipe.prompts.task,
            "parameters": [{"name": axis.name, "key": axis.key, "values": axis.values} for axis in sweep.axes],
            "seeds": sweep.seeds,
            "protocol": found.protocol,
            "reward_measure": found.reward,
            "deciding_measure": found.measure,
            "best": best,
            "summary": found.summary(),
            "notes": sweep.notes,
            "settings": [
                {
                    "label": label,
                    "values": found.of(label)[0].cell.values,
                    "deciding": _json(deciding[label]),
                    **{name: _json(values[label]) for name, values in figures.items()},
                }
                for label in sweep.labels
            ],
            "cells": [_cell(each) for each in found.cells],
            "pictures": {
                "prompts": [prompt.to_json() for prompt in images.prompts],
                "rows": [
                    {"label": row.label, "about": row.about, "files": [str(f.relative_to(folder)) for f in row.files]}
                    for row in images.rows
                ],
            },
        }
    )


def _cell(each: CellResult) -> dict[str, Any]:
    chosen = {
        "final": each.chosen.final,
        "peak_reward": each.chosen.peak_reward,
        "peak": each.chosen.peak,
    }
    last, peak = each.verdicts
    return {
        "label": each.cell.label,
        "values": each.cell.values,
        "seed": each.cell.seed,
        "run": each.run.name,
        "state": each.outcome.state,
        "reason": each.outcome.reason,
        "figures": dict(each.values),
        "steps": {name: None if point is None else point["step"] for name, point in chosen.items()},
        "verdict_final": last,
        "verdict_peak": peak,
        "kept_step": kept_step(each),
        "seconds": each.seconds,
        "points": [dict(point) for point in each.points],
    }


def _json(value: Any) -> dict[str, Any] | None:
    return None if value is None else asdict(value)


def csv_table(found: Ablation) -> bytes:
    """One line per cell and evaluation point; a cell without points has one line. What is missing is empty."""
    headline = open_reward(found.sweep.recipe).measures[0].name
    numbers = dict.fromkeys(("reward", "low", "high", headline, *_POINT))
    table: list[list[Any]] = [[*(axis.key for axis in found.sweep.axes), "seed", "run", "state", "step", *numbers]]
    for each in found.cells:
        values = [value if isinstance(value, str) else json.dumps(value) for value in each.cell.values]
        head = [*values, each.cell.seed, each.run.name, each.outcome.state]
        for point in each.points or ({},):
            table.append([*head, point.get("step"), *(point.get(name) for name in numbers)])
    return csv_bytes(table)
