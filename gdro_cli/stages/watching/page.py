"""The page of a run: what its files say at this moment. It changes nothing in the run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from statistics import fmean
from typing import Any, Literal

from gdro_cli.errors import StoreError
from gdro_cli.runtime.lock import is_held
from gdro_cli.runtime.metrics import MetricsRow, TrainRow, ValidationRow, train_rows, validation_rows
from gdro_cli.runtime.progress import clock_time
from gdro_cli.runtime.run import RunFolder
from gdro_cli.stages.reporting.evaluation_report import DIAGNOSTICS, WINDOW
from gdro_cli.stages.reporting.html import render
from gdro_cli.stages.reporting.image_sheet import point_sheet
from gdro_cli.stages.reporting.number_format import number, signed
from gdro_cli.stages.runs.weights import ADAPTER_NOTE, STOPPED, early_end

State = Literal["not begun", "training", "stopped", "collapsed", "finished"]

_BEGUN = "manifest.json"
_FILES = (_BEGUN, "metrics.jsonl", "lock.owner", STOPPED, ADAPTER_NOTE)
"""What the page depends on, beside whether the training process lives."""


@dataclass(frozen=True, slots=True)
class Progress:
    """How far a training is."""

    state: State
    step: int = 0
    steps: int | None = None
    """All of them; None where the run does not say."""
    left: str | None = None
    """Time, as ``m:ss``; None where it is not known."""
    written: str | None = None
    """When the last row was written, as ``hh:mm:ss``."""


def fingerprint(run: Path) -> tuple[Any, ...]:
    """What changes whenever the page does."""
    return (is_held(run / "lock"), *(_stat(run / name) for name in _FILES))


def draw_page(run: Path) -> bytes:
    """The page of the run in a folder, or of one that is not there yet. A damaged file is a sentence on the page."""
    recipe: Mapping[str, Any] = {}
    rows: Sequence[MetricsRow] = ()
    problem, reasons, progress = None, [], Progress("not begun")
    try:
        if (run / _BEGUN).is_file():
            folder = RunFolder(run)
            recipe, rows = folder.recipe, folder.metrics()
            progress = _progress(folder, rows)
            if progress.state == "collapsed":
                reasons = [str(reason) for reason in folder.read_object(STOPPED).get("reasons", ())]
    except StoreError as error:
        problem = str(error)
    steps, points = train_rows(rows), _latest_points(rows)
    return render(
        "watch.html.j2",
        name=run.resolve().name,
        recipe=recipe.get("name"),
        method=(recipe.get("method") or {}).get("name"),
        progress=progress,
        begun=progress.state != "not begun",
        problem=problem,
        points=points,
        last=points[-1] if points else None,
        reasons=reasons,
        table=_table(points),
        sheet=_sheet(run, points),
        curves=_curves(steps, points),
        numbers=_numbers(steps),
    )


def seconds_left(rows: Sequence[MetricsRow], steps: int) -> float | None:
    """By the mean of the newest steps, with what evaluation points have taken per step so far; None before a step."""
    taken = [row.seconds for row in train_rows(rows)[-WINDOW:] if row.seconds is not None]
    if not taken:
        return None
    points = [row for row in validation_rows(rows) if row.step]
    measuring = sum(row.seconds or 0.0 for row in points) / points[-1].step if points else 0.0
    return (steps - rows[-1].step) * (fmean(taken) + measuring)


def _progress(folder: RunFolder, rows: Sequence[MetricsRow]) -> Progress:
    run, step = folder.path, rows[-1].step if rows else 0
    total = (folder.recipe.get("train") or {}).get("steps")
    steps = total if isinstance(total, int) and total > 0 else None
    state: State
    if early_end(run) is not None:
        state = "collapsed"
    elif (run / ADAPTER_NOTE).is_file():
        state = "finished"
    elif is_held(run / "lock"):
        state = "training"
    else:
        state = "stopped" if rows else "not begun"
    left = seconds_left(rows, steps) if state == "training" and steps is not None else None
    stat = _stat(folder.metrics_path) if rows else None
    return Progress(
        state=state,
        step=step,
        steps=steps,
        left=None if left is None else clock_time(left),
        written=None if stat is None else f"{datetime.fromtimestamp(stat[0] / 1e9):%H:%M:%S}",
    )


def _latest_points(rows: Sequence[MetricsRow]) -> list[ValidationRow]:
    """The evaluation points that can be compared with the last one."""
    points = validation_rows(rows)
    return [row for row in points if row.protocol == points[-1].protocol]


def _headline(points: Sequence[ValidationRow]) -> str:
    """The reward's headline measure: the one number of a point that is not declared."""
    return next(iter(points[-1].model_extra or ()), "reward") if points else "reward"


def _table(points: Sequence[ValidationRow]) -> tuple[list[str], list[list[str]]]:
    """The first and the last point, a row each."""
    headline = _headline(points)
    names = ["reward", *([] if headline == "reward" else [headline]), "u", "corrected"]
    ends = points if len(points) < 2 else (points[0], points[-1])
    rows = [
        [f"step {row.step}", *(number(row.get(name)) for name in names), str(row.images), row.verdict or "-"]
        for row in ends
    ]
    return ["", *names, "images", "verdict"], rows


def _sheet(run: Path, points: Sequence[ValidationRow]) -> tuple[str, int] | None:
    """The newest sheet of an evaluation point, with its step."""
    found = ((point_sheet(run, row.step), row.step) for row in reversed(points))
    return next(((sheet, step) for sheet, step in found if sheet is not None), None)


def _curves(steps: Sequence[TrainRow], points: Sequence[ValidationRow]) -> dict[str, str | None]:
    from gdro_cli.stages.reporting import charts  # loads matplotlib, which a training needs only for this page

    return {
        "loss": charts.loss_chart(steps),
        "validation": charts.validation_chart(points, headline=_headline(points)),
        "axes": charts.axes_chart(points),
        "order": charts.order_chart(steps),
        "gaps": charts.gap_chart(steps),
        "rounds": charts.rounds_chart(steps),
    }


def _numbers(steps: Sequence[TrainRow]) -> list[tuple[str, str, str]]:
    """Name, value and meaning of the last step's numbers."""
    values = [(name, steps[-1].get(name), meaning) for name, meaning in DIAGNOSTICS.items()] if steps else []
    return [
        (name, (signed if name.endswith("_gap") else number)(value), meaning)
        for name, value, meaning in values
        if value is not None
    ]


def _stat(path: Path) -> tuple[int, int] | None:
    """When a file was written, in nanoseconds, and its size in bytes; None where it is missing."""
    try:
        stat = path.stat()
    except OSError:
        return None
    return stat.st_mtime_ns, stat.st_size
