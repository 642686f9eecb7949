"""Pictures of numbers as SVG text that goes straight into a page: same numbers, same bytes.

The colours are Okabe and Ito's, which colour-blind people tell apart; every line has its own dashes or markers as well.
"""

from __future__ import annotations

import html
import io
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import matplotlib.style
from matplotlib.axes import Axes
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from gdro_cli.core.sweeps import CurvePoint, Spread

Row = Mapping[str, Any]

WIDTH = 4.6
"""Inches; shown as wide as a phone, text of 9 points is then about 10 pixels high."""
PANEL = 1.75
"""Inches of height per panel."""
BINS = 120
"""Points of a training curve; more steps than that are averaged."""
BLUE, RED, GREEN, PURPLE, ORANGE, SKY, BLACK = (
    "#0072B2", "#D55E00", "#009E73", "#AA4499", "#B87800", "#2A8CC4", "#1A1A1A"
)  # fmt: skip
"""Okabe and Ito's, with purple, orange and sky blue darkened to be seen on white."""
GREY = "#777777"
STYLES = (
    (BLUE, "o", "-"),
    (RED, "s", "--"),
    (GREEN, "^", "-."),
    (PURPLE, "D", ":"),
    (ORANGE, "v", "-"),
    (SKY, "P", "--"),
    (BLACK, "X", "-."),
)
"""Colour, marker and dashes of the first, second, ... run."""
_SETTINGS: dict[Any, Any] = {
    "svg.fonttype": "none",  # text stays text: it can be read aloud, searched and selected
    "text.parse_math": False,  # the name of a run may hold a dollar sign
    "font.family": ["sans-serif"],
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": "#999999",
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#E4E4E4",
    "grid.linewidth": 0.7,
    "lines.linewidth": 1.6,
    "lines.markersize": 4.5,
    "legend.frameon": False,
    "legend.fontsize": 8.5,
}
# Names of groups that nothing refers to, and that every picture of the page would share.
_UNUSED_IDS = re.compile(r' id="[A-Za-z0-9.]+_\d+"')


@dataclass(frozen=True, slots=True)
class Series:
    """The evaluation points of one run."""

    name: str
    rows: tuple[Row, ...]


def validation_chart(rows: Sequence[Row], *, headline: str = "reward", marked: int | None = None) -> str | None:
    """Reward (with its interval) and corrected score over steps; None without evaluation points.

    Args:
        rows: the validation rows of one protocol.
        headline: the task's headline measure, drawn beside the reward where it is another.
        marked: a step to mark, that of the evaluated weights.
    """
    if not _points(rows, "reward"):
        return None

    def reward(axes: Axes) -> None:
        banded = [row for row in rows if None not in (row.get("reward"), row.get("low"), row.get("high"))]
        steps = [row["step"] for row in banded]
        lows, highs = [row["low"] for row in banded], [row["high"] for row in banded]
        axes.fill_between(steps, lows, highs, color=BLUE, alpha=0.18, linewidth=0, label="95 % interval")
        _line(axes, rows, "reward", style=STYLES[0])
        if headline != "reward" and _points(rows, headline):
            _line(axes, rows, headline, style=STYLES[2])
        axes.set_ylabel("validation reward")
        axes.legend()

    def corrected(axes: Axes) -> None:
        _line(axes, rows, "corrected", style=STYLES[1])
        axes.set_ylabel("corrected score")

    panels = [reward, *([corrected] if _points(rows, "corrected") else [])]
    return _stacked("validation", panels, label="Validation reward and corrected score over steps", marked=marked)


def axes_chart(rows: Sequence[Row], *, marked: int | None = None) -> str | None:
    """The judge's axes and u over steps; None where nothing was judged."""
    names = [name for name in ("u", "alignment", "coherence", "style") if _points(rows, name)]
    if not names:
        return None

    def quality(axes: Axes) -> None:
        styles = {"u": STYLES[6], "alignment": STYLES[0], "coherence": STYLES[2], "style": STYLES[1]}
        for name in names:
            _line(axes, rows, name, style=styles[name])
        axes.set_ylabel("judge's scale, 1 to 5")
        axes.legend(ncols=2)

    return _stacked("axes", [quality], label="Quality axes and u over steps", marked=marked)


def order_chart(rows: Sequence[Row], *, marked: int | None = None) -> str | None:
    """Implicit order accuracy over the steps of a training; None without training rows."""
    if not _points(rows, "implicit_accuracy"):
        return None

    def accuracy(axes: Axes) -> None:
        _binned(axes, rows, "implicit_accuracy", style=STYLES[0], label="")
        axes.axhline(0.5, color=GREY, linewidth=1, linestyle=":")
        axes.set_ylabel("order accuracy")

    return _stacked("order", [accuracy], label="Implicit order accuracy over steps", marked=marked)


