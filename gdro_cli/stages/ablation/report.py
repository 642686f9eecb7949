"""An ablation as a page, as JSON and as a table of its evaluation points."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from gdro_cli.config.sweep import value_text
from gdro_cli.core.sweeps import Spread
from gdro_cli.files import json_bytes, write_bytes
from gdro_cli.runtime.metrics import ValidationRow
from gdro_cli.stages.ablation.images import Images
from gdro_cli.stages.ablation.result import FIGURES, Ablation, CellResult, kept_step
from gdro_cli.stages.reporting import charts
from gdro_cli.stages.reporting.csv_table import csv_bytes
from gdro_cli.stages.reporting.html import data_uri, flat, render
from gdro_cli.stages.reporting.number_format import MISSING, number
from gdro_cli.stages.setup.reward import open_reward

ABLATION_KIND = "gdro ablation"
ABLATION_SCHEMA = 2
_POINT = ("u", "corrected", "verdict", "prompts", "images", "failed", "unjudged")
"""Columns of the table beside the reward."""


def write_files(ablation: Ablation, images: Images, folder: Path) -> tuple[Path, ...]:
    """Write report.html, ablation.json and ablation.csv; returns their paths. Raises StoreError."""
    contents = {
        "report.html": page(ablation, images),
        "ablation.json": json_document(ablation, images, folder),
        "ablation.csv": csv_table(ablation),
    }
    for name, data in contents.items():
        write_bytes(folder / name, data)
    return tuple(folder / name for name in contents)


def page(ablation: Ablation, images: Images) -> bytes:
    """The ablation as one HTML file that needs nothing else."""
    panels = {ablation.reward: f"validation {ablation.reward}"}
    if ablation.judged:
        panels |= {"corrected": "corrected score", "u": "u (1 to 5)"}
    elif ablation.measure != ablation.reward:
        panels |= {ablation.measure: f"validation {ablation.measure}"}
    return render(
        "ablation.html.j2",
        ablation=ablation,
        sweep=ablation.sweep,
        summary=ablation.summary(),
        chart=charts.sweep_chart({name: ablation.curves(name) for name in panels}, panels),
        point=next((point for result in ablation.cells for point in result.points), None),
        grid=_grid(ablation),
        prompts=images.prompts,
        image_rows=[(row, [data_uri(file) for file in row.files]) for row in images.rows],
        recipe=list(flat(ablation.sweep.recipe.resolved())),
    )


def _grid(ablation: Ablation) -> dict[str, Any] | None:
    """The deciding measure by the values of two keys."""
    if len(ablation.sweep.axes) != 2:
        return None
    rows, columns = ablation.sweep.axes
    labels = {result.cell.values: result.cell.label for result in ablation.cells}
    deciding = ablation.deciding()

    def cell(row: Any, column: Any) -> str:
        over_seeds = deciding[labels[row, column]]
        return MISSING if over_seeds is None else number(over_seeds.mean)

    return {
        "rows": rows.name,
        "columns": columns.name,
        "heads": [value_text(value) for value in columns.values],
        "lines": [(value_text(row), [cell(row, column) for column in columns.values]) for row in rows.values],
    }


def json_document(ablation: Ablation, images: Images, folder: Path) -> bytes:
    """The ablation as JSON; docs/ablations.md explains its keys."""
    sweep = ablation.sweep
    figures = {"deciding": ablation.deciding()} | {name: ablation.over_seeds(name) for name in FIGURES}
    return json_bytes(
        {
            "kind": ABLATION_KIND,
            "schema": ABLATION_SCHEMA,
            "recipe": sweep.recipe.name,
            "task": sweep.recipe.reward.kind,
            "parameters": [{"name": axis.name, "key": axis.key, "values": axis.values} for axis in sweep.axes],
            "fixed": {each.path: {"value": each.after, "recipe": each.before} for each in sweep.fixed},
            "seeds": sweep.seeds,
            "protocol": ablation.protocol,
            "reward_measure": ablation.reward,
            "deciding_measure": ablation.measure,
            "best": ablation.best(),
            "summary": ablation.summary(),
            "notes": sweep.notes,
            "settings": [
                {
                    "label": label,
                    "values": ablation.of(label)[0].cell.values,
                    **{name: _json(over_seeds[label]) for name, over_seeds in figures.items()},
                }
                for label in sweep.labels
            ],
            "cells": [_cell(result) for result in ablation.cells],
            "images": {
                "prompts": [prompt.to_json() for prompt in images.prompts],
                "rows": [
                    {"label": row.label, "about": row.about, "files": [str(f.relative_to(folder)) for f in row.files]}
                    for row in images.rows
                ],
            },
        }
    )


def _json(over_seeds: Spread | None) -> dict[str, Any] | None:
    return None if over_seeds is None else asdict(over_seeds)


def _cell(result: CellResult) -> dict[str, Any]:
    last, peak = result.verdicts
    return {
        "label": result.cell.label,
        "values": result.cell.values,
        "seed": result.cell.seed,
        "run": result.run.name,
        "state": result.outcome.state,
        "reason": result.outcome.reason,
        "figures": dict(result.values),
        "steps": {
            name: None if (point := getattr(result.chosen, name)) is None else point["step"]
            for name in ("final", "peak_reward", "peak")
        },
        "verdict_final": last,
        "verdict_peak": peak,
        "kept_step": kept_step(result),
        "seconds": result.seconds,
        "points": [point.to_json() for point in result.points],
    }


def csv_table(ablation: Ablation) -> bytes:
    """One line per cell and evaluation point; a cell without points has one line. Missing values are empty."""
    headline = open_reward(ablation.sweep.recipe).measures[0].name
    names = dict.fromkeys(("step", "reward", "low", "high", headline, *_POINT))
    table: list[list[Any]] = [[*(axis.key for axis in ablation.sweep.axes), "seed", "run", "state", *names]]
    for result in ablation.cells:
        values = [value if isinstance(value, str) else json.dumps(value) for value in result.cell.values]
        head = [*values, result.cell.seed, result.run.name, result.outcome.state]
        points: Sequence[ValidationRow | None] = result.points or (None,)
        table += [[*head, *(None if point is None else point.get(name) for name in names)] for point in points]
    return csv_bytes(table)
