"""Results on the terminal, as Rich tables on stdout."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from gdro_cli.runtime.terminal import is_main_process, printable

if TYPE_CHECKING:
    from gdro_cli.core.scores import Interval
    from gdro_cli.core.verdict import Change, Verdict
    from gdro_cli.stages.ablation.ablate import AblationResult

WIDEST = 400
"""Characters of a line that need not fit into a terminal."""


def print_result(title: str, summary: Mapping[str, object]) -> None:
    """Print a stage's summary as a table of two columns; only the main process does."""
    if is_main_process():
        print_pairs(title, [(name, str(value)) for name, value in summary.items()])


def print_changes(title: str, changes: Mapping[str, Change]) -> None:
    """Print each measured quantity of both models with its interval, and the paired difference."""
    if is_main_process():
        rows = [
            [name, _interval(change.base), _interval(change.trained), _interval(change.difference, "+.3f")]
            for name, change in changes.items()
        ]
        print_table(title, ["", "base", "trained", "difference"], rows)


def print_verdict(verdict: Verdict) -> None:
    """Print the verdict and its reasons, a sentence each."""
    if is_main_process():
        rows = [[verdict.level if number == 0 else "", reason] for number, reason in enumerate(verdict.reasons)]
        print_table("Verdict", ["", ""], rows, header=False)


def print_intervals(title: str, intervals: Iterable[tuple[str, Interval]]) -> None:
    """Print each measured quantity of a set of images with its interval and the numbers of prompts and images."""
    rows = [[name, _interval(interval), str(interval.prompts), str(interval.images)] for name, interval in intervals]
    print_table(title, ["", "mean", "prompts", "images"], rows)


def _interval(interval: Interval, form: str = ".3f") -> str:
    return f"{interval.mean:{form}} [{interval.low:{form}}, {interval.high:{form}}]"


def print_plan(stage: str, lines: Iterable[tuple[str, str]]) -> None:
    """Print what ``--dry-run`` reports."""
    print_pairs(f"gdro {stage} would do this (nothing was run)", lines)


def print_cells(lines: Iterable[tuple[str, str]], cells: Iterable[list[str]]) -> None:
    """Print what ``gdro ablate --dry-run`` reports."""
    print_plan("ablate", lines)
    print_table("Cells", ["setting", "seed", "state", "run"], cells)


def print_ablation(result: AblationResult) -> None:
    """Print the cells, the means over several seeds, the summary in words, and the files."""
    ablation = result.ablation
    print_table(f"Ablation of {ablation.sweep.title}, validation prompts", *ablation.cell_table)
    if len(ablation.sweep.seeds) > 1:
        print_table("Over seeds (mean and lowest to highest)", *ablation.seed_table)
    Console(highlight=False).print(Text(printable(ablation.summary())), soft_wrap=not Console().is_terminal)
    print_result("Ablation", result.summary)


def print_pairs(title: str, pairs: Iterable[tuple[str, str]]) -> None:
    """Print a titled table of names and values."""
    print_table(title, ["", ""], [list(pair) for pair in pairs], header=False)


def print_table(title: str, columns: list[str], rows: Iterable[list[str]], *, header: bool = True) -> None:
    """Print a titled table of plain text, in which nothing is read as markup. Off a terminal no line is cut."""
    console = Console(highlight=False)
    table = Table(
        title=Text(printable(title)), title_justify="left", box=box.SIMPLE_HEAD, show_header=header, pad_edge=False
    )
    for column in columns:
        table.add_column(Text(printable(column)), overflow="fold")
    for row in rows:
        table.add_row(*(Text(printable(cell)) for cell in row))
    if not console.is_terminal:
        console.width = WIDEST
        console.width = console.measure(table).maximum
    console.print(table)