def gap_chart(rows: Sequence[Row], *, marked: int | None = None) -> str | None:
    """Errors on the best and the worst image minus the reference's, over steps; None without training rows."""
    names = {"top1_error_gap": "best image", "bottom1_error_gap": "worst image"}
    if not any(_points(rows, name) for name in names):
        return None

    def gaps(axes: Axes) -> None:
        for (name, label), style in zip(names.items(), (STYLES[0], STYLES[1]), strict=True):
            _binned(axes, rows, name, style=style, label=label)
        axes.axhline(0, color=GREY, linewidth=1, linestyle=":")
        axes.set_ylabel("error minus reference")
        axes.legend()

    return _stacked("gaps", [gaps], label="Error minus the reference's error over steps", marked=marked)


def rounds_chart(rows: Sequence[Row], *, marked: int | None = None) -> str | None:
    """Rewards of the rounds of an online training, and how many ratios were clipped; None for an offline one."""
    if not _points(rows, "clip_fraction"):
        return None

    def rewards(axes: Axes) -> None:
        _binned(axes, rows, "reward", style=STYLES[0], label="mean")
        _binned(axes, rows, "reward_group_std", style=STYLES[1], label="deviation in a group")
        axes.set_ylabel("reward of the rounds")
        axes.legend()

    def clipped(axes: Axes) -> None:
        _binned(axes, rows, "clip_fraction", style=STYLES[2], label="")
        axes.set_ylabel("clipped ratios")

    return _stacked(
        "rounds", [rewards, clipped], label="Rewards of the rounds and share of clipped ratios", marked=marked
    )


def runs_chart(runs: Sequence[Series], *, level: float | None = None) -> str | None:
    """Reward and corrected score of several runs over steps; ``level`` marks a reward."""
    if not any(_points(run.rows, "reward") for run in runs):
        return None

    def panel(name: str, label: str, *, legend: bool) -> Callable[[Axes], None]:
        def draw(axes: Axes) -> None:
            for number, run in enumerate(runs):
                _line(axes, run.rows, name, style=_style(number), label=run.name)
            axes.set_ylabel(label)
            if name == "reward" and level is not None:
                axes.axhline(level, color=GREY, linewidth=1, linestyle=":")
            if legend:
                axes.legend()

        return draw

    panels = [panel("reward", "validation reward", legend=True)]
    if any(_points(run.rows, "corrected") for run in runs):
        panels.append(panel("corrected", "corrected score", legend=False))
    return _stacked("runs", panels, label="Validation reward and corrected score of the runs over steps")


def tradeoff_chart(runs: Sequence[Series], *, level: float | None = None) -> str | None:
    """Corrected score against reward, a line per run through its evaluation points; ``level`` marks a reward."""
    if not any(_pairs(run.rows) for run in runs):
        return None

    def draw(axes: Axes) -> None:
        for number, run in enumerate(runs):
            points = _pairs(run.rows)
            if points:
                colour, marker, dashes = _style(number)
                x, y = zip(*points, strict=True)
                axes.plot(x, y, color=colour, marker=marker, linestyle=dashes, label=run.name, alpha=0.9)
        if level is not None:
            axes.axvline(level, color=GREY, linewidth=1, linestyle=":")
        axes.set_xlabel("validation reward")
        axes.set_ylabel("corrected score")
        axes.legend()

    return _stacked("tradeoff", [draw], label="Corrected score against reward", height=1.6 * PANEL, across=None)


def sweep_chart(curves: Mapping[str, Mapping[str, Sequence[CurvePoint]]], panels: Mapping[str, str]) -> str | None:
    """A panel per measure, in it a line per setting, with a band from the lowest to the highest of several seeds.

    Args:
        curves: by measure and setting.
        panels: the measures in their order, each with the text at its axis.
    """
    if not any(points for settings in curves.values() for points in settings.values()):
        return None
    drawn = [
        _banded(
            {
                name: [Banded(point.step, point.over_seeds) for point in points]
                for name, points in curves[measure].items()
            },
            label,
            legend=place == 0,
        )
        for place, (measure, label) in enumerate(panels.items())
    ]
    return _stacked("sweep", drawn, label=f"{', '.join(panels.values())} over steps, a line per setting")


def time_chart(curves: Mapping[str, Mapping[str, Sequence[Banded]]], *, level: float | None = None) -> str | None:
    """Reward and corrected score against minutes, a line per method; ``level`` marks a reward.

    Args:
        curves: by method and measure, ``reward`` and ``corrected``; points against minutes.
        level: the matched reward.
    """
    labels = {"reward": "validation reward", "corrected": "corrected score"}
    there = [measure for measure in labels if any(own.get(measure) for own in curves.values())]
    if not there:
        return None
    drawn = [
        _banded(
            {name: own.get(measure, ()) for name, own in curves.items()},
            labels[measure],
            legend=place == 0,
            level=level if measure == "reward" else None,
        )
        for place, measure in enumerate(there)
    ]
    label = "Validation reward and corrected score against time, a line per method"
    return _stacked("time", drawn, label=label, across="minutes")


