"""Untrusted runs and stores: links that lead out of them, and text that a terminal or a spreadsheet would obey."""

from __future__ import annotations

import csv
import io
from pathlib import Path

import pytest
import torch

from gdro_cli.cli.failures import exit_code_of
from gdro_cli.cli.tables import print_table
from gdro_cli.errors import StoreError, UserError
from gdro_cli.runtime.checkpoint import save_checkpoint
from gdro_cli.runtime.progress import Reporter
from gdro_cli.runtime.run import RunFolder
from gdro_cli.runtime.terminal import printable
from gdro_cli.stages.reporting.csv_table import csv_bytes


@pytest.mark.parametrize("name", ["checkpoints", "metrics.jsonl", "best/checkpoints"])
def test_a_run_that_contains_a_link_is_refused(name: str, tmp_path: Path) -> None:
    """Otherwise a checkpoint would be written where the link leads, and older ones there deleted."""
    about = {"recipe": {"name": "a"}, "inputs": {}, "environment": {}}
    run = RunFolder.create_or_open(tmp_path / "run", **about)
    outside = tmp_path / "outside"
    save_checkpoint(outside, 1, tensors={"adapter": {"w": torch.ones(1)}}, state={}, keep=1)
    link = run.path / name
    link.parent.mkdir(exist_ok=True)
    link.symlink_to(outside / "checkpoints")
    with pytest.raises(StoreError, match=r"is a link that leaves its folder: delete it and run the command again"):
        RunFolder.create_or_open(tmp_path / "run", **about)
    assert [path.name for path in (outside / "checkpoints").iterdir()] == ["step-000001"]


# -- terminal and spreadsheet -----------------------------------------------------------------------------------------

ESCAPES = "a\x1b]0;title\x07\x1b[2J\x9b31m\x7fb"


def test_the_terminal_gets_no_control_characters(capsys: pytest.CaptureFixture[str]) -> None:
    """No text can change the terminal's title, clipboard or screen; tabs, line ends and all letters stay."""
    print_table(ESCAPES, [ESCAPES], [[ESCAPES]])
    Reporter().say(f"[red]{ESCAPES}[/] :bomb: \\")
    assert exit_code_of(UserError(ESCAPES), debug=False) == 2
    printed = capsys.readouterr()
    for text in (printed.out, printed.err):
        assert not any((ord(letter) < 32 and letter not in "\t\n") or 127 <= ord(letter) < 160 for letter in text)
    assert "a\\x1b]0;title\\x07\\x1b[2J\\x9b31m\\x7fb" in printed.out
    assert "[red]a" in printed.err and ":bomb: \\\n" in printed.err
    assert printable("ä\t\n日本 \u202e") == "ä\t\n日本 \u202e"


def test_a_spreadsheet_gets_no_formula_from_a_text() -> None:
    """Texts that begin like a formula are marked as text; numbers, also in text form, stay the same."""
    row = ["=HYPERLINK(1)", "@SUM(A1)", "-2+3", "+x", "\tx", "-0.5", "+1e5", -3, 0.5, None, True, "plain", "a=b", "-"]
    (read,) = csv.reader(io.StringIO(csv_bytes([row]).decode()))
    assert read[:5] == ["'=HYPERLINK(1)", "'@SUM(A1)", "'-2+3", "'+x", "'\tx"]
    assert read[5:] == ["-0.5", "+1e5", "-3", "0.5", "", "1", "plain", "a=b", "-"]
