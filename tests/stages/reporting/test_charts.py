"""Curves as SVG, and numbers as text."""

from __future__ import annotations

import pytest

from gdro_cli.stages.reporting import charts
from gdro_cli.stages.reporting.number_format import number
from tests.support.rows import point, step


def test_without_points_there_is_no_chart() -> None:
    assert charts.validation_chart([]) is None and charts.axes_chart([point(0, 0.5)]) is None
    assert charts.order_chart([]) is None and charts.gap_chart([]) is None
    assert charts.rounds_chart([step(1, loss=0.5)]) is None
    assert charts.tradeoff_chart({"a": [point(0, 0.5)]}) is None and charts.runs_chart({"a": []}) is None


def test_charts_are_the_same_bytes_and_names_are_text() -> None:
    rows = [point(number, 0.5, corrected=0.1 * number) for number in range(3)]
    runs = {"<b>$x_1$ & y": rows, "other": rows}
    drawn = charts.runs_chart(runs, level=0.5)
    assert drawn is not None and drawn == charts.runs_chart(runs, level=0.5)
    assert "&lt;b&gt;$x_1$ &amp; y" in drawn and "<b>" not in drawn
    assert "<metadata" not in drawn and drawn.startswith('<svg role="img" aria-label=')


def test_an_online_training_has_a_chart_of_its_rounds() -> None:
    rows = [step(number, reward=0.5, reward_group_std=0.2, clip_fraction=0.1) for number in range(1, 5)]
    drawn = charts.rounds_chart(rows, marked=2)
    assert drawn is not None and "reward of the rounds" in drawn and "clipped ratios" in drawn


def test_the_loss_is_drawn_above_its_floor_where_it_has_one() -> None:
    rows = [step(1, loss=3.0, loss_method=2.0, loss_floor=0.5), step(2, loss=3.0, loss_method=1.0, loss_floor=0.75)]
    assert charts._binned(rows, "loss_method", charts.STYLES[0], minus="loss_floor").y == [1.5, 0.25]
    assert "loss above its floor" in str(charts.loss_chart(rows))
    plain = charts.loss_chart([step(1, loss=3.0)])
    assert plain is not None and "above its floor" not in plain
    assert charts.loss_chart([]) is None


def test_a_long_training_is_averaged_into_few_points() -> None:
    rows = [step(number, implicit_accuracy=0.5 + (number % 2) / 10) for number in range(1, 10_001)]
    drawn = charts.order_chart(rows)
    assert drawn is not None and len(drawn) < 60_000


def test_more_runs_than_colours_stay_apart() -> None:
    styles = [charts._style(number) for number in range(3 * len(charts.STYLES))]
    assert len(set(styles)) == len(styles)


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        (None, "-"),
        (float("nan"), "-"),
        (0, "0.000"),
        (-0.0, "0.000"),
        (0.5, "0.500"),
        (-0.00123, "-0.0012"),
        (6e-5, "6e-05"),
    ],
)
def test_numbers(value: float | None, shown: str) -> None:
    assert number(value) == shown