@dataclass(frozen=True, slots=True)
class Banded:
    """A measure at one place of the horizontal axis."""

    at: float
    over_seeds: Spread


def _banded(
    lines: Mapping[str, Sequence[Banded]], label: str, *, legend: bool, level: float | None = None
) -> Callable[[Axes], None]:
    """A panel of lines with bands from the lowest to the highest of several seeds."""

    def draw(axes: Axes) -> None:
        for number, (name, points) in enumerate(lines.items()):
            colour, marker, dashes = _style(number)
            x = [point.at for point in points]
            if any(point.over_seeds.seeds > 1 for point in points):
                lows, highs = [point.over_seeds.low for point in points], [point.over_seeds.high for point in points]
                axes.fill_between(x, lows, highs, color=colour, alpha=0.15, linewidth=0)
            means = [point.over_seeds.mean for point in points]
            axes.plot(x, means, color=colour, marker=marker, linestyle=dashes, label=name)
        axes.set_ylabel(label)
        if level is not None:
            axes.axhline(level, color=GREY, linewidth=1, linestyle=":")
        if legend:
            axes.legend(ncols=2)

    return draw


def _style(number: int) -> tuple[str, str, str]:
    """Of the ``number``-th run; where the colours begin anew, the markers and dashes go on by one."""
    turn, place = divmod(number, len(STYLES))
    _, marker, dashes = STYLES[(place + turn) % len(STYLES)]
    return STYLES[place][0], marker, dashes


def _points(rows: Sequence[Row], name: str) -> list[tuple[int, float]]:
    return [(row["step"], float(row[name])) for row in rows if row.get(name) is not None]


def _pairs(rows: Sequence[Row]) -> list[tuple[float, float]]:
    kept = (row for row in rows if row.get("reward") is not None and row.get("corrected") is not None)
    return [(float(row["reward"]), float(row["corrected"])) for row in kept]


def _line(axes: Axes, rows: Sequence[Row], name: str, *, style: tuple[str, str, str], label: str | None = None) -> None:
    points = _points(rows, name)
    if points:
        colour, marker, dashes = style
        x, y = zip(*points, strict=True)
        axes.plot(x, y, color=colour, marker=marker, linestyle=dashes, label=label or name)


def _binned(axes: Axes, rows: Sequence[Row], name: str, *, style: tuple[str, str, str], label: str) -> None:
    """Mean per bin of steps as a line, lowest to highest as a band."""
    points = _points(rows, name)
    size = -(-len(points) // BINS) or 1
    parts = [points[start : start + size] for start in range(0, len(points), size)]
    bins = [tuple(zip(*part, strict=True)) for part in parts]
    steps = [sum(x) / len(x) for x, _ in bins]
    colour, _, dashes = style
    if size > 1:
        lows, highs = [min(y) for _, y in bins], [max(y) for _, y in bins]
        axes.fill_between(steps, lows, highs, color=colour, alpha=0.15, linewidth=0)
    axes.plot(steps, [sum(y) / len(y) for _, y in bins], color=colour, linestyle=dashes, label=label)


def _stacked(
    name: str,
    panels: Sequence[Callable[[Axes], None]],
    *,
    label: str,
    marked: int | None = None,
    height: float = PANEL,
    across: str | None = "step",
) -> str:
    """Draw panels above each other, with one horizontal axis, and return the SVG element; ``across`` names the axis."""
    with matplotlib.style.context(
        ["default", {**_SETTINGS, "svg.hashsalt": f"gdro {name}"}]
    ):  # not the user's own settings
        figure = Figure(figsize=(WIDTH, height * len(panels) + 0.35), layout="constrained")
        FigureCanvasSVG(figure)
        grid = figure.subplots(len(panels), 1, sharex=True, squeeze=False)
        for (axes,), draw in zip(grid, panels, strict=True):
            draw(axes)
            axes.yaxis.set_major_locator(MaxNLocator(5))
            if marked is not None:
                axes.axvline(marked, color=GREY, linewidth=1, linestyle="--")
        if across is not None:
            grid[-1][0].set_xlabel(across)
            grid[-1][0].xaxis.set_major_locator(MaxNLocator(6, integer=across == "step"))
        text = io.StringIO()
        figure.savefig(text, format="svg", metadata={"Date": None, "Creator": None, "Format": None, "Type": None})
    return _element(text.getvalue(), label)


def _element(document: str, label: str) -> str:
    """The ``<svg>`` of an SVG document, named for those who cannot see it."""
    element = _UNUSED_IDS.sub("", document[document.index("<svg") :]).strip()
    return element.replace("<svg ", f'<svg role="img" aria-label="{html.escape(label)}" ', 1)
