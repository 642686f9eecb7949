"""Charts as SVG text that goes straight into a page: same numbers, same bytes.

The colours are Okabe and Ito's, which colour-blind people can distinguish. Every line also has its own dashes or
markers.
"""

from __future__ import annotations

import html
import io
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from statistics import fmean
from typing import Any

import matplotlib.style
from matplotlib.axes import Axes
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from gdro_cli.core.sweeps import CurvePoint, Spread
from gdro_cli.runtime.metrics import MetricsRow, TrainRow, ValidationRow

Style = tuple[str, str, str]
"""Colour, marker and dashes."""
Runs = Mapping[str, Sequence[ValidationRow]]
"""The evaluation points of runs, by the runs' names."""

WIDTH = 4.6
"""Inches. On a page as wide as a phone, text of 9 points is about 10 pixels high."""
PANEL = 1.75
"""Inches of height per panel."""
BINS = 120
"""Points of a training curve; more steps than that are averaged."""
MANY = 6
"""Lines whose legend still has room in their panel."""
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
"""Those of the first, second, ... run."""
_SETTINGS: dict[Any, Any] = {
    "svg.fonttype": "none",  # text stays text: it can be read aloud, searched and selected
    "text.parse_math": False,  # the name of a run may have a dollar sign
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
# Names of groups that nothing refers to, and that every chart of the page would share.
_UNUSED_IDS = re.compile(r' id="[A-Za-z0-9.]+_\d+"')


@dataclass(frozen=True, slots=True)
class Banded:
    """A measure over seeds at one place of the horizontal axis."""

    at: float
    over_seeds: Spread


@dataclass(frozen=True, slots=True)
class _Line:
    """A line of a panel; with ``low`` and ``high`` also a band."""

    x: Sequence[float]
    y: Sequence[float]
    style: Style
    label: str
    low: Sequence[float] = ()
    high: Sequence[float] = ()
    band_label: str | None = None
    marked: bool = True
    """Whether each point has a marker."""

    def draw(self, axes: Axes) -> None:
        """Draw band and line."""
        colour, marker, dashes = self.style
        if self.low:
            axes.fill_between(self.x, self.low, self.high, color=colour, alpha=0.16, linewidth=0, label=self.band_label)
        axes.plot(
            self.x, self.y, color=colour, marker=marker if self.marked else "", linestyle=dashes, label=self.label
        )


Panel = Callable[[Axes], None]


def validation_chart(
    rows: Sequence[ValidationRow], *, headline: str = "reward", marked: int | None = None
) -> str | None:
    """Reward (with its interval) and corrected score over steps; None without evaluation points.

    Args:
        rows: the evaluation points of one protocol.
        headline: the task's headline measure, drawn beside the reward where it is another.
        marked: a step to mark, that of the evaluated weights.
    """
    low, high = [row.low for row in rows], [row.high for row in rows]
    reward = replace(_line(rows, "reward", STYLES[0]), low=low, high=high, band_label="95 % interval")
    others = [_line(rows, headline, STYLES[2])] if headline != "reward" else []
    corrected = _line(rows, "corrected", STYLES[1])
    panels = [_panel([reward, *others], "validation reward", legend=1), _panel([corrected], "corrected score")]
    return _stacked("validation", panels, label="Validation reward and corrected score over steps", marked=marked)


def axes_chart(rows: Sequence[ValidationRow], *, marked: int | None = None) -> str | None:
    """The judge's axes and u over steps; None where nothing was judged."""
    styles = {"u": STYLES[6], "alignment": STYLES[0], "coherence": STYLES[2], "style": STYLES[1]}
    lines = [_line(rows, name, style) for name, style in styles.items()]
    panel = _panel(lines, "judge's scale, 1 to 5", legend=2)
    return _stacked("axes", [panel], label="Quality axes and u over steps", marked=marked)


def loss_chart(rows: Sequence[TrainRow]) -> str | None:
    """The loss above its floor, which is what remains to be learnt; the loss itself for methods without a floor."""
    if any(row.loss_floor is not None for row in rows):
        panel = _panel([_binned(rows, "loss_method", STYLES[0], minus="loss_floor")], "loss above its floor")
    else:
        panel = _panel([_binned(rows, "loss", STYLES[0])], "loss")
    return _stacked("loss", [panel], label="Training loss over steps")


def order_chart(rows: Sequence[TrainRow], *, marked: int | None = None) -> str | None:
    """Implicit order accuracy over the steps of a training; None without it."""
    panel = _panel([_binned(rows, "implicit_accuracy", STYLES[0])], "order accuracy", level=0.5)
    return _stacked("order", [panel], label="Implicit order accuracy over steps", marked=marked)


def gap_chart(rows: Sequence[TrainRow], *, marked: int | None = None) -> str | None:
    """Errors on the best and the worst image minus the reference's, over steps; None without them."""
    lines = [
        _binned(rows, "top1_error_gap", STYLES[0], "best image"),
        _binned(rows, "bottom1_error_gap", STYLES[1], "worst image"),
    ]
    panel = _panel(lines, "error minus reference", level=0, legend=1)
    return _stacked("gaps", [panel], label="Error minus the reference's error over steps", marked=marked)


def rounds_chart(rows: Sequence[TrainRow], *, marked: int | None = None) -> str | None:
    """Rewards of the rounds of an online training, and how many ratios were clipped; None for an offline one."""
    clipped = [_binned(rows, "clip_fraction", STYLES[2])]
    rewards = [
        _binned(rows, "reward", STYLES[0], "mean"),
        _binned(rows, "reward_group_std", STYLES[1], "deviation in a group"),
    ]
    panels = [_panel(rewards, "reward of the rounds", legend=1), _panel(clipped, "clipped ratios")]
    return _stacked("rounds", panels, label="Rewards of the rounds and share of clipped ratios", marked=marked)


def runs_chart(runs: Runs, *, level: float | None = None) -> str | None:
    """Reward and corrected score of several runs over steps; ``level`` marks a reward."""
    rewards, corrected = (
        [_line(rows, measure, _style(number), name) for number, (name, rows) in enumerate(runs.items())]
        for measure in ("reward", "corrected")
    )
    panels = [_panel(rewards, "validation reward", level=level, legend=1), _panel(corrected, "corrected score")]
    return _stacked("runs", panels, label="Validation reward and corrected score of the runs over steps")


def tradeoff_chart(runs: Runs, *, level: float | None = None) -> str | None:
    """Corrected score against reward, a line per run through its evaluation points; ``level`` marks a reward."""
    lines = []
    for number, (name, rows) in enumerate(runs.items()):
        judged = [row for row in rows if row.corrected is not None]
        x, y = [row.reward for row in judged], [row["corrected"] for row in judged]
        lines.append(_Line(x, y, _style(number), name))
    panel = _panel(lines, "corrected score", legend=1)
    label = "Corrected score against reward"
    return _stacked("tradeoff", [panel], label=label, height=1.6 * PANEL, across="validation reward", level=level)


def sweep_chart(curves: Mapping[str, Mapping[str, Sequence[CurvePoint]]], panels: Mapping[str, str]) -> str | None:
    """A panel per measure, in it a line per setting, with a band from the lowest to the highest of several seeds.

    Args:
        curves: by measure and setting.
        panels: the measures in their order, each with the text at its axis.
    """
    drawn = []
    for number, (measure, label) in enumerate(panels.items()):
        points = {
            name: [Banded(point.step, point.over_seeds) for point in own] for name, own in curves[measure].items()
        }
        drawn.append(_panel(_banded(points), label, legend=0 if number else 2))
    return _stacked("sweep", drawn, label=f"{', '.join(panels.values())} over steps, a line per setting")


def time_chart(curves: Mapping[str, Mapping[str, Sequence[Banded]]], *, level: float | None = None) -> str | None:
    """Reward and corrected score against minutes, a line per method; ``level`` marks a reward.

    Args:
        curves: by method and measure, ``reward`` and ``corrected``; points against minutes.
        level: the matched reward.
    """
    rewards, corrected = (
        _banded({name: own.get(measure, ()) for name, own in curves.items()}) for measure in ("reward", "corrected")
    )
    panels = [
        _panel(rewards, "validation reward", level=level, legend=2),
        _panel(corrected, "corrected score", legend=0 if any(line.x for line in rewards) else 2),
    ]
    label = "Validation reward and corrected score against time, a line per method"
    height = PANEL if len(curves) <= MANY else 1.3 * PANEL
    return _stacked("time", panels, label=label, across="minutes", height=height)


# -- lines and panels -------------------------------------------------------------------------------------------------


def _points(rows: Iterable[MetricsRow], name: str, minus: str | None = None) -> list[tuple[int, float]]:
    """Steps with the values of one name, less those of another."""
    points = []
    for row in rows:
        value, less = row.get(name), 0.0 if minus is None else row.get(minus)
        if value is not None and less is not None:
            points.append((row.step, value - less))
    return points


def _line(rows: Iterable[MetricsRow], name: str, style: Style, label: str | None = None) -> _Line:
    """The values of one name over steps."""
    points = _points(rows, name)
    return _Line([x for x, _ in points], [y for _, y in points], style, label or name)


def _binned(rows: Iterable[MetricsRow], name: str, style: Style, label: str = "", *, minus: str | None = None) -> _Line:
    """Mean per bin of steps as a line, lowest to highest as a band."""
    points = _points(rows, name, minus)
    size = -(-len(points) // BINS) or 1
    bins = [tuple(zip(*points[start : start + size], strict=True)) for start in range(0, len(points), size)]
    x, y = ([fmean(values) for values in column] for column in zip(*bins, strict=True)) if bins else ([], [])
    low, high = ([end(values) for _, values in bins] if size > 1 else [] for end in (min, max))
    return _Line(x, y, style, label, low, high, marked=False)


def _banded(curves: Mapping[str, Sequence[Banded]]) -> list[_Line]:
    """A line per curve, with a band where there are several seeds."""
    lines = []
    for number, (name, points) in enumerate(curves.items()):
        spreads = [point.over_seeds for point in points]
        several = any(spread.seeds > 1 for spread in spreads)
        low, high = ([getattr(spread, end) for spread in spreads] if several else [] for end in ("low", "high"))
        x, y = [point.at for point in points], [spread.mean for spread in spreads]
        lines.append(_Line(x, y, _style(number), name, low, high))
    return lines


def _style(number: int) -> Style:
    """The style of the ``number``-th run; where the colours repeat, markers and dashes are shifted by one."""
    turn, place = divmod(number, len(STYLES))
    _, marker, dashes = STYLES[(place + turn) % len(STYLES)]
    return STYLES[place][0], marker, dashes


def _panel(lines: Sequence[_Line], label: str, *, legend: int = 0, level: float | None = None) -> Panel | None:
    """A panel of lines, None if none has points.

    ``legend`` has so many columns. One of more than ``MANY`` lines is above the panel, and one of more than twice as
    many is left out. ``level`` is a dotted horizontal.
    """
    drawn = [line for line in lines if line.x]

    def draw(axes: Axes) -> None:
        for line in drawn:
            line.draw(axes)
        if level is not None:
            axes.axhline(level, color=GREY, linewidth=1, linestyle=":")
        axes.set_ylabel(label)
        if legend and len(drawn) <= MANY:
            axes.legend(ncols=legend)
        elif legend and len(drawn) <= 2 * MANY:
            spacing = {"columnspacing": 1.0, "handlelength": 1.5}
            axes.legend(ncols=3, fontsize=7, loc="lower left", bbox_to_anchor=(-0.1, 1), **spacing)

    return draw if drawn else None


def _stacked(
    name: str,
    panels: Sequence[Panel | None],
    *,
    label: str,
    marked: int | None = None,
    height: float = PANEL,
    across: str = "step",
    level: float | None = None,
) -> str | None:
    """Draw panels above each other and return the SVG element; None without a panel.

    ``across`` names their horizontal axis; on it ``marked`` is a dashed line and ``level`` a dotted one.
    """
    drawn = [panel for panel in panels if panel is not None]
    if not drawn:
        return None
    own_settings = {**_SETTINGS, "svg.hashsalt": f"gdro {name}"}
    with matplotlib.style.context(["default", own_settings]):  # not the user's
        figure = Figure(figsize=(WIDTH, height * len(drawn) + 0.35), layout="constrained")
        FigureCanvasSVG(figure)
        grid = figure.subplots(len(drawn), 1, sharex=True, squeeze=False)
        for (axes,), draw in zip(grid, drawn, strict=True):
            draw(axes)
            axes.yaxis.set_major_locator(MaxNLocator(5))
            for x, dashes in ((marked, "--"), (level, ":")):
                if x is not None:
                    axes.axvline(x, color=GREY, linewidth=1, linestyle=dashes)
        grid[-1][0].set_xlabel(across)
        grid[-1][0].xaxis.set_major_locator(MaxNLocator(6, integer=across == "step"))
        text = io.StringIO()
        figure.savefig(text, format="svg", metadata={"Date": None, "Creator": None, "Format": None, "Type": None})
    return _element(text.getvalue(), label)


def _element(document: str, label: str) -> str:
    """The ``<svg>`` of an SVG document, with a name for people who cannot see it."""
    element = _UNUSED_IDS.sub("", document[document.index("<svg") :]).strip()
    return element.replace("<svg ", f'<svg role="img" aria-label="{html.escape(label)}" ', 1)
