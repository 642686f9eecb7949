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
"""Characters of a line where there is no terminal to fit into."""


def print_result(title: str, summary: Mapping[str, object]) -> None:
    """A stage's summary as a table of two columns; only the first of several processes prints."""
    if is_main_process():
        print_pairs(title, [(name, str(value)) for name, value in summary.items()])


def print_changes(title: str, changes: Mapping[str, Change]) -> None:
    """Each measured quantity of both models with its interval, and the paired difference."""
    if is_main_process():
        rows = [
            [name, _shown(change.base), _shown(change.trained), _shown(change.difference, "+.3f")]
            for name, change in changes.items()
        ]
        print_table(title, ["", "base", "trained", "difference"], rows)


def print_verdict(verdict: Verdict) -> None:
    """The verdict and its reasons, a sentence each."""
    if is_main_process():
        rows = [[verdict.level if number == 0 else "", reason] for number, reason in enumerate(verdict.reasons)]
        print_table("Verdict", ["", ""], rows, header=False)


def print_intervals(title: str, intervals: Iterable[tuple[str, Interval]]) -> None:
    """Each measured quantity of one set of images with its interval and what it was measured on."""
    rows = [[name, _shown(interval), str(interval.prompts), str(interval.images)] for name, interval in intervals]
    print_table(title, ["", "mean", "prompts", "images"], rows)


def _shown(interval: Interval, form: str = ".3f") -> str:
    return f"{interval.mean:{form}} [{interval.low:{form}}, {interval.high:{form}}]"


def print_plan(stage: str, lines: Iterable[tuple[str, str]]) -> None:
    """What ``--dry-run`` says."""
    print_pairs(f"gdro {stage} would do this (nothing was run)", lines)


def print_cells(lines: Iterable[tuple[str, str]], cells: Iterable[list[str]]) -> None:
    """What ``gdro ablate --dry-run`` says."""
    print_plan("ablate", lines)
    print_table("Cells", ["setting", "seed", "state", "run"], cells)


def print_ablation(result: AblationResult) -> None:
    """The cells, the means over seeds if there are several, the summary in words, and the files."""
    ablation = result.ablation
    print_table(f"Ablation of {ablation.sweep.title}, validation prompts", *ablation.cell_table)
    if len(ablation.sweep.seeds) > 1:
        print_table("Over seeds (mean and lowest to highest)", *ablation.seed_table)
    Console(highlight=False).print(Text(printable(ablation.summary())), soft_wrap=not Console().is_terminal)
    print_result("Ablation", result.summary)


def print_pairs(title: str, pairs: Iterable[tuple[str, str]]) -> None:
    """A titled table of names and values."""
    rows = [[name, value] for name, value in pairs]
    print_table(title, ["", ""], rows, header=False)


def print_table(title: str, columns: list[str], rows: Iterable[list[str]], *, header: bool = True) -> None:
    """A titled table of plain text: nothing in it is read as markup. Off a terminal no line is cut."""
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
