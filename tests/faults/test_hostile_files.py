"""A run or store that somebody else has prepared: links that lead out of it, and text that a terminal or a spreadsheet
would obey."""

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
def test_a_run_that_holds_a_link_is_not_worked_on(name: str, tmp_path: Path) -> None:
    """A checkpoint is written where the link leads, and older ones there are deleted: neither must happen."""
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


def test_a_terminal_obeys_no_text(capsys: pytest.CaptureFixture[str]) -> None:
    """Title, clipboard and screen are the user's; tabs, ends of lines and all letters stay."""
    print_table(ESCAPES, [ESCAPES], [[ESCAPES]])
    Reporter().say(f"[red]{ESCAPES}[/] :bomb: \\")
    assert exit_code_of(UserError(ESCAPES), debug=False) == 2
    said = capsys.readouterr()
    for text in (said.out, said.err):
        assert not any((ord(letter) < 32 and letter not in "\t\n") or 127 <= ord(letter) < 160 for letter in text)
    assert "a\\x1b]0;title\\x07\\x1b[2J\\x9b31m\\x7fb" in said.out
    assert "[red]a" in said.err and ":bomb: \\\n" in said.err
    assert printable("ä\t\n日本 \u202e") == "ä\t\n日本 \u202e"


def test_a_spreadsheet_carries_out_no_text() -> None:
    """Texts that begin like a formula are marked as texts; numbers, also as texts, are not touched."""
    row = ["=HYPERLINK(1)", "@SUM(A1)", "-2+3", "+x", "\tx", "-0.5", "+1e5", -3, 0.5, None, True, "plain", "a=b", "-"]
    (read,) = csv.reader(io.StringIO(csv_bytes([row]).decode()))
    assert read[:5] == ["'=HYPERLINK(1)", "'@SUM(A1)", "'-2+3", "'+x", "'\tx"]
    assert read[5:] == ["-0.5", "+1e5", "-3", "0.5", "", "1", "plain", "a=b", "-"]
